# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's plan for an upstream of kind "host"."""

from collections.abc import Iterable

from libvirt_natns.engine.host.libvirt_status import isolated_bridges
from libvirt_natns.engine.plan.transit_bridge import transit
from libvirt_natns.firewall import host_policy
from libvirt_natns.kernel.policy_rules import MarkRule
from libvirt_natns.kernel.routes import family_of
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.transit_segment import HostSegment
from libvirt_natns.operations.operation import Plan
from libvirt_natns.operations.rule_operations import MarkRules


def plan_of(
    kernel: Kernel, segment: HostSegment, private: Iterable[host_policy.Private] = ()
) -> Plan:
    """Return the host's part of a transit bridge.

    ``private`` are the networks' own bridges.  The bridge of a network that starts still
    has its address in the host.
    """
    links = kernel.host.routes.links() - {"lo", segment.bridge, *(each.bridge for each in private)}
    closed = [link for link in links if kernel.host.sysctls.get(forwarding_of(link)) != "1"]
    if any(map(kernel.host.links.is_bridge, closed)):
        # The look is late because libvirt has a file for each network.
        links -= isolated_bridges()
    rules = (
        MarkRule(family_of(each.network), each.priority, segment.bridge, mark, each.table)
        for mark, each in kernel.host.policy_rules.by_mark()
    )
    return (*transit(segment, sorted(links)), MarkRules(segment.bridge, tuple(rules)))


def forwarding_of(link: str) -> str:
    """Return the sysctl by which the host forwards packets that come in by a link."""
    return f"net/ipv4/conf/{link}/forwarding"
