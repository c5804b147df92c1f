# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks whether an upstream's bridge or NIC can take one more network now.

A namespace is attached by a patch, which becomes a port of a bridge, or by a macvlan
(``attach``).  The parent of a macvlan is a bridge or NIC.  A macvlan takes no port, of which
a bridge has 1023.  But the switch at the other end must accept several MAC addresses.  The
host itself is out of reach: the kernel passes frames of host and macvlans to the wire only.

Known limit: for the same reason, a probe from the host's own end (``arp``) meets no other
macvlan on the same parent.  The resident service announces an address by the macvlan itself,
and meets them.
"""

from libvirt_natns import names
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.bridges import BRIDGE_PORTS
from libvirt_natns.kernel.rtnetlink import Link
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.segment import BridgeSegment, Segment
from libvirt_natns.model.transit_segment import HostSegment, RouterSegment

Problem = tuple[str, str]
"""The fault of a bridge or NIC, and its remedy."""

HARMLESS_MASTER = "vrf"
"""The kind of master that leaves received frames to its link; all others take them."""


def problem(kernel: Kernel, segment: Segment) -> Problem | None:
    """Return why the upstream's bridge or NIC cannot take another network; None if it can."""
    fault = _problem(kernel, segment)
    if fault and isinstance(segment, RouterSegment):
        return fault[0], f"virt-natns router up {segment.name}"
    return fault


def _problem(kernel: Kernel, segment: Segment) -> Problem | None:
    where = segment.namespace
    missing = where is not None and not netns.exists(where)
    link = None if missing else kernel.at(where).links.get(segment.bridge)
    if link is None:
        if isinstance(segment, HostSegment):
            # The first network makes the transit bridge.
            return None
        return "does not exist", f"create it, or fix {names.CONFIG_FILE}"
    if segment.is_macvlan:
        fault = _parents_problem(kernel, segment)
    else:
        fault = _bridges_problem(kernel, segment, link)
    if fault:
        return fault
    # A start repairs the host's own transit bridge, which a kill may have left down.
    if not link.up and not isinstance(segment, HostSegment):
        return "is down", f"set it up (ip link set {segment.bridge} up)"
    return None


def _bridges_problem(kernel: Kernel, segment: Segment, link: Link) -> Problem | None:
    bridge = segment.bridge
    if link.kind != "bridge":
        other = "" if bridge == "lo" else ', or set attach = "macvlan" there'
        return "is not a bridge", f"name a bridge in {names.CONFIG_FILE}{other}"
    if kernel.at(segment.namespace).bridges.port_count(bridge) >= BRIDGE_PORTS:
        other = ', or attach = "macvlan"' if isinstance(segment, BridgeSegment) else ""
        return f"is full with {BRIDGE_PORTS} ports", f"use another bridge{other}"
    return None


def _parents_problem(kernel: Kernel, segment: Segment) -> Problem | None:
    parent = segment.bridge
    if parent == "lo":
        return "is the loopback interface", f"name a NIC or bridge in {names.CONFIG_FILE}"
    master = kernel.host.links.master(parent)
    if master is not None and master.kind != HARMLESS_MASTER:
        remedy = f"name {master.name} in {names.CONFIG_FILE}"
        return f"belongs to {master.kind} {master.name}", remedy
    own = kernel.host.addresses.beyond_link()
    gateway = next((each for each in (segment.gateway, segment.gateway6) if each in own), None)
    if gateway is not None:
        return (
            f"cannot lead to the gateway {gateway}, an address of this host",
            'set attach = "bridge", or name the provider\'s router',
        )
    try:
        # Some kernels have no macvlans, and some links take none.
        kernel.host.macvlans.probe(parent)
    except KernelError as error:
        why = error.remedy or error.fact
        return (
            f"does not accept a macvlan ({why})",
            f"name another NIC in {names.CONFIG_FILE}, or a bridge",
        )
    return None
