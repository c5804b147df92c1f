# SPDX-License-Identifier: LGPL-2.1-or-later
"""The record of a router whose journal is damaged or lost, made of what else is known.

A router that is up holds the host's NIC, so its journal must not be needed to give it
back.  In order: what was confirmed (``.kept``), else what the namespace itself tells: the
NIC with its addresses and routes, the host's IPv6 addresses on the patch to the host.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address, ip_network

from libvirt_natns import names
from libvirt_natns.errors import NatnsError, RouterFileError, StoreError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.boot import boot_id
from libvirt_natns.model.upstream import DEFAULT_HOST_SUBNET
from libvirt_natns.records import replace
from libvirt_natns.upstream.router import hardware, journal, nic, nic_objects, resolv_conf
from libvirt_natns.upstream.router.journal import Kept, Record, Target
from libvirt_natns.upstream.router.nic import Capture
from libvirt_natns.upstream.router.resolv_conf import Resolver

STEADY = 3.0
"""Seconds for which a journal that cannot be read is tried again."""

POLL = 0.1

NOT_KEPT = ("forwarding", "send_redirects", "proxy_ndp", "proxy_delay", "autoconf", "accept_ra")
"""Settings that a router changes on its NIC, see ``steps.NIC_SETTINGS``."""

Say = Callable[[str], object]


def quiet(_: str) -> None:
    """Say nothing."""


def load(name: str, say: Say = quiet) -> Record | None:
    """The record of a router, put together anew where its journal is damaged.

    The damaged file is put aside.  None where nothing is up, and nothing was begun.
    """
    try:
        found = _patiently(name)
    except StoreError as error:
        aside = _put_aside(name, "json")
        say(f"{error.fact}{f'; it is kept as {aside}' if aside else ''}")
        found = None
    return rebuilt(name) if found is None and is_lost(name) else found


def _patiently(name: str) -> Record | None:
    """The record of a router; a journal that cannot be read is tried again for STEADY seconds.

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
    """True if a router's namespace holds a NIC, but no journal tells of it.  Raises KernelError."""
    namespace = names.router_namespace(name)
    if not netns.exists(namespace):
        return False
    with nic.session(namespace) as opened:
        loopback = nic.find(opened, "lo")
        alias = loopback.text(nic.IFLA_IFALIAS) if loopback else ""
        ours = alias.endswith(f"router {name}")
        return ours and any(map(_may_be_nic, nic.links(opened)))


def kept(name: str, say: Say = quiet) -> Kept | None:
    """What was confirmed of a router, also by its journal; a damaged file is put aside."""
    try:
        found = journal.kept(name)
    except RouterFileError as error:
        aside = _put_aside(name, "kept")
        say(f"{error.fact}{f'; it is kept as {aside}' if aside else ''}")
        found = None
    except StoreError as error:
        say(str(error))
        found = None
    if found is not None:
        return found
    record = None
    with suppress(StoreError):
        record = journal.load(name)
    if record is None or record.state != "up" or record.deadline is not None:
        return None
    with suppress(OSError):
        journal.keep(record)
    return Kept(record.before, record.target, record.resolver)


def overdue(name: str, deadline: float, remembered: Record | None) -> Record | None:
    """The record of a router that waited until that deadline; None where it waits no more.

    Where the journal is damaged, or missing although the NIC is in its namespace, it is
    the ``remembered`` one, or is put together anew.  Raises KernelError.
    """
    until = time.monotonic() + STEADY
    while True:
        with suppress(StoreError):
            found = journal.load(name)
            if found is not None:
                return found if found.deadline == deadline and found.this_boot else None
            if not is_lost(name):
                return None
        if time.monotonic() >= until:
            break
        # A backup or an editor may have it for a moment.
        time.sleep(POLL)
    _put_aside(name, "json")
    return (remembered or rebuilt(name)) if is_lost(name) else None


def _put_aside(name: str, kind: str) -> str:
    """The name under which a damaged file is kept; "" where it cannot be."""
    with suppress(OSError):
        return str(journal.put_aside(names.router_file(name, kind)))
    return ""


def rebuilt(name: str) -> Record | None:
    """The record of a router that has a namespace, without its journal.

    It counts as up where it was confirmed, and as one to be taken back else.  Raises KernelError.
    """
    namespace = names.router_namespace(name)
    if not netns.exists(namespace):
        return None
    known = kept(name)
    if known is None:
        return _of_namespace(name, namespace)
    target = known.target or _target(name, known.before, ())
    inside = hardware.find_in(namespace, known.before)
    target = replace(target, nic=inside or target.nic)
    record = Record(
        target,
        hardware.renamed(known.before, target.nic),
        known.resolver or resolv_conf.look(),
        "up" if inside and known.target else "going down",
        boot_id(),
    )
    journal.save(record)
    return record


def _of_namespace(name: str, namespace: str) -> Record | None:
    with nic.session(namespace) as opened:
        found = [each.name for each in nic.links(opened) if _may_be_nic(each)]
    if not found:
        return None
    hosts = _addresses_of_host(name)
    before = _as_before(nic.capture(namespace, found[0]), hosts)
    record = Record(_target(name, before, hosts), before, _resolver(), "going down", boot_id())
    journal.save(record)
    return record


def _may_be_nic(link: nic.Link) -> bool:
    return link.kind in hardware.HARDWARE and link.name not in nic.RESERVED


def _target(name: str, before: Capture, hosts: tuple[str, ...]) -> Target:
    """Enough of a target for all steps to be undone."""
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
    """The host's own IPv6 addresses, which are on the patch to it now."""
    with suppress(NatnsError):
        return tuple(each.ip for each in nic.capture(None, names.router_patch(name)).ipv6)
    return ()


def _as_before(inside: Capture, hosts: tuple[str, ...]) -> Capture:
    """A NIC as it was in the host, as far as it tells in its namespace."""
    settings = [(key, text) for key, text in inside.settings if key.split("/")[-1] not in NOT_KEPT]
    return replace(
        inside,
        flags=inside.flags & ~nic.IFF_ALLMULTI,
        settings=tuple(settings),
        addresses=(*inside.addresses, *(_host_address(each, inside) for each in hosts)),
        # Those that it answers for in the host's place are proxies.
        neighbours=tuple(each for each in inside.neighbours if not each.is_proxy),
        rules=(),
    )


def _host_address(ip: str, inside: Capture) -> nic_objects.Address:
    """An address of the host's, with the prefix length of the subnet that it is in."""
    lengths = [128]
    for route in inside.routes:
        to = ip_network(route.destination)
        if to.version == 6 and to.prefixlen and not route.gateway and ip_address(ip) in to:
            lengths.append(to.prefixlen)
    return nic_objects.single(ip, min(lengths))


def _resolver() -> Resolver:
    """resolv.conf as it is: what was there before is not known any more."""
    return resolv_conf.look()
