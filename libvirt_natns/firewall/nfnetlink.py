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
import socket
import struct
from collections.abc import Iterator

NETLINK_NETFILTER = 12
NFNL_SUBSYS_NFTABLES = 10
GET_TABLE, GET_CHAIN, GET_RULE, NEW_GENERATION, GET_GENERATION = 1, 4, 7, 15, 16
NLM_F_REQUEST = 1
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_DUMP_INTR = 0x10
CHAIN_TABLE, CHAIN_HANDLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY = 1, 2, 3, 4, 5
HOOK_NUMBER = 1
RULE_TABLE, RULE_CHAIN, RULE_HANDLE = 1, 2, 3
TABLE_NAME = 1
NF_INET_FORWARD = 2
NFPROTO_INET, NFPROTO_IPV4, NFPROTO_ARP, NFPROTO_IPV6 = 1, 2, 3, 10
FAMILIES = {NFPROTO_INET: "inet", NFPROTO_IPV4: "ip", NFPROTO_IPV6: "ip6"}
"""Families with chains that see packets of IP, by nft's names."""
TABLE_FAMILIES = FAMILIES | {NFPROTO_ARP: "arp"}
"""Families that a table of ours may have."""
NLA_TYPE = 0x3FFF
BUFFER = 1 << 18

TIME_LIMIT = 30.0
"""Seconds after which the kernel counts as stuck."""

Attributes = dict[int, bytes]


def fingerprint(table: str, chain: str) -> str:
    """Return a digest that changes with our table, and with the chains around the table.

    ``table`` is ours, "family name"; ``chain`` is the name of our chains in foreign tables.
    "" where the kernel does not tell.
    """
    word, _, name = table.partition(" ")
    family = next(number for number, family_name in FAMILIES.items() if family_name == word)
    ours = (family, name.encode())
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as session:
            digest = hashlib.sha256()
            for line in _lines(session, ours, chain.encode()):
                digest.update(line)
            return digest.hexdigest()
    except OSError:
        return ""


def works() -> bool:
    """True if the kernel has nftables, and hands its chains out."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as session:
            return all(True for _ in _dump(session, GET_CHAIN))
    except OSError:
        return False


def tables() -> set[str] | None:
    """Return the tables of the caller's namespace, as "family name"; None where that fails."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as session:
            held = [(family, _attributes(body)) for family, body in _dump(session, GET_TABLE)]
    except OSError:
        return None
    return {
        f"{TABLE_FAMILIES[family]} {_text(table, TABLE_NAME).decode(errors='replace')}"
        for family, table in held
        if family in TABLE_FAMILIES
    }


def generation() -> str:
    """Return the number of the namespace's ruleset; each change of any table makes another one.

    "" where the kernel does not tell.
    """
    kind = NFNL_SUBSYS_NFTABLES << 8
    request = struct.pack("=IHHII4x", 20, kind | GET_GENERATION, NLM_F_REQUEST, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as session:
            session.settimeout(TIME_LIMIT)
            session.send(request)
            answer = session.recv(4096)
    except OSError:
        return ""
    # Headers of netlink and nfnetlink, then the first attribute, NFTA_GEN_ID.
    (answered,) = struct.unpack_from("=4xH", answer)
    if answered != kind | NEW_GENERATION or len(answer) < 28:
        return ""
    return str(*struct.unpack_from("!I", answer, 24))


def parents(chain: str) -> list[str]:
    """Return the tables that have a chain of that name, in nft's words: "family table"."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as session:
            chains = [(family, _attributes(body)) for family, body in _dump(session, GET_CHAIN)]
    except OSError:
        return []
    return sorted(
        f"{FAMILIES[family]} {_text(attributes, CHAIN_TABLE).decode()}"
        for family, attributes in chains
        if family in FAMILIES and _text(attributes, CHAIN_NAME) == chain.encode()
    )


def _lines(session: socket.socket, ours: tuple[int, bytes], chain: bytes) -> Iterator[bytes]:
    chains = [(family, _attributes(body)) for family, body in _dump(session, GET_CHAIN)]
    for family, attributes in chains:
        table, name = _text(attributes, CHAIN_TABLE), _text(attributes, CHAIN_NAME)
        policy = attributes.get(CHAIN_POLICY)
        line = repr((family, table, name, attributes.get(CHAIN_HANDLE), policy)).encode()
        if (family, table) == ours:
            yield line + attributes.get(CHAIN_HOOK, b"")
        elif family in FAMILIES and (name == chain or _forwards(attributes)):
            yield line
            if name != chain:
                yield from _handles(session, family, table, name)
    for family, body in _dump(session, GET_RULE, ours[0], _attribute(RULE_TABLE, ours[1])):
        if (family, _text(_attributes(body), RULE_TABLE)) == ours:
            yield body


def _handles(session: socket.socket, family: int, table: bytes, chain: bytes) -> Iterator[bytes]:
    where = _attribute(RULE_TABLE, table) + _attribute(RULE_CHAIN, chain)
    for _, body in _dump(session, GET_RULE, family, where):
        rule = _attributes(body)
        if (_text(rule, RULE_TABLE), _text(rule, RULE_CHAIN)) == (table, chain):
            yield rule.get(RULE_HANDLE, b"")


def _forwards(chain: Attributes) -> bool:
    hook = _attributes(chain.get(CHAIN_HOOK, b"")).get(HOOK_NUMBER, b"")
    return len(hook) == 4 and struct.unpack("!I", hook)[0] == NF_INET_FORWARD


def _dump(
    session: socket.socket, what: int, family: int = 0, attributes: bytes = b""
) -> Iterator[tuple[int, bytes]]:
    """Yield all objects of a kind, each as its family and attributes.  Raises OSError."""
    kind = NFNL_SUBSYS_NFTABLES << 8 | what
    header = struct.pack("=IHHII", 20 + len(attributes), kind, NLM_F_REQUEST_DUMP, 1, 0)
    session.sendto(header + struct.pack("!BBH", family, 0, 0) + attributes, (0, 0))
    while True:
        data = session.recv(BUFFER)
        offset = 0
        while offset < len(data):
            length, message, flags = struct.unpack_from("=IHH", data, offset)
            if message == NLMSG_DONE:
                return
            if message == NLMSG_ERROR or flags & NLM_F_DUMP_INTR:
                raise OSError("nftables' rules cannot be listed")
            yield data[offset + 16], data[offset + 20 : offset + length]
            offset += length + 3 & ~3


def _attribute(kind: int, text: bytes) -> bytes:
    padded = text + b"\0" * (4 - len(text) % 4)
    return struct.pack("=HH", 5 + len(text), kind) + padded


def _attributes(data: bytes) -> Attributes:
    attributes: Attributes = {}
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        attributes[kind & NLA_TYPE] = data[offset + 4 : offset + length]
        offset += max(length, 4) + 3 & ~3
    return attributes


def _text(attributes: Attributes, kind: int) -> bytes:
    return attributes.get(kind, b"").rstrip(b"\0")
