# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstreams with addresses of a provider's DHCP server: ``pool = "dhcp"``.

Each network has a client of its own on its upstream link.  Its MAC address and client-id
never change, so the server gives it the same address again.  The lease tells the segment
of the leasing network alone.

Without a lease, the network has a placeholder address (``addresses.PLACEHOLDERS``).  Forwards
on it are in the tables already, and move to the leased address when it is known.
"""

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address

from libvirt_natns import names
from libvirt_natns.addresses import PLACEHOLDERS, Address, IPNetwork, is_placeholder
from libvirt_natns.daemons import dhcp_lease, lease_check, resolv_conf, udhcpc
from libvirt_natns.daemons.dhcp_lease import DhcpLease
from libvirt_natns.daemons.udhcpc import Client
from libvirt_natns.errors import LeaseError, NatnsError
from libvirt_natns.kernel.boot_clock import now
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import DhcpSegment, LeasedSegment, Segment
from libvirt_natns.model.upstream import DhcpUpstream
from libvirt_natns.state import applicants
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import accepted_leases, selection
from libvirt_natns.values import quoted

FOLLOW = "from libvirt_natns.hook import on_lease; sys.exit(on_lease(sys.argv[1]))"
"""Python code that the client's script runs when the lease has changed."""


# -- the lease ---------------------------------------------------------------


def complete(network: Network, upstream: DhcpUpstream) -> DhcpSegment:
    """Return the segment, as a network's lease tells it where there is a usable lease.

    A running network keeps its last usable lease when a renewal cannot be used.
    """
    lease = held(network.uuid)
    if lease is None and not accepted_leases.was_refused(network.uuid):
        return DhcpSegment.of(upstream)
    if lease is not None and problem(network, upstream, lease) is None:
        return completed(upstream, _bounded(network, lease).lease)
    earlier = accepted_leases.last(network.uuid, lease)
    if earlier is None or problem(network, upstream, earlier) is not None:
        return DhcpSegment.of(upstream)
    return completed(upstream, _bounded(network, earlier).lease)


def _private(network: Network) -> list[IPNetwork]:
    """Return the prefixes on the network's own side, which no lease can have."""
    routed = (route.destination for route in network.routes)
    return [*(subnet.network for subnet in network.subnets), *routed]


def _bounded(network: Network, lease: DhcpLease) -> lease_check.Checked:
    return lease_check.bounded(lease, _private(network))


def cuts(network: Network, upstream: DhcpUpstream) -> list[str]:
    """Return in words the values of a network's lease that are not used."""
    lease = held(network.uuid)
    if lease is None:
        return []
    if found := problem(network, upstream, lease):
        return [str(found)]
    return list(lease_check.said(_bounded(network, lease).cuts))


def news(network: Network, segment: DhcpSegment) -> list[str]:
    """Return ``cuts`` for the log, once after each change of them."""
    return accepted_leases.tell_once(network.uuid, cuts(network, segment.upstream))


def held(uuid: str) -> DhcpLease | None:
    """Return the lease that a network's client has."""
    return dhcp_lease.read(names.dhcp_directory(uuid))


def completed(upstream: DhcpUpstream, lease: DhcpLease) -> LeasedSegment:
    """Return the segment as a lease tells it; values of the configuration go first."""
    return LeasedSegment(
        upstream=upstream,
        bridge=upstream.bridge,
        subnet=lease.address.network,
        gateway=upstream.gateway or lease.gateway,
        subnet6=upstream.subnet6,
        gateway6=upstream.gateway6,
        pool6=upstream.pool6,
        prefixes6=upstream.prefixes6,
        dns=upstream.dns or lease.dns,
        leased=lease.address.ip,
        mtu=lease.mtu,
        routes=lease.routes,
    )


def problem(network: Network, upstream: DhcpUpstream, lease: DhcpLease) -> NatnsError | None:
    """Return why a network cannot use a lease; None where it can."""
    if upstream.subnet is not None and lease.address.ip not in upstream.subnet:
        return LeaseError(
            f"network {quoted(network.name)}: the DHCP server of upstream {upstream.name} gives"
            f" {lease.address}, which is not in {upstream.subnet}",
            f"correct 'subnet' in [upstreams.{upstream.name}] of {names.CONFIG_FILE}",
        )
    if why := lease_check.refused(lease, ()):
        return LeaseError(
            f"network {quoted(network.name)}: the lease of the DHCP server of upstream"
            f" {upstream.name} is not used: {why}",
            f"fix that server (tcpdump -n -i {upstream.bridge} port 67)",
        )
    segment = completed(upstream, _bounded(network, lease).lease)
    try:
        selection.check_addresses(network, segment)
        selection.check_resolvers(network, segment, _servers(segment))
    except NatnsError as error:
        return error
    return None


def _servers(segment: Segment) -> Sequence[Address]:
    """Return the resolvers that a network's guests depend on."""
    own = [server for server in segment.dns if server.version == 4]
    return own or resolv_conf.host_resolvers().servers


def remaining(uuid: str) -> int | None:
    """Return the seconds for which a network's lease is still valid; None without end or lease."""
    lease = held(uuid)
    return max(0, int(lease.until - now())) if lease and lease.until is not None else None


# -- the client --------------------------------------------------------------


def requested(store: Store, network: Network, segment: DhcpSegment) -> IPv4Address | None:
    """Return the address that a network's client asks for: the wanted one, or the last lease's."""
    wanted = (
        applicants.applicant(network).wanted or store.leases.of(segment.name, network.uuid).address
    )
    return wanted if isinstance(wanted, IPv4Address) and not is_placeholder(wanted) else None


def client(network: Network, segment: DhcpSegment) -> Client:
    """Return a network's own client."""
    return Client(
        namespace=names.namespace(network.name),
        link=names.UPSTREAM_LINK,
        client_id=names.client_id(network.uuid),
        directory=names.dhcp_directory(network.uuid),
        on_change=names.python_command(FOLLOW, network.uuid, options="-IS"),
        probe=min(segment.probe, udhcpc.MAX_PROBE),
    )


def await_lease(network: Network, segment: DhcpSegment) -> None:
    """Wait for a lease as long as the configuration says.

    Raises LeaseError where the network needs a lease and gets none, or cannot use it;
    DhcpError where the client ends.
    """
    upstream = segment.upstream
    lease = udhcpc.await_lease(client(network, segment), upstream.dhcp_timeout)
    if lease is not None:
        found = problem(network, upstream, lease) or _not_wanted(network, upstream, lease)
        if found is not None:
            raise found
    elif upstream.dhcp == "required":
        raise LeaseError(
            f"network {quoted(network.name)}: no DHCP server on bridge {upstream.bridge} of"
            f" upstream {upstream.name} has leased an address within {upstream.dhcp_timeout:g} s",
            "fix the DHCP server, or stop the stations that have the addresses which it offers,"
            f' or set dhcp = "background" in [upstreams.{upstream.name}] of {names.CONFIG_FILE}',
        )


def _not_wanted(network: Network, upstream: DhcpUpstream, lease: DhcpLease) -> NatnsError | None:
    wanted = applicants.applicant(network).wanted
    if wanted in (None, lease.address.ip):
        return None
    return LeaseError(
        f"network {quoted(network.name)}: the DHCP server of upstream {upstream.name} gives"
        f" {lease.address.ip} instead of the wanted address {wanted}",
        f"reserve {wanted} there for {names.mac(network.uuid, names.UPSTREAM_LINK)},"
        " or choose another address in <natns:upstream address='...'/>",
    )


# -- the address -------------------------------------------------------------


def settle(store: Store, network: Network, segment: DhcpSegment) -> IPv4Address:
    """Record the address that a network has leased, or a placeholder address; returns it."""
    lease = held(network.uuid)
    usable = lease is not None and problem(network, segment.upstream, lease) is None
    accepted_leases.note(network.uuid, lease, usable=usable)
    if isinstance(segment, LeasedSegment) and _take(store, network, segment, segment.leased):
        return segment.leased
    present = store.leases.of(segment.name, network.uuid).address
    if present is not None and is_placeholder(present):
        return present
    return next(each for each in stand_ins(network.uuid) if _take(store, network, segment, each))


def settle_first(store: Store, network: Network, segment: DhcpSegment) -> IPv4Address:
    """Record the address of a network that starts; returns it.

    Raises LeaseError where another network has the leased address.
    """
    address = settle(store, network, segment)
    if isinstance(segment, LeasedSegment) and segment.leased != address:
        raise _taken(store, network.name, segment)
    return address


def _take(store: Store, network: Network, segment: DhcpSegment, address: IPv4Address) -> bool:
    return store.leases.reserve(segment.name, segment.bridge, network.uuid, address)


def _taken(store: Store, name: str, segment: LeasedSegment) -> LeaseError:
    holder = store.leases.holder(segment.bridge, segment.leased)
    return LeaseError(
        f"network {quoted(name)}: the DHCP server of upstream {segment.name} gives"
        f" {segment.leased}, which network {quoted(holder.name) if holder else '?'} has",
        "separate its range from the pools of that segment",
    )


def stand_ins(uuid: str) -> Iterator[IPv4Address]:
    """Yield placeholder addresses for a network, the likeliest free address first."""
    first = int(names.digest(uuid), 16)
    return (
        IPv4Address(PLACEHOLDERS[(first + n) % len(PLACEHOLDERS)]) for n in range(len(PLACEHOLDERS))
    )


def differences(
    store: Store, record: NetworkRecord, network: Network, segment: Segment
) -> list[str]:
    """Return in words why a network that is up lacks its address, or values of its lease."""
    if not isinstance(segment, DhcpSegment):
        return []
    lease = held(record.uuid)
    if lease is None:
        return [f"no DHCP server on bridge {segment.bridge} has leased an address yet"]
    if left_out := cuts(network, segment.upstream):
        return left_out
    found = _not_wanted(network, segment.upstream, lease)
    if found is not None:
        return [str(found)]
    if not isinstance(segment, LeasedSegment):
        return []
    if segment.leased == store.leases.of(segment.name, record.uuid).address:
        return []
    if store.leases.holder(segment.bridge, segment.leased):
        return [str(_taken(store, record.name, segment))]
    return [f"the leased address {segment.leased} is not in force"]
