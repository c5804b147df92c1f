# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the link that is a NIC of an earlier capture, also under another name.

A kernel, a driver or systemd's naming scheme may name a NIC differently after an
upgrade.  The hardware's MAC address stays: the NIC's current address, or its permanent address
where an administrator has set another.  A server that was made anew on other hardware has
another MAC address; there the name decides.

A NIC may appear late, or be renamed by udev(7) while the machine boots: ``await_link`` waits
a bounded time.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

from libvirt_natns.kernel import boot_clock
from libvirt_natns.kernel.netlink import Socket
from libvirt_natns.upstream.router import nic_link
from libvirt_natns.upstream.router.nic_link import ListedLink
from libvirt_natns.upstream.router.nic_snapshot import Capture

DRIVER_LIMIT = 30.0
"""Seconds after which a missing NIC is not expected any more."""

NAMING_LIMIT = 2.0
"""Seconds in which udev renames NICs, where a link of the name has another MAC address."""

POLL = 0.1

HARDWARE = ("", "veth")
"""Kinds of links that stand for a NIC: a container's NIC is a veth.  Others copy a NIC's MAC."""

NO_MAC = ("", "00:00:00:00:00:00")


def find(kept: Capture) -> str | None:
    """Return the name of the host's link that is this NIC: by its MAC address, else its name.

    None where no link is.  Raises KernelError.
    """
    with nic_link.session(None) as sock:
        return _by_mac(sock, kept, None) or _by_name(sock, kept)


def find_in(namespace: str, kept: Capture) -> str | None:
    """Return the name of the link of a namespace that is this NIC, or None.  Raises KernelError."""
    with nic_link.session(namespace) as sock:
        return _by_mac(sock, kept, namespace) or _by_name(sock, kept)


def await_link(kept: Capture) -> str | None:
    """Return the name of the host's link that is this NIC; wait until the link appears.

    A link that has the name and another MAC address counts after NAMING_LIMIT seconds.
    None after DRIVER_LIMIT seconds.  Raises KernelError.
    """
    start = boot_clock.now()
    while True:
        with nic_link.session(None) as sock:
            by_mac, by_name = _by_mac(sock, kept, None), _by_name(sock, kept)
        waited = boot_clock.now() - start
        if by_mac or (by_name and waited >= NAMING_LIMIT) or waited >= DRIVER_LIMIT:
            return by_mac or by_name
        time.sleep(POLL)


def _by_mac(sock: Socket, kept: Capture, namespace: str | None) -> str | None:
    wanted = {kept.mac, kept.permanent} - set(NO_MAC)
    fitting = [link for link in _hardware(sock) if wanted & {link.mac, link.permanent}]
    # Another link may have been given a copy of the NIC's MAC address.
    exact = [link for link in fitting if kept.permanent and link.permanent == kept.permanent]
    named = [link for link in fitting if link.name == kept.name]
    for candidates in (named, exact, fitting):
        if len(candidates) == 1:
            return candidates[0].name
    return None


def _hardware(sock: Socket) -> Iterator[ListedLink]:
    for link in nic_link.links(sock):
        if link.kind in HARDWARE and link.name not in nic_link.RESERVED:
            yield link


def _by_name(sock: Socket, kept: Capture) -> str | None:
    # The kernel also finds a link by its alternative names.
    link = nic_link.find(sock, kept.name)
    return link.name if link else None


def renamed(kept: Capture, name: str) -> Capture:
    """Return the capture of a NIC that has another name now, also in its rules and labels."""
    if name == kept.name:
        return kept
    return replace(
        kept,
        name=name,
        altnames=tuple(altname for altname in kept.altnames if altname != name),
        rules=tuple(rule.renamed(kept.name, name) for rule in kept.rules),
        addresses=tuple(address.relabelled(kept.name, name) for address in kept.addresses),
    )


def made_permanent(kept: Capture) -> Capture:
    """Return a capture with addresses and routes that do not expire.

    If no program of the host configures the NIC, no DHCP client renews them.
    """
    return replace(
        kept,
        addresses=tuple(address.for_good() for address in kept.addresses),
        routes=tuple(replace(route, expires=0) for route in kept.routes),
    )
