# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether an upstream's bridge takes one more network."""

from ipaddress import IPv4Network
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.segment import BridgeSegment, Segment
from libvirt_natns.model.upstream import BridgeUpstream, HostUpstream
from libvirt_natns.upstream import attach_checks, transit

SUBNET = IPv4Network("198.19.252.0/22")
TRANSIT = transit.complete(HostUpstream(name="host"), SUBNET, None)
PROVIDER = BridgeSegment.of(BridgeUpstream(name="provider", bridge="br0", subnet=SUBNET))


def machine(*, up: bool, kind: str = "bridge") -> Kernel:
    """Return a machine with one bridge."""
    link = SimpleNamespace(up=up, kind=kind)
    view = SimpleNamespace(
        links=SimpleNamespace(get=lambda _: link),
        bridges=SimpleNamespace(port_count=lambda _: 0),
    )
    return cast("Kernel", SimpleNamespace(at=lambda _: view, host=view))


@pytest.mark.parametrize(("segment", "refused"), [(TRANSIT, False), (PROVIDER, True)])
def test_only_a_bridge_of_others_must_be_up(segment: Segment, refused: bool) -> None:
    """A start sets the host's own transit bridge up."""
    found = attach_checks.problem(machine(up=False), segment)
    assert (found is not None) is refused
    assert attach_checks.problem(machine(up=True), segment) is None


@pytest.mark.parametrize("segment", [TRANSIT, PROVIDER])
def test_a_link_that_is_no_bridge_is_refused(segment: Segment) -> None:
    assert attach_checks.problem(machine(up=False, kind="dummy"), segment)
