# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upstreams whose addresses a provider's DHCP server leases: ``pool = "dhcp"``.

Each network has a client of its own on its upstream link, known to the server by a
MAC address and a client-id that never change, so the server gives it the same
address again.  What the lease says completes the upstream for that one network.

As long as there is no lease, the network's address is a stand-in (see ``addresses``):
what is published on it is in the tables, and moves to the real one when that is known.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.addresses import PLACEHOLDERS, Address, IPNetwork, is_placeholder
from libvirt_natns.daemons import lease_check, resolv_conf, udhcpc
from libvirt_natns.daemons.udhcpc import Client, Lease
from libvirt_natns.errors import LeaseError, NatnsError
from libvirt_natns.kernel.boot import now
from libvirt_natns.model.network import Network
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import replace
from libvirt_natns.state import applicants, pool
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import selection

FOLLOW = "from libvirt_natns.hook import on_lease; sys.exit(on_lease(sys.argv[1]))"
"""What the client's script has Python do when the lease has changed."""


ACCEPTED, REFUSED = "accepted", "refused"
UNTIL = "until"
TOLD = "told"
"""Files in a client's directory that are ours, and a key of the first."""


# -- the lease ---------------------------------------------------------------


def complete(network: Network, upstream: Upstream) -> Upstream:
    """The upstream as a network's lease has it; as it is where there is none of use.

    A network that runs keeps what it has where a renewal brings what cannot be used.
    """
    lease = held(network.uuid)
    if lease is None and not (names.dhcp_directory(network.uuid) / REFUSED).exists():
        return upstream
    if lease is not None and problem(network, upstream, lease) is None:
        return completed(upstream, _bounded(network, lease).lease)
    earlier = _accepted(network.uuid, lease)
    if earlier is None or problem(network, upstream, earlier) is not None:
        return upstream
    return completed(upstream, _bounded(network, earlier).lease)


def _private(network: Network) -> list[IPNetwork]:
    """What only the network's own side has."""
    routed = (route.destination for route in network.routes)
    return [*(subnet.network for subnet in network.subnets), *routed]


def _bounded(network: Network, lease: Lease) -> lease_check.Checked:
    return lease_check.bounded(lease, _private(network))


def cuts(network: Network, upstream: Upstream) -> list[str]:
    """What a network does not use of what its client has leased, in words."""
    lease = held(network.uuid)
    if lease is None:
        return []
    if found := problem(network, upstream, lease):
        return [str(found)]
    return list(lease_check.said(_bounded(network, lease).cuts))


def news(network: Network, upstream: Upstream) -> list[str]:
    """``cuts`` that were not told before: for the log, once each."""
    found = cuts(network, upstream)
    text = "".join(f"{line}\n" for line in found)
    file = names.dhcp_directory(network.uuid) / TOLD
    if text == _read(file):
        return []
    with suppress(OSError):
        file.write_text(text)
    return found


def _note(network: Network, upstream: Upstream) -> None:
    """Keep a lease that is of use, for renewals that bring one that is not.

    A lease that is lost takes the address along.  A lease that was refused does not.
    """
    directory = names.dhcp_directory(network.uuid)
    accepted, refused = directory / ACCEPTED, directory / REFUSED
    lease = held(network.uuid)
    with suppress(OSError):
        if lease is None:
            if not refused.exists():
                accepted.unlink(missing_ok=True)
            return
        text = _read(directory / "lease")
        if problem(network, upstream, lease) is None:
            refused.unlink(missing_ok=True)
        else:
            refused.touch()
            earlier = _accepted(network.uuid, lease)
            if earlier is None or earlier.address.ip != lease.address.ip:
                return
            # The address was renewed, if with other values: how long it is valid counts.
            text = _read(accepted).partition(f"{UNTIL}=")[0]
        text += "" if lease.until is None else f"{UNTIL}={int(lease.until)}\n"
        if text != _read(accepted):
            accepted.write_text(text)


def _accepted(uuid: str, present: Lease | None) -> Lease | None:
    """The last lease that was of use, while it is valid.

    A server that has renewed its address, whatever else it said, has renewed all of it.
    """
    text = _read(names.dhcp_directory(uuid) / ACCEPTED)
    *_, last = ["", *text.splitlines()]
    key, _, seconds = last.partition("=")
    until = float(seconds) if key == UNTIL and seconds.isdecimal() else None
    lease = udhcpc.parse(text, until) if text else None
    if lease is not None and present is not None and lease.address.ip == present.address.ip:
        return replace(lease, until=present.until)
    expired = lease is not None and lease.until is not None and lease.until < now()
    return None if expired else lease


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def held(uuid: str) -> Lease | None:
    """What a network's client has leased."""
    return udhcpc.lease(names.dhcp_directory(uuid))


def completed(upstream: Upstream, lease: Lease) -> Upstream:
    """The upstream with all that a lease says; what the configuration says goes first."""
    return replace(
        upstream,
        leased=lease.address.ip,
        subnet=lease.address.network,
        gateway=upstream.gateway or lease.gateway,
        dns=upstream.dns or lease.dns,
        mtu=lease.mtu,
        routes=lease.routes,
    )


def problem(network: Network, upstream: Upstream, lease: Lease) -> NatnsError | None:
    """Why a network cannot use what it has leased; None where it can."""
    if upstream.subnet is not None and lease.address.ip not in upstream.subnet:
        return LeaseError(
            f"network {network.name}: the DHCP server of upstream {upstream.name} gives"
            f" {lease.address}, which is not in {upstream.subnet}",
            f"correct 'subnet' in [upstreams.{upstream.name}] of {names.CONFIG_FILE}",
        )
    if why := lease_check.refused(lease, ()):
        return LeaseError(
            f"network {network.name}: the lease of the DHCP server of upstream {upstream.name}"
            f" is not used: {why}",
            f"find that server (tcpdump -n -i {upstream.bridge} port 67)",
        )
    known = completed(upstream, _bounded(network, lease).lease)
    try:
        selection.check_addresses(network, known)
        selection.check_resolvers(network, known, _servers(known))
    except NatnsError as error:
        return error
    return None


def _servers(known: Upstream) -> Sequence[Address]:
    """The resolvers that a network's guests depend on."""
    own = [server for server in known.dns if server.version == 4]
    return own or resolv_conf.host_resolvers().servers


def remaining(uuid: str) -> int | None:
    """For how many seconds a network's lease is still valid; None without end or lease."""
    lease = held(uuid)
    return max(0, int(lease.until - now())) if lease and lease.until is not None else None


# -- the client --------------------------------------------------------------


def requested(store: Store, network: Network, upstream: Upstream) -> IPv4Address | None:
    """Return the address that a network's client asks for: wanted, or leased last time."""
    wanted = (
        applicants.applicant(network).wanted or store.leases.of(upstream.name, network.uuid).address
    )
    return wanted if isinstance(wanted, IPv4Address) and not is_placeholder(wanted) else None


def client(network: Network, upstream: Upstream) -> Client:
    """A network's own client."""
    return Client(
        namespace=names.namespace(network.name),
        link=names.UPSTREAM_LINK,
        client_id=names.client_id(network.uuid),
        directory=names.dhcp_directory(network.uuid),
        on_change=names.python_command(FOLLOW, network.uuid, options="-IS"),
        probe=min(upstream.probe, udhcpc.MAX_PROBE),
    )


def await_lease(network: Network, upstream: Upstream) -> None:
    """Wait for a lease as long as the configuration says.

    Raises LeaseError where there is none and the network needs one, or where it
    cannot use what it gets; DhcpError where the client ends.
    """
    lease = udhcpc.await_lease(client(network, upstream), upstream.dhcp_timeout)
    if lease is not None:
        found = problem(network, upstream, lease) or _not_wanted(network, upstream, lease)
        if found is not None:
            raise found
    elif upstream.dhcp == "required":
        raise LeaseError(
            f"network {network.name}: no DHCP server on bridge {upstream.bridge} of upstream"
            f" {upstream.name} has leased an address within {upstream.dhcp_timeout:g} s",
            f'fix that, or set dhcp = "background" in [upstreams.{upstream.name}]'
            f" of {names.CONFIG_FILE}",
        )


def _not_wanted(network: Network, upstream: Upstream, lease: Lease) -> NatnsError | None:
    wanted = applicants.applicant(network).wanted
    if wanted in (None, lease.address.ip):
        return None
    return LeaseError(
        f"network {network.name}: the DHCP server of upstream {upstream.name} gives"
        f" {lease.address.ip} instead of the wanted address {wanted}",
        f"reserve that one there for {names.mac(network.uuid, names.UPSTREAM_LINK)},"
        " or choose another in <natns:upstream address='...'/>",
    )


# -- the address -------------------------------------------------------------


def settle(store: Store, network: Network, upstream: Upstream) -> IPv4Address:
    """Record the address that a network has leased, or a stand-in; returns it."""
    leased = upstream.leased
    _note(network, upstream)
    if leased is not None and _take(store, network, upstream, leased):
        return leased
    present = store.leases.of(upstream.name, network.uuid).address
    if present is not None and is_placeholder(present):
        return present
    return next(each for each in stand_ins(network.uuid) if _take(store, network, upstream, each))


def settle_first(store: Store, network: Network, upstream: Upstream) -> IPv4Address:
    """The same for a network that starts.

    Raises LeaseError where another network has the address.
    """
    address = settle(store, network, upstream)
    if upstream.leased not in (None, address):
        raise _taken(store, network.name, upstream)
    return address


def _take(store: Store, network: Network, upstream: Upstream, address: IPv4Address) -> bool:
    return store.leases.reserve(upstream.name, pool.segment(upstream), network.uuid, address)


def _taken(store: Store, name: str, upstream: Upstream) -> LeaseError:
    assert upstream.leased is not None
    holder = store.leases.holder(pool.segment(upstream), upstream.leased)
    return LeaseError(
        f"network {name}: the DHCP server of upstream {upstream.name} gives {upstream.leased},"
        f" which network {holder.name if holder else '?'} has",
        "see that its range and the pools of that segment do not overlap",
    )


def stand_ins(uuid: str) -> Iterator[IPv4Address]:
    """Stand-ins for a network's address, the likeliest free one first."""
    first = int(names.digest(uuid), 16)
    return (
        IPv4Address(PLACEHOLDERS[(first + n) % len(PLACEHOLDERS)]) for n in range(len(PLACEHOLDERS))
    )


def differences(
    store: Store, record: NetworkRecord, network: Network, upstream: Upstream, configured: Upstream
) -> list[str]:
    """Why a network that is up has no address, or not all that was leased, in words.

    ``upstream`` is completed by the lease in force, ``configured`` is without any lease.
    """
    if not upstream.by_dhcp:
        return []
    lease = held(record.uuid)
    if lease is None:
        return [f"no DHCP server on bridge {upstream.bridge} has leased an address yet"]
    if left_out := cuts(network, configured):
        return left_out
    found = _not_wanted(network, upstream, lease)
    if found is not None:
        return [str(found)]
    if upstream.leased in (None, store.leases.of(upstream.name, record.uuid).address):
        return []
    if store.leases.holder(pool.segment(upstream), upstream.leased):
        return [str(_taken(store, record.name, upstream))]
    return [f"the leased address {upstream.leased} is not in force"]
