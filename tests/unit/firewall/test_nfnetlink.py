# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's nftables messages, as far as they are read."""

import struct
from collections.abc import Iterator

import pytest

from libvirt_natns.firewall import nfnetlink
from libvirt_natns.firewall.nfnetlink import (
    CHAIN_HANDLE,
    CHAIN_HOOK,
    CHAIN_NAME,
    CHAIN_TABLE,
    GET_CHAIN,
    GET_RULE,
    GET_TABLE,
    HOOK_NUMBER,
    NF_INET_FORWARD,
    RULE_CHAIN,
    RULE_HANDLE,
    RULE_TABLE,
    TABLE_NAME,
)
from libvirt_natns.kernel.netlink import Socket

INET, IPV4, ARP, BRIDGE = 1, 2, 3, 7


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def chain(table: bytes, name: bytes, handle: int = 1, hook: int | None = None) -> bytes:
    body = attribute(CHAIN_TABLE, table + b"\0") + attribute(CHAIN_NAME, name + b"\0")
    body += attribute(CHAIN_HANDLE, struct.pack("!Q", handle))
    if hook is not None:
        body += attribute(CHAIN_HOOK, attribute(HOOK_NUMBER, struct.pack("!I", hook)))
    return body


def rule(table: bytes, name: bytes, handle: int, what: bytes = b"") -> bytes:
    body = attribute(RULE_TABLE, table + b"\0") + attribute(RULE_CHAIN, name + b"\0")
    return body + attribute(RULE_HANDLE, struct.pack("!Q", handle)) + attribute(9, what)


class World:
    """What the kernel would list: families and bodies."""

    def __init__(self) -> None:
        self.chains = [
            (INET, chain(b"natns", b"raw")),
            (IPV4, chain(b"filter", b"FORWARD", hook=NF_INET_FORWARD)),
            (IPV4, chain(b"filter", b"LIBVIRT_FWX")),
        ]
        self.rules = [
            (INET, rule(b"natns", b"raw", 1, b"notrack")),
            (IPV4, rule(b"filter", b"FORWARD", 5, b"packets 7")),
            (IPV4, rule(b"filter", b"LIBVIRT_FWX", 6)),
        ]
        self.tables = [
            (family, attribute(TABLE_NAME, name + b"\0"))
            for family, name in ((INET, b"natns"), (ARP, b"natns"), (BRIDGE, b"x"), (IPV4, b"\xff"))
        ]

    def dump(
        self, session: Socket, what: int, family: int = 0, attributes: bytes = b""
    ) -> Iterator[tuple[int, bytes]]:
        """A kernel that hands out everything, whatever it is asked for."""
        held = {GET_TABLE: self.tables, GET_CHAIN: self.chains, GET_RULE: self.rules}
        yield from held[what]

    def seen(self) -> str:
        return nfnetlink.fingerprint("inet natns", "NATNS-FORWARD")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(nfnetlink, "dump", made.dump)
    return made


def test_nothing_of_others_counts_but_where_they_look_first(world: World) -> None:
    before = world.seen()
    assert before
    world.rules[1] = (IPV4, rule(b"filter", b"FORWARD", 5, b"packets 8"))
    world.rules[2] = (IPV4, rule(b"filter", b"LIBVIRT_FWX", 77))
    world.chains.append((IPV4, chain(b"filter", b"LIBVIRT_FWI")))
    assert world.seen() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.rules.__setitem__(0, (INET, rule(b"natns", b"raw", 1, b"accept"))),
        lambda w: w.rules.pop(0),
        lambda w: w.chains.pop(0),
        lambda w: w.rules.append((IPV4, rule(b"filter", b"FORWARD", 9))),
        lambda w: w.chains.append((INET, chain(b"docker", b"f", hook=NF_INET_FORWARD))),
        lambda w: w.chains.append((IPV4, chain(b"filter", b"NATNS-FORWARD"))),
    ],
)
def test_what_concerns_us_changes_the_fingerprint(world: World, change: object) -> None:
    before = world.seen()
    assert callable(change)
    change(world)
    assert world.seen() != before


def test_tables_that_have_our_chain(world: World) -> None:
    assert nfnetlink.parents("NATNS-FORWARD") == []
    world.chains.append((IPV4, chain(b"filter", b"NATNS-FORWARD")))
    assert nfnetlink.parents("NATNS-FORWARD") == ["ip filter"]


def test_tables_that_exist(world: World) -> None:
    assert nfnetlink.tables() == {"inet natns", "arp natns", "ip \ufffd"}


def test_a_kernel_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Iterator[tuple[int, bytes]]:
        raise OSError("no such subsystem")

    monkeypatch.setattr(nfnetlink, "dump", refuse)
    assert nfnetlink.fingerprint("inet natns", "NATNS-FORWARD") == ""
    assert nfnetlink.parents("NATNS-FORWARD") == []
    assert nfnetlink.tables() is None
    assert not nfnetlink.works()
