# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which flows end with what is published no more, and by what name the kernel deletes them."""

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import conntrack
from libvirt_natns.model.publication import Forward, StaticNat

NETWORK, OWN = IPv4Address("192.168.0.150"), IPv4Address("192.168.0.151")
GUEST, OTHER, CLIENT = (IPv4Address(f"10.0.0.{number}") for number in (5, 6, 77))
GRE, UDP_LITE, ICMP = 47, 136, 1


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def direction(kind: int, source: IPv4Address, target: IPv4Address, proto: bytes) -> bytes:
    pair = attribute(1, source.packed) + attribute(2, target.packed)
    return attribute(kind | 0x8000, attribute(0x8001, pair) + attribute(0x8002, proto))


def flow(
    protocol: int, asked: IPv4Address, port: int | None, answering: IPv4Address, number: int = 1
) -> bytes:
    """An entry as the kernel lists it, of a client outside."""
    proto = attribute(1, bytes([protocol]))
    if port is not None:
        proto += attribute(2, struct.pack("!H", 5000)) + attribute(3, struct.pack("!H", port))
    return (
        direction(1, CLIENT, asked, proto)
        + direction(2, answering, CLIENT, proto)
        + attribute(3, bytes(4))
        + attribute(12, struct.pack("!I", number))
        + attribute(18, struct.pack("!H", 3))
    )


class Kernel:
    """Lists ``flows``, and refuses to delete those with a ``refused`` id."""

    def __init__(self, *flows: bytes) -> None:
        self.flows = list(flows)
        self.refused: dict[int, int] = {}
        self.deleted: list[bytes] = []
        self.filters: list[bytes] = []
        self.filtering = True
        self._answer = b""
        self._number = 0

    def settimeout(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass

    def send(self, data: bytes) -> None:
        kind, flags, self._number = struct.unpack_from("=HHI", data, 4)
        if kind == 0x101 and len(data) > 20 and not self.filtering:
            self._answer = self._message(2, struct.pack("=i", -errno.EINVAL) + data[:16])
            return
        if kind == 0x101:
            self.filters.append(data[20:])
            self._answer = b"".join(self._message(kind, bytes(4) + each) for each in self.flows)
            self._answer += self._message(3, bytes(4))
            return
        assert (kind, flags) == (0x102, 0x5)
        self.deleted.append(data[20:])
        number = next(n for n in range(1, 100) if attribute(12, struct.pack("!I", n)) in data)
        code = self.refused.get(number, 0)
        self._answer = self._message(2, struct.pack("=i", -code) + data[:16])

    def recv(self, size: int) -> bytes:
        return self._answer

    def _message(self, kind: int, body: bytes) -> bytes:
        return struct.pack("=IHHII", 16 + len(body), kind, 0, self._number, 0) + body


def cut(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, *claims: Forward | StaticNat
) -> list[bytes]:
    @contextmanager
    def entered(name: str | None) -> Iterator[None]:
        yield

    with monkeypatch.context() as patch:
        patch.setattr("libvirt_natns.kernel.netns.entered", entered)
        patch.setattr(socket, "socket", lambda *arguments: kernel)
        conntrack.cut("nat-a", claims, NETWORK)
    return kernel.deleted


def name(entry: bytes) -> bytes:
    """What is left of an entry when only the naming attributes are."""
    size = struct.unpack_from("=H", entry)[0]
    return entry[:size] + entry[-16:]


SCTP_FORWARD = Forward("web", "guest web", "a", "sctp", NETWORK, 36412, 36412, GUEST, 22, 22)
STATIC = StaticNat("web", "guest web", "a", OWN, GUEST)


def test_ports_of_sctp(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = flow(socket.IPPROTO_SCTP, NETWORK, 36412, GUEST)
    others = (
        flow(socket.IPPROTO_SCTP, NETWORK, 36413, GUEST, 2),
        flow(socket.IPPROTO_SCTP, NETWORK, 36412, OTHER, 3),
        flow(socket.IPPROTO_SCTP, OWN, 36412, GUEST, 4),
        flow(socket.IPPROTO_TCP, NETWORK, 36412, GUEST, 5),
    )
    assert cut(monkeypatch, Kernel(mine, *others), SCTP_FORWARD) == [name(mine)]


def test_all_flows_of_an_address_by_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protocol's key, which we do not know, is part of it, and so are zone and id."""
    flows = [
        flow(GRE, OWN, 7, GUEST, 1),
        flow(UDP_LITE, OWN, 53, GUEST, 2),
        flow(ICMP, OWN, None, GUEST, 3),
    ]
    other = flow(GRE, NETWORK, 7, NETWORK, 4)
    assert cut(monkeypatch, Kernel(*flows, other), STATIC) == list(map(name, flows))


def test_an_error_keeps_no_other_flow_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(*(flow(GRE, OWN, number, GUEST, number) for number in range(1, 5)))
    kernel.refused = {1: errno.ENOENT, 2: errno.EINVAL, 3: errno.EPERM}
    with pytest.raises(
        KernelError, match="cannot delete conntrack entries in nat-a: Invalid argument"
    ):
        cut(monkeypatch, kernel, STATIC)
    assert len(kernel.deleted) == 4


def test_flow_that_has_ended_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(flow(GRE, OWN, 1, GUEST))
    kernel.refused = {1: errno.ENOENT}
    assert len(cut(monkeypatch, kernel, STATIC)) == 1


def test_the_kernel_filters_by_address_and_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(flow(socket.IPPROTO_SCTP, NETWORK, 36412, GUEST))
    assert len(cut(monkeypatch, kernel, SCTP_FORWARD, SCTP_FORWARD)) == 1
    source = attribute(0x8001, attribute(1, GUEST.packed))
    sctp = attribute(0x8002, attribute(1, bytes([socket.IPPROTO_SCTP])))
    flags = attribute(2, struct.pack("=I", 1 << 0 | 1 << 3))
    assert kernel.filters == [attribute(0x8002, source + sctp) + attribute(0x8000 | 25, flags)]


def test_both_directions_of_a_guests_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(flow(GRE, OWN, 7, GUEST))
    # Both filters find the flow, which is deleted once.
    assert len(cut(monkeypatch, kernel, STATIC)) == 1
    flags = [filtered[-8:] for filtered in kernel.filters]
    assert flags == [attribute(kind, struct.pack("=I", 1 << 1)) for kind in (1, 2)]


def test_a_kernel_that_does_not_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(flow(socket.IPPROTO_SCTP, NETWORK, 36412, GUEST))
    kernel.filtering = False
    assert len(cut(monkeypatch, kernel, SCTP_FORWARD)) == 1
    assert kernel.filters == [b""]


def test_many_claims_are_one_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(flow(socket.IPPROTO_SCTP, NETWORK, 36412, GUEST))
    claims = [replace(SCTP_FORWARD, target=GUEST + number) for number in range(17)]
    assert len(cut(monkeypatch, kernel, *claims)) == 1
    assert kernel.filters == [b""]


def test_no_kernel_is_asked_for_an_address_of_ipv6() -> None:
    """The kernel would hand out all other entries."""
    by_port = conntrack.DumpFilter(6, 1, 1, IPv6Address("2001:db8::5"), socket.IPPROTO_UDP, 53)
    number = attribute(1, bytes([socket.IPPROTO_UDP])) + attribute(3, struct.pack("!H", 53))
    flags = attribute(1, struct.pack("=I", 1 << 3 | 1 << 5))
    proto = attribute(0x8001, attribute(0x8002, number))
    assert by_port.attributes == proto + attribute(0x8000 | 25, flags)
