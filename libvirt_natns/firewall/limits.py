# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits on what a namespace takes of the machine's shared tables.

The kernel has one neighbour table a family and one conntrack hash for all network
namespaces.  Rules limit how fast a namespace may add to them:

* ``RATE`` addresses a second, after a burst of ``BURST``, that were not met within
  the last ``REMEMBERED`` seconds.  Addresses met before are not limited.
* a number of flows at one time.

``ct count`` and connlimit walk a list of all counted flows for each new flow.  With
20,000 flows that costs the kernel 2 ms a packet.  So nftables spreads the flows over
many short lists, by turns.  iptables has no such lists: it counts one flow of
``SAMPLE``, and refuses all new flows for ``PAUSE`` seconds when too many were counted.

Sizes are numbers of elements, times are seconds.
"""

RATE = 20
BURST = 100
REMEMBERED = 300

REMEMBERED_SIZE = 32768
"""Room for BURST and REMEMBERED * RATE addresses of three rules, and half as much again."""

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
    """The number of lists that ``flows`` are spread over."""
    return max(1, flows // LIST_LENGTH)


def known_set(family: int) -> list[str]:
    """The declaration of the set of a family's addresses, in nft's words."""
    return [
        f"\tset {KNOWN[family]} {{",
        f"\t\ttype {ADDRESS_TYPES[family]}",
        f"\t\tsize {REMEMBERED_SIZE}",
        "\t\tflags dynamic,timeout",
        f"\t\ttimeout {REMEMBERED // 60}m",
        "\t}",
    ]


def flow_set(flows: int) -> list[str]:
    """The declaration of the lists of flows, in nft's words."""
    return [
        "\tset flows {",
        # A type of 32 bits for which nft has a name.
        "\t\ttype mark",
        f"\t\tsize {lists(flows)}",
        "\t\tflags dynamic",
        "\t}",
    ]


def fresh_statements(family: int, condition: str, field: str) -> tuple[str, str]:
    """Two nft statements: drop new addresses over the limit, remember the others."""
    known = KNOWN[family]
    return (
        f"{condition} {field} != @{known} {OVER} drop",
        f"{condition} update @{known} {{ {field} }}",
    )


def flow_statement(flows: int) -> str:
    """The nft match of a flow that is one too many, on the flow's first packet."""
    count = lists(flows)
    turn = f"numgen inc mod {count} ct count over {flows // count}"
    return f"ct status & confirmed == 0 add @flows {{ {turn} }}"


def arp_table() -> str:
    """The table that limits new senders of ARP requests, as nft's script.

    The kernel makes an entry for the sender of each request that it answers.
    """
    drop, remember = fresh_statements(4, "arp operation request", "arp saddr ip")
    lines = [
        f"table {ARP_TABLE} {{",
        *known_set(4),
        "\tchain input {",
        "\t\ttype filter hook input priority filter; policy accept;",
        f"\t\t{drop}",
        f"\t\t{remember}",
        "\t}",
        "}",
        "",
    ]
    return "\n".join(lines)
