# SPDX-License-Identifier: LGPL-2.1-or-later
"""The DHCP lease of a router's NIC, if the NIC had a leased address in the host.

The NIC keeps the address.  A DHCP client in the namespace asks for the same address, and
renews it.  The client starts ``helper`` when its lease has changed.

When the router goes down, the client is killed.  A client that ends in an orderly way gives
the lease back, and the host's own client needs the lease.
"""

import shutil
import syslog
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from socket import AF_INET

from libvirt_natns import names
from libvirt_natns.daemons import dhcp_lease, lease_check, udhcpc
from libvirt_natns.daemons.dhcp_lease import DhcpLease
from libvirt_natns.daemons.udhcpc import Client
from libvirt_natns.kernel import netlink, processes
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation
from libvirt_natns.upstream.router import (
    helper_command,
    lease_identity,
    link_config,
    nic_link,
    nic_snapshot,
    nic_sources,
)
from libvirt_natns.upstream.router.link_config import LinkConfig
from libvirt_natns.upstream.router.nic_addresses import NicAddress
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

END_LIMIT = 2.0
"""Seconds in which a killed client ends."""


def client_directory(target: Target) -> Path:
    """Return the directory of a router's DHCP client."""
    return names.RUN_DIRECTORY / "routers" / names.slug(target.name)


def _client(target: Target, mac: str) -> Client:
    return Client(
        namespace=target.namespace,
        link=target.nic,
        client_id=target.client_id or lease_identity.of_mac(mac),
        directory=client_directory(target),
        on_change=helper_command.line("lease", target.name),
    )


def require() -> None:
    """Raise DhcpError, with a remedy, where no DHCP client is installed."""
    udhcpc.program()


def current(target: Target) -> DhcpLease | None:
    """Return the lease that the client holds, or None."""
    return dhcp_lease.read(client_directory(target)) if target.leased else None


def _private(target: Target) -> tuple[IPv4Network, ...]:
    """Return the router's private subnets, which no lease can have."""
    return IPv4Network(target.host_subnet), IPv4Network(target.transit)


def ensure(target: Target, before: Capture) -> None:
    """Start the client unless it runs, and put its lease in force.  Raises DhcpError."""
    if not target.leased:
        return
    wanted = next((IPv4Address(address.ip) for address in before.ipv4 if address.leased), None)
    udhcpc.ensure(_client(target, before.mac), wanted)
    apply(target, before)


def end(target: Target) -> None:
    """Kill the client, so that it tells the server nothing, and remove its files."""
    directory = client_directory(target)
    # The client may keep a namespace alive that has lost its name, so /proc is searched.
    # Only the client has its own pid file in its command line.
    word = str(directory / "pid")
    processes.end(udhcpc.clients(directory), word, END_LIMIT, processes.AT_ONCE)
    shutil.rmtree(directory, ignore_errors=True)
    for each in (directory.parent, names.RUN_DIRECTORY):
        with suppress(OSError):
            each.rmdir()


def differences(target: Target, before: Capture) -> list[str]:
    """Return in words what is wrong with the client, or differs from its lease."""
    if not target.leased:
        return []
    held = current(target)
    differing = udhcpc.differences(_client(target, before.mac))
    used = used_lease(target, held)
    return differing + (link_config.differences(_side(target, used)) if used else [])


def used_lease(target: Target, held: DhcpLease | None) -> DhcpLease | None:
    """Return a lease without values that must not be used; None for a refused lease."""
    if held is None or lease_check.refused(held, _private(target)):
        return None
    return lease_check.bounded(held, _private(target)).lease


def left_out(target: Target) -> list[str]:
    """Return in words the values of the client's lease that are not used."""
    held = current(target)
    if held is None:
        return []
    if why := lease_check.refused(held, _private(target)):
        return [f"the DHCP lease is not used: {why}"]
    return list(lease_check.said(lease_check.bounded(held, _private(target)).cuts))


def _side(target: Target, held: DhcpLease) -> LinkConfig:
    routes = [(str(route.destination), str(route.gateway)) for route in held.routes]
    if held.gateway:
        routes.append(("0.0.0.0/0", str(held.gateway)))
    return LinkConfig(
        target.namespace, target.nic, (str(held.address),), tuple(routes), (), onlink=True
    )


def apply(target: Target, before: Capture) -> None:
    """Put the client's lease in force; without a lease, remove the leased address.

    The address does not expire by itself, because the client reports only changes.  Static
    addresses that the NIC had ``before`` stay.
    """
    held = current(target)
    mark = client_directory(target) / "applied"
    if held is None and not mark.exists():
        # The client has just started, and the NIC keeps its addresses.
        return
    for line in left_out(target):
        syslog.syslog(syslog.LOG_WARNING, f"libvirt-natns: router {target.name}: {line}")
    if held is not None and (held := used_lease(target, held)) is None:
        # The lease in force stays: the server's next lease may be usable again.
        return
    # Others go first: with the oldest address of a subnet the kernel removes all others.
    static = _static(before)
    _remove_others(target, held, before)
    if held is not None:
        link_config.configure(_side(target, held))
    # Static addresses come last: the oldest address is the packets' source.
    _add(target, static)
    if held is None:
        mark.unlink()
    else:
        mark.touch()


def _add(target: Target, addresses: list[NicAddress]) -> None:
    with nic_link.session(target.namespace) as sock:
        link = nic_link.find(sock, target.nic)
        for address in addresses if link else ():
            request = address.request(link.index if link else 0, 0)
            nic_link.attempt(
                sock, netlink.RTM_NEWADDR, request, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
            )


def _static(before: Capture) -> list[NicAddress]:
    return [e for e in before.addresses if e.family == AF_INET and not e.leased]


def _remove_others(target: Target, held: DhcpLease | None, before: Capture) -> None:
    static = {address.ip for address in _static(before)}
    leased = {str(held.address.ip)} if held else set()
    gateway = str(held.gateway) if held else ""
    with nic_link.session(target.namespace) as sock:
        link = nic_link.find(sock, target.nic)
        present = nic_snapshot.capture(target.namespace, target.nic)
        index = link.index if link else 0
        keep = static | leased
        if held and not leased & {address.ip for address in present.addresses}:
            leads = nic_sources.leads_leased(before)
            keep = {
                address
                for address in static
                if not leads and IPv4Address(address) not in held.address.network
            }
        for address in present.addresses:
            if address.family == AF_INET and address.ip not in keep:
                nic_link.attempt(sock, netlink.RTM_DELADDR, address.request(index, 0))
        for route in present.routes:
            default = route.family == AF_INET and route.is_default
            if default and route.gateway != gateway:
                nic_link.attempt(sock, netlink.RTM_DELROUTE, route.request(index))


def without_leased(capture: Capture) -> Capture:
    """Return a NIC without the values of a lease: leased address, its routes, default routes."""
    ours = {address.ip for address in capture.ipv4 if address.leased}
    return replace(
        capture,
        addresses=tuple(address for address in capture.addresses if address.ip not in ours),
        routes=tuple(
            route
            for route in capture.routes
            if route.source not in ours
            and not (route.family == AF_INET and (route.is_default or route.gateway))
        ),
    )


@dataclass(frozen=True, slots=True)
class KeptLease(Operation):
    """The DHCP client of the NIC, with its lease in force; none for a NIC without a lease."""

    target: Target
    before: Capture

    @property
    def namespace(self) -> str:
        return self.target.namespace

    def describe(self) -> str:
        if not self.target.leased:
            return ""
        return f"DHCP client on {self.target.nic} in {self.namespace}"

    def differs(self, kernel: Kernel) -> list[str]:
        return differences(self.target, self.before)

    def ensure(self, context: ApplyContext) -> None:
        ensure(self.target, self.before)

    def take_back(self, kernel: Kernel) -> None:
        end(self.target)
