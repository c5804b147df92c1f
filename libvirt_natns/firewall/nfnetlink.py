# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether somebody has touched the host's rules: one fingerprint, without a program.

nft lists a table with all elements of its sets: with thousands of published ports
that takes longer than all else that a network's start does.  The kernel itself
hands out rules without elements, in some 0.1 ms; what matters of them is:

* our own table's chains and rules, byte by byte (none has a counter);
* of each foreign chain that sees forwarded packets the handles of its rules,
  which are never given out twice, and of our chains in foreign tables that they
  are there.

Limits: elements of our sets, and the rules in our chains in foreign tables, are not
looked at; a full comparison does.  Source: linux/netfilter/nf_tables.h.
"""

import hashlib
import struct
from collections.abc import Iterator

from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import NETLINK_NETFILTER, Attrs, InterruptedDumpError, Socket

NFNL_SUBSYS_NFTABLES = 10
GET_CHAIN, GET_RULE = 4, 7
CHAIN_TABLE, CHAIN_HANDLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY = 1, 2, 3, 4, 5
HOOK_NUMBER = 1
RULE_TABLE, RULE_CHAIN, RULE_HANDLE = 1, 2, 3
NF_INET_FORWARD = 2
NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10
FAMILIES = {NFPROTO_INET: "inet", NFPROTO_IPV4: "ip", NFPROTO_IPV6: "ip6"}
"""Those whose chains see packets of IP, as nft calls them."""
DUMP_TRIES = 10
"""How often a dump is asked for that a change of the rules interrupts."""


def fingerprint(table: str, chain: str) -> str:
    """What changes whenever somebody alters our table, or the chains around it.

    ``table`` is ours, "family name"; ``chain`` is the name of ours in foreign tables.
    "" where the kernel does not tell.
    """
    word, _, name = table.partition(" ")
    family = next(number for number, each in FAMILIES.items() if each == word)
    ours = (family, name.encode())
    try:
        with Socket(NETLINK_NETFILTER) as session:
            digest = hashlib.sha256()
            for line in _lines(session, ours, chain.encode()):
                digest.update(line)
            return digest.hexdigest()
    except OSError:
        return ""


def works() -> bool:
    """Whether the kernel has nftables at all, and hands its chains out."""
    try:
        with Socket(NETLINK_NETFILTER) as session:
            return all(True for _ in _dump(session, GET_CHAIN))
    except OSError:
        return False


def parents(chain: str) -> list[str]:
    """The tables that have a chain of that name, as nft calls them: "family table"."""
    try:
        with Socket(NETLINK_NETFILTER) as session:
            found = [(family, Attrs.parse(body)) for family, body in _dump(session, GET_CHAIN)]
    except OSError:
        return []
    return sorted(
        f"{FAMILIES[family]} {_text(each, CHAIN_TABLE).decode()}"
        for family, each in found
        if family in FAMILIES and _text(each, CHAIN_NAME) == chain.encode()
    )


def _lines(session: Socket, ours: tuple[int, bytes], chain: bytes) -> Iterator[bytes]:
    found = [(family, Attrs.parse(body)) for family, body in _dump(session, GET_CHAIN)]
    for family, each in found:
        table, name = _text(each, CHAIN_TABLE), _text(each, CHAIN_NAME)
        said = repr((family, table, name, each.get(CHAIN_HANDLE), each.get(CHAIN_POLICY))).encode()
        if (family, table) == ours:
            yield said + (each.get(CHAIN_HOOK) or b"")
        elif family in FAMILIES and (name == chain or _forwards(each)):
            yield said
            if name != chain:
                yield from _handles(session, family, table, name)
    for family, body in _dump(
        session, GET_RULE, ours[0], netlink.pack([(RULE_TABLE, ours[1] + b"\0")])
    ):
        if (family, _text(Attrs.parse(body), RULE_TABLE)) == ours:
            yield body


def _handles(session: Socket, family: int, table: bytes, chain: bytes) -> Iterator[bytes]:
    where = netlink.pack([(RULE_TABLE, table + b"\0"), (RULE_CHAIN, chain + b"\0")])
    for _, body in _dump(session, GET_RULE, family, where):
        rule = Attrs.parse(body)
        if (_text(rule, RULE_TABLE), _text(rule, RULE_CHAIN)) == (table, chain):
            yield rule.get(RULE_HANDLE) or b""


def _forwards(chain: Attrs) -> bool:
    hook = chain.nested(CHAIN_HOOK).get(HOOK_NUMBER) or b""
    return len(hook) == 4 and struct.unpack("!I", hook)[0] == NF_INET_FORWARD


def _dump(
    session: Socket, what: int, family: int = 0, attributes: bytes = b""
) -> Iterator[tuple[int, bytes]]:
    """All of a kind, as the family and the attributes of each.  Raises OSError."""
    kind, request = NFNL_SUBSYS_NFTABLES << 8 | what, struct.pack("!BBH", family, 0, 0) + attributes
    for left in reversed(range(DUMP_TRIES)):
        try:
            bodies = session.dump(kind, request)
            break
        except InterruptedDumpError:
            if not left:
                raise
    for body in bodies:
        yield body[0], body[4:]


def _text(attributes: Attrs, kind: int) -> bytes:
    return (attributes.get(kind) or b"").rstrip(b"\0")
