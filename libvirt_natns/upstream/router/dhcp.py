# SPDX-License-Identifier: LGPL-2.1-or-later
"""The DHCP lease of a router's NIC, where the NIC had one when it was taken.

The address goes on as it was; a client in the namespace asks for the same one and renews
it from then on.  The client tells ``attend`` when something has changed.

When the router goes down the client is killed, not ended: it would give the lease back
that the host's own client is to go on with.
"""

import shutil
import syslog
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.daemons import dhcp_lease, lease_check, udhcpc
from libvirt_natns.daemons.dhcp_lease import DhcpLease
from libvirt_natns.daemons.udhcpc import Client
from libvirt_natns.kernel import processes, wire
from libvirt_natns.records import replace
from libvirt_natns.upstream.router import command, link_config, nic, nic_objects
from libvirt_natns.upstream.router.journal import Target
from libvirt_natns.upstream.router.link_config import Side
from libvirt_natns.upstream.router.nic import Capture

END_LIMIT = 2.0
"""Seconds for a client that was killed to end."""

ETHERNET = "01"
"""The type of hardware in front of a client-id made of a MAC: what most clients send."""


def _directory(target: Target) -> Path:
    return names.RUN_DIRECTORY / "routers" / names.slug(target.name)


def _client(target: Target, mac: str) -> Client:
    return Client(
        namespace=target.namespace,
        link=target.nic,
        client_id=ETHERNET + mac.replace(":", ""),
        directory=_directory(target),
        on_change=command.line("lease", target.name),
    )


def require() -> None:
    """Raise DhcpError, with a remedy, where there is no client."""
    udhcpc.program()


def current(target: Target) -> DhcpLease | None:
    """The lease that the client holds."""
    return dhcp_lease.read(_directory(target)) if target.leased else None


def _private(target: Target) -> tuple[IPv4Network, ...]:
    """What only the router's own sides have."""
    return IPv4Network(target.host_subnet), IPv4Network(target.transit)


def ensure(target: Target, before: Capture) -> None:
    """Have the client run, and put its lease in force, if there is one.  Raises DhcpError."""
    if not target.leased:
        return
    wanted = next((IPv4Address(each.ip) for each in before.ipv4 if each.leased), None)
    udhcpc.ensure(_client(target, before.mac), wanted)
    apply(target, before)


def end(target: Target) -> None:
    """End the client without a word to the server, and remove its files."""
    directory = _directory(target)
    pid = processes.read_pid(directory / "pid")
    # Also where its namespace has lost the name, which it alone keeps from ending then.
    # It names its own pid file, and no other process does.
    if pid is not None:
        processes.end([pid], str(directory / "pid"), END_LIMIT, processes.AT_ONCE)
    shutil.rmtree(directory, ignore_errors=True)
    for each in (directory.parent, names.RUN_DIRECTORY):
        with suppress(OSError):
            each.rmdir()


def differences(target: Target, before: Capture) -> list[str]:
    """What is wrong with the client, or differs from its lease."""
    if not target.leased:
        return []
    held = current(target)
    found = udhcpc.differences(_client(target, before.mac))
    used = _used(target, held)
    return found + (link_config.differences(_side(target, used)) if used else [])


def _used(target: Target, held: DhcpLease | None) -> DhcpLease | None:
    """A lease without what must not be used; None where all of it is refused."""
    if held is None or lease_check.refused(held, _private(target)):
        return None
    return lease_check.bounded(held, _private(target)).lease


def left_out(target: Target) -> list[str]:
    """Return in words what of the client's lease is not used."""
    held = current(target)
    if held is None:
        return []
    if why := lease_check.refused(held, _private(target)):
        return [f"the DHCP lease is not used: {why}"]
    return list(lease_check.said(lease_check.bounded(held, _private(target)).cuts))


def _side(target: Target, held: DhcpLease) -> Side:
    routes = [(str(each.destination), str(each.gateway)) for each in held.routes]
    if held.gateway:
        routes.append(("0.0.0.0/0", str(held.gateway)))
    return Side(target.namespace, target.nic, (str(held.address),), tuple(routes), (), onlink=True)


def apply(target: Target, before: Capture) -> None:
    """Put the client's lease in force in place of an earlier one; without one, the address goes.

    For good, not until it ends: the client tells only of what is new.  What the NIC had
    ``before`` that was not leased, stays.
    """
    held = current(target)
    mark = _directory(target) / "applied"
    if held is None and not mark.exists():
        # The client has just started, and what the NIC had holds on.
        return
    for line in left_out(target):
        syslog.syslog(syslog.LOG_WARNING, f"libvirt-natns: router {target.name}: {line}")
    if held is not None and (held := _used(target, held)) is None:
        # What is in force stays: the server's next word may make sense again.
        return
    # First: with the oldest address of a subnet the kernel removes all others.
    static = [e for e in before.addresses if e.family == nic_objects.AF_INET and not e.leased]
    _remove_others(target, held, {each.ip for each in static})
    if held is not None:
        link_config.ensure(_side(target, held))
    # After the lease's: packets bear the oldest address of a subnet.
    _add(target, static)
    if held is None:
        mark.unlink()
    else:
        mark.touch()


def _add(target: Target, addresses: list[nic_objects.Address]) -> None:
    with nic.session(target.namespace) as opened:
        link = nic.find(opened, target.nic)
        for each in addresses if link else ():
            request = each.request(link.index if link else 0, 0)
            nic.attempt(opened, wire.RTM_NEWADDR, request, wire.NLM_F_CREATE | wire.NLM_F_EXCL)


def _remove_others(target: Target, held: DhcpLease | None, static: set[str]) -> None:
    leased = {str(held.address.ip)} if held else set()
    gateway = str(held.gateway) if held else ""
    with nic.session(target.namespace) as opened:
        link = nic.find(opened, target.nic)
        found = nic.capture(target.namespace, target.nic)
        index = link.index if link else 0
        keep = static | leased
        if held and not leased & {each.ip for each in found.addresses}:
            keep = {each for each in static if IPv4Address(each) not in held.address.network}
        for each in found.addresses:
            if each.family == nic_objects.AF_INET and each.ip not in keep:
                nic.attempt(opened, wire.RTM_DELADDR, each.request(index, 0))
        for route in found.routes:
            default = route.family == nic_objects.AF_INET and route.is_default
            if default and route.gateway != gateway:
                nic.attempt(opened, wire.RTM_DELROUTE, route.request(index))


def without_leased(found: Capture) -> Capture:
    """A NIC without what a lease says: its IPv4 address, the routes of that, default routes."""
    ours = {each.ip for each in found.ipv4 if each.leased}
    return replace(
        found,
        addresses=tuple(each for each in found.addresses if each.ip not in ours),
        routes=tuple(
            each
            for each in found.routes
            if each.source not in ours
            and not (each.family == nic_objects.AF_INET and (each.is_default or each.gateway))
        ),
    )
