# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a packet of neighbour discovery says about an address."""

import struct
from ipaddress import IPv6Address

import pytest

from libvirt_natns.kernel import ndp

OWN = bytes.fromhex("0a0000000001")
OTHER = bytes.fromhex("525400000002")
A = IPv6Address("2001:db8:77::12:3456")
B = IPv6Address("2001:db8:77::2")
NOBODY = IPv6Address("::")


def packet(
    mac: bytes, source: IPv6Address, kind: int, target: IPv6Address, hops: int = 255
) -> bytes:
    ethernet = bytes.fromhex("333300000001") + mac + bytes.fromhex("86dd")
    header = struct.pack("!IHBB", 6 << 28, 24, 58, hops) + source.packed + bytes(16)
    return ethernet + header + struct.pack("!BBHI", kind, 0, 0, 0) + target.packed


def summed(frame: bytes) -> int:
    """What a receiver computes of a frame's addresses, length and message: 0xFFFF if right."""
    message = frame[54:]
    data = frame[22:54] + struct.pack("!II", len(message), 58) + message
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_question_as_bytes() -> None:
    """RFC 4862, 5.4.2: from no address, to the group that only few listen to, no option."""
    frame = ndp.question(OWN, A)
    assert frame[:14].hex(":") == "33:33:ff:12:34:56:0a:00:00:00:00:01:86:dd"
    assert frame[18:22].hex() == "00183aff"
    assert frame[22:38] == NOBODY.packed
    assert frame[38:54] == IPv6Address("ff02::1:ff12:3456").packed
    assert (frame[54:56].hex(), frame[58:62].hex()) == ("8700", "00000000")
    assert frame[62:] == A.packed
    assert summed(frame) == 0xFFFF


def test_announcement_as_bytes() -> None:
    """RFC 4861, 7.2.6: to all nodes, not solicited, overriding; and we do route."""
    frame = ndp.announcement(OWN, A)
    assert frame[:12].hex(":") == "33:33:00:00:00:01:0a:00:00:00:00:01"
    assert frame[22:38] == frame[62:78] == A.packed
    assert frame[38:54] == IPv6Address("ff02::1").packed
    assert (frame[54:56].hex(), frame[58:62].hex()) == ("8800", "a0000000")
    assert frame[78:].hex() == "0201" + OWN.hex()
    assert summed(frame) == 0xFFFF


@pytest.mark.parametrize(
    ("frame", "claimed"),
    [
        (packet(OTHER, A, 136, A), A),
        (packet(OTHER, B, 136, A), A),
        # It is about to take the address.
        (packet(OTHER, NOBODY, 135, A), A),
        # It has the address, and asks for somebody else's.
        (packet(OTHER, A, 135, B), A),
        # It only wants to know who has it, as anybody may.
        (packet(OTHER, B, 135, A), None),
        (packet(OWN, NOBODY, 135, A), None),
        (packet(OTHER, B, 136, B), None),
        (packet(OTHER, A, 134, A), None),
        # From behind a router: a forgery.
        (packet(OTHER, A, 136, A, hops=64), None),
        (packet(OTHER, A, 136, A)[:77], None),
        (packet(OTHER, A, 136, A).replace(b"\x86\xdd", b"\x08\x00"), None),
        (b"", None),
    ],
)
def test_who_claims_an_address(frame: bytes, claimed: IPv6Address | None) -> None:
    assert ndp.claimed(frame, OWN, {A}) == claimed


def test_the_kernels_filter_looks_where_the_frame_has_it() -> None:
    frame = ndp.question(OWN, A)
    assert frame[ndp.NEXT_HEADER_AT] == ndp.ICMPV6
    assert frame[ndp.KIND_AT] == ndp.SOLICITATION
    assert len(ndp.FILTER) == 7 * 8
