# SPDX-License-Identifier: LGPL-2.1-or-later
"""Daemons of a network's namespace: dnsmasq with its files, and the DHCP client."""

from collections.abc import Collection

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES, Address, Family
from libvirt_natns.daemons import (
    dns_relay,
    dnsmasq,
    dnsmasq_config,
    dnsmasq_files,
    libvirt_dnsmasq,
    resolv_conf,
)
from libvirt_natns.daemons.dnsmasq_config import Advertised
from libvirt_natns.daemons.resolv_conf import Resolvers
from libvirt_natns.engine.facts.outside import families_of
from libvirt_natns.engine.facts.routed_nics import routed_nics
from libvirt_natns.engine.publication.dhcp_hosts import ranges_of
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import DhcpSegment, Segment
from libvirt_natns.model.transit_segment import RELAY_PORT, HostSegment
from libvirt_natns.model.upstream import Outside
from libvirt_natns.operations.daemon_operations import Leasing
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import dhcp


def resolvers_of(segment: Segment, families: Collection[Family]) -> Resolvers:
    """Return the resolvers of namespaces on an upstream: its own, else the host's.

    On a transit bridge of the host, the host's DNS relay asks the host's resolvers, unless
    it has a complaint.  ``families`` are the families in which the namespaces reach resolvers.
    """
    servers = tuple(server for server in segment.dns if server.version in families)
    if servers:
        return Resolvers(servers)
    if isinstance(segment, HostSegment) and segment.has_relay:
        gateways = (gateway.ip for gateway in segment.transit_gateways)
        relay = tuple(gateway for gateway in gateways if gateway.version in families)[:1]
        if relay and not dns_relay.complaint(segment.bridge):
            return Resolvers(relay, port=RELAY_PORT)
    return resolv_conf.host_resolvers(families=families)


def leasing(store: Store, network: Network, segment: Segment) -> Leasing | None:
    """Return a network's DHCP client as a part of its plan, if its upstream has one."""
    return client_of(store, network, segment) if isinstance(segment, DhcpSegment) else None


def client_of(store: Store, network: Network, segment: DhcpSegment) -> Leasing:
    """Return a network's DHCP client as a part of its plan."""
    return Leasing(dhcp.client(network, segment), dhcp.requested(store, network, segment))


def dnsmasq_of(
    store: Store,
    config: Config,
    network: Network,
    segment: Segment,
    outside: Outside,
    mtu: int | None,
) -> dnsmasq.Daemon:
    """Return the dnsmasq of a network's namespace; ``mtu`` is the MTU to announce to guests."""
    files = None
    if network.needs_dnsmasq:
        routed = routed_nics(store, config, network)
        # Router advertisements go to all guests alike.
        router6 = 6 in families_of(outside) and routed.others
        advertised = Advertised(outside.proxied, router6, routed)
        servers = resolvers_of(segment, families_of(outside))
        files = _files(store, network, servers, mtu, advertised)
    namespace = names.namespace(network.name)
    return dnsmasq.Daemon(network.uuid, namespace, network.bridge, files)


def _files(
    store: Store, network: Network, servers: Resolvers, mtu: int | None, advertised: Advertised
) -> dnsmasq_files.Files:
    taken_over = network.taken_over and network.has_dnsmasq
    libvirts = libvirt_dnsmasq.read(network.name) if taken_over else None
    kept = [pair for family in FAMILIES for pair in _reserved(store, network, family)]
    return dnsmasq_config.make(network, libvirts, servers, mtu, kept, advertised)


def _reserved(store: Store, network: Network, family: Family) -> Collection[tuple[str, Address]]:
    """Return guests' addresses that DHCP must keep for them, with the guests' MACs."""
    # At least half is left to guests that publish nothing, unless running guests that
    # publish something need more.
    half = sum(span.size for span in ranges_of(network, family)) // 2
    return store.reservations.for_dhcp(network.uuid, half, family).items()
