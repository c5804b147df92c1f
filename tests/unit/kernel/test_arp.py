# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an ARP packet says about an address; that it is sent, system tests see."""

from ipaddress import IPv4Address

import pytest

from libvirt_natns.kernel import arp

OWN = bytes.fromhex("0a0000000001")
OTHER = bytes.fromhex("525400000002")
A = IPv4Address("192.168.0.100")
B = IPv4Address("192.168.0.101")
NOBODY = IPv4Address(0)


def packet(mac: bytes, sender: IPv4Address, target: IPv4Address, operation: int = 1) -> bytes:
    return (
        b"\xff" * 6
        + mac
        + bytes.fromhex("0806 0001 0800 0604")
        + operation.to_bytes(2)
        + mac
        + sender.packed
        + bytes(6)
        + target.packed
    )


def test_probe_as_bytes() -> None:
    """RFC 5227, 1.1: sender address zero, sender hardware address our own."""
    frame = arp.question(OWN, A)
    assert frame.hex(" ", 2) == (
        "ffff ffff ffff 0a00 0000 0001 0806 0001 0800 0604 0001"
        " 0a00 0000 0001 0000 0000 0000 0000 0000 c0a8 0064"
    )


def test_announcement_names_the_address_twice() -> None:
    frame = arp.announcement(OWN, A)
    assert frame[28:32] == frame[38:42] == A.packed


@pytest.mark.parametrize(
    ("frame", "claimed"),
    [
        (packet(OTHER, A, NOBODY, 2), A),
        (packet(OTHER, A, B), A),
        (packet(OTHER, A, A), A),
        # Another station's probe: it is about to take the address.
        (packet(OTHER, NOBODY, A), A),
        (packet(OWN, NOBODY, A), None),
        (packet(OTHER, B, A), None),
        (packet(OTHER, B, NOBODY, 2), None),
        (packet(OTHER, NOBODY, B), None),
        # Padded to Ethernet's least length, as NICs do.
        (packet(OTHER, A, NOBODY, 2) + bytes(18), A),
        (packet(OTHER, A, NOBODY, 2)[:41], None),
        (b"", None),
        (packet(OTHER, A, NOBODY, 2).replace(b"\x08\x06\x00\x01", b"\x08\x00\x00\x01"), None),
        # Another network's addresses, of other lengths.
        (packet(OTHER, A, NOBODY, 2).replace(b"\x00\x01\x08\x00", b"\x00\x20\x08\x00"), None),
        (packet(OTHER, A, NOBODY, 2).replace(b"\x06\x04\x00", b"\x08\x04\x00"), None),
    ],
)
def test_who_claims_an_address(frame: bytes, claimed: IPv4Address | None) -> None:
    assert arp.claimed(frame, OWN, {A}) == claimed
