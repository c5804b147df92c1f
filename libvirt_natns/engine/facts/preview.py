# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan of a network that need not exist: nothing is changed, and nothing leased."""

from ipaddress import IPv4Address

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES
from libvirt_natns.daemons import dnsmasq, dnsmasq_files
from libvirt_natns.engine.facts.host_needs import needs_of
from libvirt_natns.engine.facts.mtu import ETHERNET_MTU, private_mtu, upstream_mtu, usual_mtu
from libvirt_natns.engine.facts.outside import completed_by, in_force, outside_of
from libvirt_natns.engine.facts.planner import Planner
from libvirt_natns.engine.facts.services import leasing
from libvirt_natns.engine.host import ipv6 as host_ipv6
from libvirt_natns.engine.host.forwarding import plan_of
from libvirt_natns.engine.operations.operation import Plan
from libvirt_natns.engine.plan.network import make
from libvirt_natns.engine.plan.surroundings import Surroundings
from libvirt_natns.model.network import Network
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import replace
from libvirt_natns.state import applicants, pool
from libvirt_natns.state.host_records import User
from libvirt_natns.state.leases import Leased
from libvirt_natns.upstream import dhcp, routers, selection, transit


def preview(planner: Planner, network: Network) -> Plan:
    """Return the plan of a network that need not exist, with the host's part ahead of it."""
    upstream = _upstream(planner, network)
    selection.check_addresses(network, upstream)
    leased = _leases(planner, network, upstream)
    outside, network = (
        in_force(outside_of(network, upstream, leased)),
        completed_by(network, upstream, leased),
    )
    # The files that libvirt will write are not known yet.
    files = dnsmasq_files.Files("") if network.needs_dnsmasq else None
    namespace = names.namespace(network.name)
    daemon = dnsmasq.Daemon(network.uuid, namespace, network.bridge or "", files)
    private = private_mtu(planner.kernel, network) or usual_mtu(network)
    around = Surroundings(
        private.patch,
        upstream_mtu(planner.kernel, upstream) or ETHERNET_MTU,
        planner.backend(),
        daemon,
        carried=private.limit,
        leasing=leasing(planner.store, network, upstream),
    )
    subnets = tuple(subnet.network for subnet in network.subnets)
    user = User(network.uuid, network.bridge or "", upstream.name, subnets, leased)
    needs = needs_of(planner, user, upstream, [], [])
    shared = (
        *plan_of(planner.kernel, upstream),
        *host_ipv6.plan_of(planner.kernel, needs),
    )
    return (*shared, *make(network, upstream, outside, around))


def _leases(planner: Planner, network: Network, upstream: Upstream) -> Leased:
    """Return the leases that a network has, or would get next."""
    leased = planner.store.leases.of(upstream.name, network.uuid)
    own = planner.kernel.host.addresses.beyond_link()
    for family in FAMILIES:
        if not selection.leases_address(network, upstream, family):
            continue
        if upstream.by_dhcp and family == 4:
            # Only the DHCP server knows the address that it would lease.
            leased = replace(leased, address=upstream.leased)
            continue
        who = applicants.applicant(network, family)
        if pool.leased(planner.store, who, upstream) is None:
            address = pool.next_address(planner.store, who, upstream, own)
            if isinstance(address, IPv4Address):
                leased = replace(leased, address=address)
            else:
                leased = replace(leased, address6=address)
    if selection.leases_prefix(network, upstream) and leased.prefix is None:
        who = applicants.applicant(network)
        prefix = selection.wanted_prefix(network, upstream)
        next_prefix = prefix or pool.next_prefix(planner.store, who, upstream, own)
        leased = replace(leased, prefix=next_prefix)
    return leased


def _upstream(planner: Planner, network: Network) -> Upstream:
    upstream = selection.upstream_of(network, planner.config)
    if upstream.by_dhcp:
        return dhcp.complete(network, upstream)
    if upstream.kind == "router":
        return routers.complete(upstream)
    if upstream.kind != "host":
        return upstream
    subnet = upstream.subnet or planner.store.transit.subnet(upstream.name)
    if subnet is None:
        subnet = transit.free(planner.kernel, network, upstream)[0]
    subnet6 = None
    if transit.needs_ipv6(planner.kernel, network):
        subnet6 = planner.store.transit.prefix(upstream.name) or transit.free6(network)
    return transit.complete(upstream, subnet, subnet6)
