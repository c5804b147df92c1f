# SPDX-License-Identifier: LGPL-2.1-or-later
"""A digest of nftables' tables, from the objects that the kernel hands out.

nft lists rules as text, in words that differ between its versions, and a start of nft costs
several milliseconds.  The kernel's own dump of a network's tables takes a third of that.

The digest covers flags of tables, chains with their hooks and policies, rules with their
comments, sets, and elements of sets.  The digest leaves out what changes without a change of
the rules: handles, counts of users, and elements of sets that packets fill.  The order of
elements does not matter, for the kernel reorders a set that grows.

Limits: named objects and flow tables are not covered.  Tables of ours have no objects but helpers,
and the kernel keeps a helper that a rule names as it is.  Source: linux/netfilter/nf_tables.h.
"""

import hashlib
from collections.abc import Iterator

from libvirt_natns.firewall import nfnetlink
from libvirt_natns.firewall.nfnetlink import (
    CHAIN_HOOK,
    CHAIN_NAME,
    CHAIN_POLICY,
    CHAIN_TABLE,
    GET_CHAIN,
    GET_RULE,
    GET_TABLE,
    RULE_CHAIN,
    RULE_TABLE,
    TABLE_FAMILIES,
    TABLE_NAME,
    dump,
)
from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import NETLINK_NETFILTER, Attrs, Socket

GET_SET, GET_ELEMENT = 10, 13
TABLE_FLAGS = 2
CHAIN_TYPE = 7
RULE_EXPRESSIONS, RULE_USERDATA = 4, 7
SET_TABLE, SET_NAME, SET_FLAGS, SET_KEY_TYPE, SET_KEY_LENGTH = 1, 2, 3, 4, 5
SET_DATA_TYPE, SET_DATA_LENGTH, SET_DESCRIPTION, SET_TIMEOUT = 6, 7, 9, 11
ELEMENTS_TABLE, ELEMENTS_SET, ELEMENTS_LIST = 1, 2, 3
FAMILY_NUMBERS = {name: number for number, name in TABLE_FAMILIES.items()}
FILLED_BY_PACKETS = 0x20
"""NFT_SET_EVAL: packets add elements to the set."""

COVERED = {
    GET_TABLE: (TABLE_NAME, (TABLE_NAME, TABLE_FLAGS)),
    GET_CHAIN: (CHAIN_TABLE, (CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE)),
    GET_RULE: (RULE_TABLE, (RULE_CHAIN, RULE_EXPRESSIONS, RULE_USERDATA)),
    GET_SET: (
        SET_TABLE,
        (
            *(SET_NAME, SET_FLAGS, SET_KEY_TYPE, SET_KEY_LENGTH),
            *(SET_DATA_TYPE, SET_DATA_LENGTH, SET_DESCRIPTION, SET_TIMEOUT),
        ),
    ),
}
"""Objects by their request: the attribute with their table's name, and what is covered."""


def digest(table: str, *others: str) -> str:
    """Return a digest of tables of the caller's namespace, "family name" each.

    "" without the first table; the others may be missing.  Raises OSError where the kernel does
    not tell.
    """
    made = hashlib.sha256()
    with Socket(NETLINK_NETFILTER) as session:
        for each in (table, *others):
            word, _, name = each.partition(" ")
            parts = _content(session, FAMILY_NUMBERS[word], name.encode())
            if each == table and not parts:
                return ""
            for part in parts:
                made.update(len(part).to_bytes(4, "big") + part)
    return made.hexdigest()


def _content(session: Socket, family: int, table: bytes) -> list[bytes]:
    """Return the covered octets of a table; none where the table is missing."""
    try:
        heads = [_covered(GET_TABLE, each) for each in _objects(session, GET_TABLE, family, table)]
        # The kernel has an error for the sets of a table that is missing.
        return [*heads, *_inside(session, family, table)] if heads else []
    except FileNotFoundError:
        # Another program has deleted the table, or a set, in between.
        return []


def _inside(session: Socket, family: int, table: bytes) -> Iterator[bytes]:
    for kind in (GET_CHAIN, GET_RULE):
        yield from (_covered(kind, each) for each in _objects(session, kind, family, table))
    for each in _objects(session, GET_SET, family, table):
        yield _covered(GET_SET, each)
        if not int.from_bytes(each.get(SET_FLAGS) or b"", "big") & FILLED_BY_PACKETS:
            yield from _elements(session, family, table, each.get(SET_NAME) or b"")


def _covered(kind: int, attributes: Attrs) -> bytes:
    return repr([kind, *map(attributes.get, COVERED[kind][1])]).encode()


def _objects(session: Socket, kind: int, family: int, table: bytes) -> Iterator[Attrs]:
    parent, _ = COVERED[kind]
    # The kernel selects rules and sets by their table, but neither tables nor chains.
    asked = netlink.pack([(parent, table + b"\0")]) if kind in (GET_RULE, GET_SET) else b""
    for found, body in dump(session, kind, family, asked):
        attributes = Attrs.parse(body)
        if (found, nfnetlink.text(attributes, parent)) == (family, table):
            yield attributes


def _elements(session: Socket, family: int, table: bytes, name: bytes) -> list[bytes]:
    asked = netlink.pack([(ELEMENTS_TABLE, table + b"\0"), (ELEMENTS_SET, name)])
    return sorted(
        element
        for _, body in dump(session, GET_ELEMENT, family, asked)
        for _, element in Attrs.parse(body).nested(ELEMENTS_LIST)
    )
