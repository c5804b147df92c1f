# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which link of the host is a NIC that was captured earlier, whatever its name is by now.

A kernel, a driver or systemd's naming scheme may name a NIC differently after an
upgrade.  The hardware's MAC address stays: the NIC's own one, or the permanent one where
an administrator has set another.  A server that was made anew on other hardware has
another MAC address; there the name decides.

A NIC may appear late, or be renamed by udev(7) while the machine boots: ``await_link`` waits
a bounded time.
"""

import time
from collections.abc import Iterator

from libvirt_natns.kernel.netlink import Socket
from libvirt_natns.records import replace
from libvirt_natns.upstream.router import boot_clock, nic_link
from libvirt_natns.upstream.router.nic_link import ListedLink
from libvirt_natns.upstream.router.nic_snapshot import Capture

DRIVER_LIMIT = 30.0
"""Seconds after which a NIC that is not there yet is not expected any more."""

NAMING_LIMIT = 2.0
"""Seconds in which udev renames NICs, where a link of the name has another MAC address."""

POLL = 0.1

HARDWARE = ("", "veth")
"""Kinds of links that stand for a NIC: a container's NIC is a veth.  Others copy a NIC's MAC."""

NOBODY = ("", "00:00:00:00:00:00")


def find(kept: Capture) -> str | None:
    """The name of the host's link that is this NIC: by its MAC address, else by its name.

    None where no link is.  Raises KernelError.
    """
    with nic_link.session(None) as opened:
        return _by_mac(opened, kept, None) or _by_name(opened, kept)


def find_in(namespace: str, kept: Capture) -> str | None:
    """The same in a namespace.  Raises KernelError."""
    with nic_link.session(namespace) as opened:
        return _by_mac(opened, kept, namespace) or _by_name(opened, kept)


def await_link(kept: Capture) -> str | None:
    """The same, as soon as it is there; waits DRIVER_LIMIT seconds at most.

    A link that has the name and another MAC address counts after NAMING_LIMIT seconds.
    """
    start = boot_clock.now()
    while True:
        with nic_link.session(None) as opened:
            by_mac, by_name = _by_mac(opened, kept, None), _by_name(opened, kept)
        waited = boot_clock.now() - start
        if by_mac or (by_name and waited >= NAMING_LIMIT) or waited >= DRIVER_LIMIT:
            return by_mac or by_name
        time.sleep(POLL)


def _by_mac(opened: Socket, kept: Capture, namespace: str | None) -> str | None:
    wanted = {kept.mac, kept.permanent} - set(NOBODY)
    fitting = [each for each in _hardware(opened) if wanted & {each.mac, each.permanent}]
    # Another link may have been given a copy of the NIC's MAC address.
    exact = [each for each in fitting if kept.permanent and each.permanent == kept.permanent]
    named = [each for each in fitting if each.name == kept.name]
    for candidates in (named, exact, fitting):
        if len(candidates) == 1:
            return candidates[0].name
    return None


def _hardware(opened: Socket) -> Iterator[ListedLink]:
    for each in nic_link.links(opened):
        if each.kind in HARDWARE and each.name not in nic_link.RESERVED:
            yield each


def _by_name(opened: Socket, kept: Capture) -> str | None:
    # The kernel also finds a link by its alternative names.
    link = nic_link.find(opened, kept.name)
    return link.name if link else None


def renamed(kept: Capture, name: str) -> Capture:
    """A capture of a NIC that is called ``name`` by now: its rules and labels name it, too."""
    if name == kept.name:
        return kept
    return replace(
        kept,
        name=name,
        altnames=tuple(each for each in kept.altnames if each != name),
        rules=tuple(each.renamed(kept.name, name) for each in kept.rules),
        addresses=tuple(each.relabelled(kept.name, name) for each in kept.addresses),
    )


def lasting(kept: Capture) -> Capture:
    """A capture whose addresses and routes do not end by themselves.

    A host whose NIC nobody configures has no DHCP client that would renew them.
    """
    return replace(
        kept,
        addresses=tuple(each.for_good() for each in kept.addresses),
        routes=tuple(replace(each, expires=0) for each in kept.routes),
    )
