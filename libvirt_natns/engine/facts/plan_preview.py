# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan of a network that need not exist: nothing is changed, and nothing leased."""

from dataclasses import replace
from ipaddress import IPv4Address

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES
from libvirt_natns.daemons import dnsmasq, dnsmasq_files
from libvirt_natns.engine.facts.host_needs import needs_of
from libvirt_natns.engine.facts.mtu import ETHERNET_MTU, private_mtu, upstream_mtu, usual_mtu
from libvirt_natns.engine.facts.outside import completed_by, in_force, outside_of
from libvirt_natns.engine.facts.planner import Planner
from libvirt_natns.engine.facts.services import leasing
from libvirt_natns.engine.host import ipv6_forwarding as host_ipv6
from libvirt_natns.engine.host.forwarding import plan_of
from libvirt_natns.engine.plan.network_plan import make
from libvirt_natns.engine.plan.surroundings import Surroundings
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import LeasedSegment, Segment
from libvirt_natns.model.upstream import HostUpstream
from libvirt_natns.operations.operation import Plan
from libvirt_natns.state import applicants, pool
from libvirt_natns.state.host_records import User
from libvirt_natns.state.leases import Leased
from libvirt_natns.upstream import selection, transit


def preview(planner: Planner, network: Network) -> Plan:
    """Return the plan of a network that need not exist, with the host's part ahead of it."""
    segment = _segment(planner, network)
    selection.check_addresses(network, segment)
    leased = _leases(planner, network, segment)
    outside, network = (
        in_force(outside_of(network, segment, leased)),
        completed_by(network, segment, leased),
    )
    # The files that libvirt will write are not known yet.
    files = dnsmasq_files.Files("") if network.needs_dnsmasq else None
    namespace = names.namespace(network.name)
    daemon = dnsmasq.Daemon(network.uuid, namespace, network.bridge, files)
    private = private_mtu(planner.kernel, network) or usual_mtu(network)
    around = Surroundings(
        private.patch,
        upstream_mtu(planner.kernel, segment) or ETHERNET_MTU,
        planner.backend(),
        daemon,
        carried=private.limit,
        leasing=leasing(planner.store, network, segment),
    )
    subnets = tuple(subnet.network for subnet in network.subnets)
    user = User(network.uuid, network.bridge, segment.name, subnets, leased)
    needs = needs_of(planner, user, segment, [], [])
    shared = (
        *(each for bridge in needs.transits for each in plan_of(planner.kernel, bridge)),
        *host_ipv6.plan_of(planner.kernel, needs),
    )
    return (*shared, *make(network, segment, outside, around))


def _leases(planner: Planner, network: Network, segment: Segment) -> Leased:
    """Return the leases that a network has, or would get next."""
    leased = planner.store.leases.of(segment.name, network.uuid)
    own = planner.kernel.host.addresses.beyond_link()
    for family in FAMILIES:
        if not selection.leases_address(network, segment, family):
            continue
        if segment.side(family).by_dhcp:
            # Only the DHCP server knows the address that it would lease.
            address4 = segment.leased if isinstance(segment, LeasedSegment) else None
            leased = replace(leased, address=address4)
            continue
        who = applicants.applicant(network, family)
        if pool.leased(planner.store, who, segment) is None:
            address = pool.next_address(planner.store, who, segment, own)
            if isinstance(address, IPv4Address):
                leased = replace(leased, address=address)
            else:
                leased = replace(leased, address6=address)
    if selection.leases_prefix(network, segment) and leased.prefix is None:
        who = applicants.applicant(network)
        prefix = selection.wanted_prefix(network, segment)
        next_prefix = prefix or pool.next_prefix(planner.store, who, segment, own)
        leased = replace(leased, prefix=next_prefix)
    return leased


def _segment(planner: Planner, network: Network) -> Segment:
    upstream = selection.upstream_of(network, planner.config)
    if isinstance(upstream, HostUpstream):
        return transit.preview(planner.kernel, planner.store, network, upstream)
    return planner.segment(network)
