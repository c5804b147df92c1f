# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits on a namespace's share of the machine's tables of neighbours and connections.

The kernel has one neighbour table a family and one conntrack hash for all network
namespaces.  Rules limit how fast a namespace may add to them:

* ``RATE`` packets a second, after a burst of ``BURST``, from or to unknown addresses.
  Packets of known addresses are not limited.
* a number of flows at one time.

``ct count`` and connlimit walk a list of all counted flows for each new flow.  With
20,000 flows that costs the kernel 2 ms a packet.  So nftables spreads the flows over
many short lists, by turns.  iptables has no such lists.  It counts one flow of
``SAMPLE``, and refuses all new flows for ``PAUSE`` seconds when too many were counted.

A packet makes its address known for ``REMEMBERED`` seconds.  A guest can name any
address, so ``KNOWN_SIZE`` bounds how many are known at one time: when the set is full,
other addresses stay unknown.  Echo requests from outside make no address known.

Sizes are numbers of elements, times are seconds.
"""

RATE = 10
BURST = 50
REMEMBERED = 300

KNOWN_SIZE = 256
"""A neighbour table has 1024 entries by default, for the whole machine."""

LIST_LENGTH = 64
"""Flows in each of nftables' lists."""

SAMPLE = 64
PAUSE = 30

KNOWN = {4: "known", 6: "known6"}
"""The sets, or lists of xt_recent, that hold a family's addresses."""
ADDRESS_TYPES = {4: "ipv4_addr", 6: "ipv6_addr"}
OVER = f"limit rate over {RATE}/second burst {BURST} packets"

ARP_TABLE = "arp natns"


def lists(flows: int) -> int:
    """Return the number of lists that ``flows`` are spread over."""
    return max(1, flows // LIST_LENGTH)


def known_set(family: int) -> list[str]:
    """Return the declaration of the set of a family's addresses, in nft's words."""
    return [
        f"\tset {KNOWN[family]} {{",
        f"\t\ttype {ADDRESS_TYPES[family]}",
        f"\t\tsize {KNOWN_SIZE}",
        "\t\tflags dynamic,timeout",
        f"\t\ttimeout {REMEMBERED // 60}m",
        "\t}",
    ]


def flow_set(flows: int) -> list[str]:
    """Return the declaration of the lists of flows, in nft's words."""
    return [
        "\tset flows {",
        # A type of 32 bits for which nft has a name.
        "\t\ttype mark",
        f"\t\tsize {lists(flows)}",
        "\t\tflags dynamic",
        "\t}",
    ]


def fresh_statements(
    family: int, condition: str, field: str, *, remembered: bool = True
) -> tuple[str, ...]:
    """Return nft's statements that drop new addresses over the limit, and remember the others.

    The second statement matches no packet while the set is full.
    """
    addresses = KNOWN[family]
    drop = f"{condition} {field} != @{addresses} {OVER} drop"
    return (drop, f"{condition} update @{addresses} {{ {field} }}") if remembered else (drop,)


def flow_statement(flows: int) -> str:
    """Return the nft match of a flow over the limit, on the flow's first packet."""
    count = lists(flows)
    turn = f"numgen inc mod {count} ct count over {flows // count}"
    return f"ct status & confirmed == 0 add @flows {{ {turn} }}"


def arp_table(own: str) -> str:
    """Return the table that limits new senders of ARP, as nft's script.

    ``own`` are the namespace's addresses as an nft expression, "" for none.  The kernel
    makes an entry for the sender of each request that it answers.  A reply to any
    address keeps an existing entry.
    """
    conditions = [f"arp operation request arp daddr ip {own}"] if own else []
    lines = [
        f"table {ARP_TABLE} {{",
        *known_set(4),
        "\tchain input {",
        "\t\ttype filter hook input priority filter; policy accept;",
        *(
            f"\t\t{statement}"
            for condition in (*conditions, "arp operation reply")
            for statement in fresh_statements(4, condition, "arp saddr ip")
        ),
        "\t}",
        "}",
        "",
    ]
    return "\n".join(lines)
