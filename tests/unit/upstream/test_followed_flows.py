# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks behind a transit bridge with flows that conntrack's helpers follow."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest

from libvirt_natns.firewall import helper_trial
from libvirt_natns.firewall.host_policy import Followed
from libvirt_natns.model.upstream import Helper, HostUpstream
from libvirt_natns.state.host_records import User
from libvirt_natns.state.leases import Leased
from libvirt_natns.upstream import followed_flows

UUID = "5ba23c87-0000-4000-8000-000000000001"
LEASED = Leased(IPv4Address("192.168.158.2"), IPv6Address("fd00:158::2"))


def document(attribute: str) -> bytes:
    return (
        f"<network><name>a</name><uuid>{UUID}</uuid><metadata>"
        f"<natns:nat xmlns:natns='urn:libvirt-natns:1' {attribute}/></metadata>"
        "<bridge name='virbr1'/><ip address='10.0.0.1' prefix='24'/></network>"
    ).encode()


@pytest.mark.parametrize(
    ("configured", "xml", "expected"),
    [
        ((), b"", ()),
        (("ftp",), b"", ("ftp",)),
        (("ftp",), document("helpers='tftp'"), ("tftp",)),
        (("ftp",), document("helpers='none'"), ()),
        ((), document("helpers='tftp, ftp'"), ("tftp", "ftp")),
        # The word may stand anywhere in a network's XML.
        (("ftp",), document(""), ("ftp",)),
        (("ftp",), b"<helpers", ("ftp",)),
    ],
)
def test_a_networks_own_helpers_take_precedence(
    configured: tuple[Helper, ...],
    xml: bytes,
    expected: tuple[Helper, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(helper_trial, "present", lambda helpers, _: helpers)
    user = User(UUID, "virbr1", "host", (IPv4Network("10.0.0.0/24"),), LEASED, xml)
    upstream = HostUpstream(name="host", helpers=configured)
    found = followed_flows.of_user(user, upstream, "natns-host", LEASED, lambda: "nftables")
    assert found == tuple(
        Followed("natns-host", address, expected) for address in LEASED.addresses if expected
    )
