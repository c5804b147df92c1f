# SPDX-License-Identifier: LGPL-2.1-or-later
"""How neighbours are asked, in either family; that packets are sent, system tests see."""

import socket
import time
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address

import pytest

from libvirt_natns.addresses import Address
from libvirt_natns.errors import UpstreamError
from libvirt_natns.kernel import address_probe
from libvirt_natns.kernel.address_probe import PROTOCOLS

OWN = bytes.fromhex("0a0000000001")
A = IPv4Address("192.168.0.100")
B = IPv4Address("192.168.0.101")
C = IPv6Address("2001:db8::100")


class Wire(socket.socket):
    """A socket that sends nothing, and keeps in mind what was to be sent."""

    def __init__(self) -> None:
        self.asked: list[Address] = []

    def getsockname(self) -> tuple[object, ...]:
        return ("br0", 0, 0, 1, OWN)

    def send(self, frame: bytes, flags: int = 0) -> int:  # type: ignore[override]
        address = IPv6Address(frame[62:78]) if len(frame) > 42 else IPv4Address(frame[38:42])
        self.asked.append(address)
        return len(frame)


def ears(*wanted: Address) -> list[address_probe.ProbeSocket]:
    return [
        address_probe.ProbeSocket(
            Wire(), PROTOCOLS[version], {each for each in wanted if each.version == version}
        )
        for version in sorted({each.version for each in wanted})
    ]


def asked(each: Collection[address_probe.ProbeSocket]) -> list[Address]:
    found: list[Address] = []
    for ear in each:
        assert isinstance(ear.packet, Wire)
        found += ear.packet.asked
    return found


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[Address, int]:
    """After how many questions an address is claimed."""
    told: dict[Address, int] = {}

    def listen(
        each: Collection[address_probe.ProbeSocket],
        wanted: set[Address],
        deadline: float,
        overtime: float,
    ) -> set[Address]:
        assert deadline - time.monotonic() <= 1
        questions = asked(each)
        return {address for address in wanted if questions.count(address) >= told.get(address, 99)}

    monkeypatch.setattr(address_probe, "listen", listen)
    return told


def test_three_questions_for_each_that_is_silent(answers: dict[Address, int]) -> None:
    answers[A] = 2
    each = ears(A, B, C)
    assert address_probe.ask_all(each, 0.01) == {A}
    assert [asked(each).count(address) for address in (A, B, C)] == [2, 3, 3]


def test_no_more_questions_once_all_have_answered(answers: dict[Address, int]) -> None:
    answers.update({A: 1, C: 1})
    each = ears(A, C)
    assert address_probe.ask_all(each, 0.01) == {A, C}
    assert len(asked(each)) == 2


def test_nobody_is_asked_for_nothing() -> None:
    assert address_probe.probe("nosuchlink", [], 0.01) == set()


@pytest.mark.parametrize("address", [A, C])
def test_a_link_that_is_not_there(address: Address) -> None:
    """Also for who may not open the socket at all."""
    with pytest.raises(UpstreamError, match="cannot probe for addresses on nosuchlink"):
        address_probe.probe("nosuchlink", [address], 0.01)
    with pytest.raises(UpstreamError, match=f"cannot announce {address} on nosuchlink"):
        address_probe.announce("nosuchlink", address, "0a:00:00:00:00:01")
