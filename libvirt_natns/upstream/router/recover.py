# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the record of a router with a damaged or lost journal; forgets earlier boots.

A router that is up holds the host's NIC, so the way back must work without its journal.
The record is made of the confirmed router.  Without one it is made of the namespace: the
NIC with its addresses and routes, and the host's IPv6 addresses on the patch to the host.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address, ip_network

from libvirt_natns import names
from libvirt_natns.errors import NatnsError, RouterFileError, StoreError
from libvirt_natns.kernel import netlink, netns
from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.model.upstream import DEFAULT_HOST_SUBNET
from libvirt_natns.upstream.router import (
    confirmation,
    hardware,
    host_resolv_conf,
    journal,
    nic_addresses,
    nic_link,
    nic_snapshot,
    router_files,
)
from libvirt_natns.upstream.router.confirmation import ConfirmedRouter
from libvirt_natns.upstream.router.journal import RouterRecord
from libvirt_natns.upstream.router.nic_addresses import NicAddress
from libvirt_natns.upstream.router.nic_link import ListedLink
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

STEADY = 3.0
"""Seconds for which a journal that cannot be read is tried again."""

POLL = 0.1

NOT_KEPT = ("forwarding", "send_redirects", "proxy_ndp", "proxy_delay", "autoconf", "accept_ra")
"""Settings that a router changes on its NIC, see ``nic_inside.SETTINGS``."""

Say = Callable[[str], object]


def quiet(_: str) -> None:
    """Say nothing."""


def load(name: str, say: Say = quiet) -> RouterRecord | None:
    """Return the record of a router, made anew where its journal is damaged or lost.

    A damaged file is put aside.  None where no router is up, and no step was begun.
    """
    try:
        record = _patiently(name)
    except StoreError as error:
        aside = _put_aside(name, "json")
        say(f"{error.fact}{f'; it is kept as {aside}' if aside else ''}")
        record = None
    return rebuilt(name) if record is None and is_lost(name) else record


def _patiently(name: str) -> RouterRecord | None:
    """Return the record of a router; try an unreadable journal again for STEADY seconds.

    A program may have used up all descriptors.  Raises StoreError.
    """
    deadline = time.monotonic() + STEADY
    while True:
        try:
            return journal.load(name)
        except StoreError as error:
            if isinstance(error, RouterFileError) or time.monotonic() >= deadline:
                raise
        time.sleep(POLL)


def is_lost(name: str) -> bool:
    """True if a router's namespace holds a NIC, so that a missing journal was lost.

    Raises KernelError.
    """
    namespace = names.router_namespace(name)
    if not netns.exists(namespace):
        return False
    with nic_link.session(namespace) as sock:
        loopback = nic_link.find(sock, "lo")
        alias = loopback.alias if loopback else ""
        ours = alias.endswith(f"router {name}")
        return ours and any(map(_may_be_nic, nic_link.links(sock)))


def kept(name: str, say: Say = quiet) -> ConfirmedRouter | None:
    """Return the confirmed router, from its own file or the journal; None without any.

    A damaged file is put aside.  ``say`` is called for each problem.
    """
    try:
        confirmed = confirmation.load(name)
    except RouterFileError as error:
        aside = _put_aside(name, "kept")
        say(f"{error.fact}{f'; it is kept as {aside}' if aside else ''}")
        confirmed = None
    except StoreError as error:
        say(str(error))
        confirmed = None
    if confirmed is not None:
        return confirmed
    record = None
    with suppress(StoreError):
        record = journal.load(name)
    if record is None or record.state != "up" or record.deadline is not None:
        return None
    with suppress(OSError):
        confirmation.save(record)
    return ConfirmedRouter(record.before, record.target, record.resolver)


def overdue(name: str, deadline: float, remembered: RouterRecord | None) -> RouterRecord | None:
    """Return the record of a router with this deadline; None where it waits no more.

    For a damaged or lost journal it is the ``remembered`` record, or a record made anew.
    Raises KernelError.
    """
    until = time.monotonic() + STEADY
    while True:
        with suppress(StoreError):
            record = journal.load(name)
            if record is not None:
                return record if record.deadline == deadline and record.this_boot else None
            if not is_lost(name):
                return None
        if time.monotonic() >= until:
            break
        # A backup program or an editor may hold the file for a moment.
        time.sleep(POLL)
    _put_aside(name, "json")
    return (remembered or rebuilt(name)) if is_lost(name) else None


def _put_aside(name: str, kind: str) -> str:
    """Rename a damaged file; returns its new name, "" where that fails."""
    with suppress(OSError):
        return str(router_files.put_aside(names.router_file(name, kind)))
    return ""


def rebuilt(name: str) -> RouterRecord | None:
    """Return the record of a router that has a namespace, made without its journal.

    A confirmed router counts as up; any other is to be taken back.  Raises KernelError.
    """
    namespace = names.router_namespace(name)
    if not netns.exists(namespace):
        return None
    confirmed = kept(name)
    if confirmed is None:
        return _of_namespace(name, namespace)
    target = confirmed.target or _target(name, confirmed.before, ())
    inside = hardware.find_in(namespace, confirmed.before)
    target = replace(target, nic=inside or target.nic)
    record = RouterRecord(
        target,
        hardware.renamed(confirmed.before, target.nic),
        confirmed.resolver or host_resolv_conf.look(),
        "up" if inside and confirmed.target else "going down",
        boot_id(),
    )
    journal.save(record)
    return record


def _of_namespace(name: str, namespace: str) -> RouterRecord | None:
    with nic_link.session(namespace) as sock:
        nics = [link.name for link in nic_link.links(sock) if _may_be_nic(link)]
    if not nics:
        return None
    hosts = _addresses_of_host(name)
    before = as_before(nic_snapshot.capture(namespace, nics[0]), hosts)
    # The earlier resolv.conf is lost, so the present file stays.
    resolver = host_resolv_conf.look()
    record = RouterRecord(_target(name, before, hosts), before, resolver, "going down", boot_id())
    journal.save(record)
    return record


def _may_be_nic(link: ListedLink) -> bool:
    return link.kind in hardware.HARDWARE and link.name not in nic_link.RESERVED


def _target(name: str, before: Capture, hosts: tuple[str, ...]) -> Target:
    """Return a target with which all steps can be undone."""
    return Target(
        name=name,
        nic=before.name,
        backend="nftables",
        host_subnet=str(DEFAULT_HOST_SUBNET),
        ports=(),
        addresses6=hosts,
        transit="198.19.248.0/22",
    )


def _addresses_of_host(name: str) -> tuple[str, ...]:
    """Return the host's own IPv6 addresses, which are on the patch to the router now."""
    with suppress(NatnsError):
        return tuple(
            address.ip for address in nic_snapshot.capture(None, names.router_patch(name)).ipv6
        )
    return ()


def as_before(inside: Capture, hosts: tuple[str, ...]) -> Capture:
    """Return the NIC as it was in the host, as far as its state in the namespace shows."""
    settings = [(key, text) for key, text in inside.settings if key.split("/")[-1] not in NOT_KEPT]
    return replace(
        inside,
        flags=inside.flags & ~netlink.IFF_ALLMULTI,
        settings=tuple(settings),
        # The kernel lists the newest IPv6 address first, and prefers it: the host's own.
        addresses=(*(_host_address(ip, inside) for ip in hosts), *inside.addresses),
        # A proxy entry is an address of the host that the NIC answers for.
        neighbours=tuple(neighbour for neighbour in inside.neighbours if not neighbour.is_proxy),
        rules=(),
    )


def _host_address(ip: str, inside: Capture) -> NicAddress:
    """Return an address of the host, with the prefix length of its subnet on the NIC."""
    lengths = [128]
    for route in inside.routes:
        to = ip_network(route.destination)
        if to.version == 6 and to.prefixlen and not route.gateway and ip_address(ip) in to:
            lengths.append(to.prefixlen)
    return nic_addresses.single(ip, min(lengths))


def forget(record: RouterRecord) -> None:
    """Remove the files of a router of an earlier boot: nothing else has outlived that boot."""
    servers = record.target.servers
    if servers and host_resolv_conf.look() == host_resolv_conf.wanted(servers, record.resolver):
        host_resolv_conf.restore(record.resolver)
    journal.discard(record.target.name)


def forget_earlier(name: str) -> None:
    """Forget a router of an earlier boot, and put its resolv.conf back."""
    with router_files.lock():
        record = journal.load(name)
        if record is not None and not record.this_boot:
            forget(record)


def is_confirmed(name: str) -> bool:
    """True if a router was confirmed once, so that a boot may bring it up."""
    files = (names.router_file(name, kind) for kind in ("kept", "restore"))
    return any(file.exists() for file in files) or kept(name) is not None
