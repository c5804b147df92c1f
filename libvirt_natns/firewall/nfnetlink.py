# SPDX-License-Identifier: LGPL-2.1-or-later
"""nftables' netlink messages: tables, generations, and a fingerprint of the host's rules.

nft lists a table with all elements of its sets.  With thousands of published ports
that takes longer than the rest of a network's start.  The kernel itself
hands out rules without elements, in some 0.1 ms.  The fingerprint covers:

* our own table's chains and rules, byte by byte (no rule has a counter);
* of each foreign chain that sees forwarded packets the handles of its rules,
  which are never given out twice;
* the existence of our chains in foreign tables.

Limits: elements of our sets, and the rules in our chains in foreign tables, are in a full
comparison only.  Source: linux/netfilter/nf_tables.h.
"""

import hashlib
import struct
from collections.abc import Iterator

from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import NETLINK_NETFILTER, Attrs, InterruptedDumpError, Socket

NFNL_SUBSYS_NFTABLES = 10
HEADER = struct.Struct("!BBH")
"""A family, the version and a resource id: struct nfgenmsg."""
GET_TABLE, GET_CHAIN, GET_RULE, GET_GENERATION = 1, 4, 7, 16
CHAIN_TABLE, CHAIN_HANDLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY = 1, 2, 3, 4, 5
HOOK_NUMBER = 1
RULE_TABLE, RULE_CHAIN, RULE_HANDLE = 1, 2, 3
TABLE_NAME, TABLE_HANDLE = 1, 4
GENERATION_ID = 1
NF_INET_FORWARD = 2
NFPROTO_INET, NFPROTO_IPV4, NFPROTO_ARP, NFPROTO_IPV6 = 1, 2, 3, 10
FAMILIES = {NFPROTO_INET: "inet", NFPROTO_IPV4: "ip", NFPROTO_IPV6: "ip6"}
"""Families with chains that see packets of IP, by nft's names."""
TABLE_FAMILIES = FAMILIES | {NFPROTO_ARP: "arp"}
"""Families that a table of ours may have."""
TRANSLATIONS = (b"DNAT\0", b"REDIRECT\0", b"\x08\0\x01\0nat\0", b"redir\0")
"""Names of expressions, and of targets of iptables, in rules that may translate destinations."""
DUMP_TRIES = 10
"""Number of tries for a dump that changes of the rules interrupt."""


def fingerprint(table: str, chain: str) -> str:
    """Return a digest that changes with our table, and with the chains around the table.

    ``table`` is ours, "family name"; ``chain`` is the name of our chains in foreign tables.
    "" where the kernel does not tell.
    """
    word, _, name = table.partition(" ")
    family = next(number for number, family_name in FAMILIES.items() if family_name == word)
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
    """True if the kernel has nftables, and hands its chains out."""
    try:
        with Socket(NETLINK_NETFILTER) as session:
            return all(True for _ in dump(session, GET_CHAIN))
    except OSError:
        return False


def tables() -> set[str] | None:
    """Return the tables of the caller's namespace, as "family name"; None where that fails."""
    try:
        return set(_tables())
    except OSError:
        return None


def table_numbers() -> dict[str, int]:
    """Return the number of each table of the caller's namespace, by "family name".

    A table that is made anew has another number.  Empty where the kernel does not tell.
    """
    try:
        return _tables()
    except OSError:
        return {}


def _tables() -> dict[str, int]:
    with Socket(NETLINK_NETFILTER) as session:
        held = [(family, Attrs.parse(body)) for family, body in dump(session, GET_TABLE)]
    return {
        f"{TABLE_FAMILIES[family]} {text(table, TABLE_NAME).decode(errors='replace')}": (
            int.from_bytes(table.get(TABLE_HANDLE) or b"", "big")
        )
        for family, table in held
        if family in TABLE_FAMILIES
    }


def generation() -> str:
    """Return the number of the namespace's ruleset; each change of any table makes another one.

    "" where the kernel does not tell.
    """
    kind = NFNL_SUBSYS_NFTABLES << 8 | GET_GENERATION
    try:
        with Socket(NETLINK_NETFILTER) as session:
            answer = session.get(kind, HEADER.pack(0, 0, 0))
    except OSError:
        return ""
    number = Attrs.parse(answer, HEADER.size).get(GENERATION_ID) if answer else None
    return str(int.from_bytes(number, "big")) if number else ""


def parents(chain: str) -> list[str]:
    """Return the tables that have a chain of that name, in nft's words: "family table"."""
    try:
        with Socket(NETLINK_NETFILTER) as session:
            chains = [(family, Attrs.parse(body)) for family, body in dump(session, GET_CHAIN)]
    except OSError:
        return []
    return sorted(
        f"{FAMILIES[family]} {text(attributes, CHAIN_TABLE).decode()}"
        for family, attributes in chains
        if family in FAMILIES and text(attributes, CHAIN_NAME) == chain.encode()
    )


def translating(ours: str) -> list[str] | None:
    """Return the tables, but ours, with a rule that may translate destinations of packets.

    Tables are named "family name".  None where the kernel does not tell.
    """
    try:
        with Socket(NETLINK_NETFILTER) as session:
            # Our own table may have thousands of rules.
            return [table for table in _tables() if table != ours and _translates(session, table)]
    except OSError:
        return None


def _translates(session: Socket, table: str) -> bool:
    word, _, name = table.partition(" ")
    family = next(number for number, each in TABLE_FAMILIES.items() if each == word)
    where = netlink.pack([(RULE_TABLE, name.encode() + b"\0")])
    return any(
        word in body for _, body in dump(session, GET_RULE, family, where) for word in TRANSLATIONS
    )


def _lines(session: Socket, ours: tuple[int, bytes], chain: bytes) -> Iterator[bytes]:
    chains = [(family, Attrs.parse(body)) for family, body in dump(session, GET_CHAIN)]
    for family, attributes in chains:
        table, name = text(attributes, CHAIN_TABLE), text(attributes, CHAIN_NAME)
        policy = attributes.get(CHAIN_POLICY)
        line = repr((family, table, name, attributes.get(CHAIN_HANDLE), policy)).encode()
        if (family, table) == ours:
            yield line + (attributes.get(CHAIN_HOOK) or b"")
        elif family in FAMILIES and (name == chain or _forwards(attributes)):
            yield line
            if name != chain:
                yield from _handles(session, family, table, name)
    own_table = netlink.pack([(RULE_TABLE, ours[1] + b"\0")])
    for family, body in dump(session, GET_RULE, ours[0], own_table):
        if (family, text(Attrs.parse(body), RULE_TABLE)) == ours:
            yield body


def _handles(session: Socket, family: int, table: bytes, chain: bytes) -> Iterator[bytes]:
    where = netlink.pack([(RULE_TABLE, table + b"\0"), (RULE_CHAIN, chain + b"\0")])
    for _, body in dump(session, GET_RULE, family, where):
        rule = Attrs.parse(body)
        if (text(rule, RULE_TABLE), text(rule, RULE_CHAIN)) == (table, chain):
            yield rule.get(RULE_HANDLE) or b""


def _forwards(chain: Attrs) -> bool:
    hook = chain.nested(CHAIN_HOOK).get(HOOK_NUMBER) or b""
    return len(hook) == 4 and struct.unpack("!I", hook)[0] == NF_INET_FORWARD


def dump(
    session: Socket, what: int, family: int = 0, attributes: bytes = b""
) -> Iterator[tuple[int, bytes]]:
    """Yield all objects of a kind, each as its family and attributes.  Raises OSError."""
    kind = NFNL_SUBSYS_NFTABLES << 8 | what
    request = HEADER.pack(family, 0, 0) + attributes
    for left in reversed(range(DUMP_TRIES)):
        try:
            bodies = session.dump(kind, request)
            break
        except InterruptedDumpError:
            if not left:
                raise
    for body in bodies:
        yield body[0], body[HEADER.size :]


def text(attributes: Attrs, kind: int) -> bytes:
    """Return a name without the zero octet at its end; empty where it is missing."""
    return (attributes.get(kind) or b"").rstrip(b"\0")
