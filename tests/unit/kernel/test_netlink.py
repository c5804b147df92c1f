# SPDX-License-Identifier: LGPL-2.1-or-later
"""The netlink codec: attributes survive it octet by octet, whatever they are."""

import struct
import sys

import pytest

from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.netlink import NLA_NESTED, Attrs

LISTED = [
    (3, b"ens3\0"),
    (4, b"\xdc\x05\0\0"),
    (52 | NLA_NESTED, bytes(8)),
    (9999, b"abc"),
    (3, b""),
]


def test_unknown_and_repeated_attributes_are_packed_as_they_came() -> None:
    octets = bytes(16) + netlink.pack(LISTED)
    attributes = Attrs.parse(octets, 16)
    assert list(attributes) == LISTED
    assert attributes.pack() == octets[16:]
    assert list(attributes.without(3, 52)) == [LISTED[1], LISTED[3]]


def test_values_by_type() -> None:
    attributes = Attrs(LISTED)
    assert (attributes.text(3), attributes.text(77)) == ("ens3", "")
    assert (attributes.number(77), attributes.get(52)) == (None, bytes(8))
    assert attributes.number(4) == int.from_bytes(LISTED[1][1], sys.byteorder)
    inner = [netlink.u32(1, 7)]
    assert Attrs([(5, netlink.pack(inner))]).nested(5).number(1) == 7
    assert list(attributes.nested(77)) == []


@pytest.mark.parametrize("rest", [b"\1", b"\0\0\0\0", b"\3\0\1\0\0\0\0\0"])
def test_attributes_end_where_a_length_makes_no_sense(rest: bytes) -> None:
    assert list(Attrs.parse(netlink.pack(LISTED) + rest)) == LISTED


def test_messages_of_a_packet() -> None:
    first = struct.pack("=IHHII", 19, 16, 2, 5, 0) + b"abc\0"
    second = struct.pack("=IHHII", 16, 3, 0, 6, 0)
    assert list(netlink.messages(first + second)) == [(16, 2, 5, b"abc"), (3, 0, 6, b"")]
    assert list(netlink.messages(first + bytes(16))) == [(16, 2, 5, b"abc")]


def test_a_refusal_has_the_kernels_reason() -> None:
    with netlink.Socket() as opened:
        assert opened.get(netlink.RTM_GETLINK, bytes(16) + netlink.pack([(3, b"absent\0")])) is None
        with pytest.raises(OSError, match=r"Operation not permitted|No such device"):
            opened.change(netlink.RTM_NEWLINK, netlink.change_link(1 << 30))
