# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asks the kernel where it would send a packet, and whether the next station answers.

A look-up considers all rules and tables, and the filter of reverse paths. It sends nothing,
and sees neither marks nor the firewall.
"""

import socket
import time
from contextlib import closing, suppress
from dataclasses import dataclass

from libvirt_natns.addresses import Address
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns, rtnetlink
from libvirt_natns.kernel.channel import NetlinkChannel

LIMIT = 1.5
"""Seconds in which a neighbour must answer: the kernel asks once a second."""

POLL = 0.02
"""Seconds between two looks at the neighbour table."""

DISCARD = 9


@dataclass(frozen=True, slots=True)
class NextHop:
    """The link that a packet leaves by; ``gateway`` is None where its destination is on it."""

    link: str
    gateway: Address | None


class NoRouteError(KernelError):
    """The kernel would drop the packet; the fact is its reason, and ``number`` the error's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.number = error.errno or 0


def link_towards(
    destination: Address, source: Address | None = None, inward: str = ""
) -> str | None:
    """Return the link by which a packet leaves the caller's namespace; None without a route.

    With ``inward`` and ``source`` the packet is forwarded, and comes from that link.
    """
    with suppress(OSError), rtnetlink.Session() as session:
        index = socket.if_nametoindex(inward) if inward else None
        route = session.route_of(destination, source, index)
        return socket.if_indextoname(route.link) if route.link else None
    return None


class RouteLookup:
    """Look-ups in one namespace."""

    __slots__ = ("_channel",)

    def __init__(self, channel: NetlinkChannel) -> None:
        self._channel = channel

    def next_hop(
        self, destination: Address, *, source: Address | None = None, inward: str | None = None
    ) -> NextHop:
        """Return where a packet goes that comes in by a link; None is an own packet.

        Raises NoRouteError where it goes nowhere, and KernelError without the link.
        """
        index = self._channel.index(inward) if inward else None
        try:
            route = self._channel.reader.route_of(destination, source, index)
            with netns.entered(self._channel.namespace):
                return NextHop(socket.if_indextoname(route.link or 0), route.gateway)
        except OSError as error:
            raise NoRouteError(error) from error

    def answers(self, station: Address, link: str) -> bool:
        """True if a station on a link answers.  Takes up to ``LIMIT`` seconds if not.

        The kernel asks for the MAC address as it does for each packet: a datagram to the
        port "discard" makes it ask.
        """
        index = self._channel.index(link)
        deadline = time.monotonic() + LIMIT
        family = socket.AF_INET if station.version == 4 else socket.AF_INET6
        # IPv6 needs the link of a link-local address, and IPv4 has no such number.
        place = (
            (str(station), DISCARD) if station.version == 4 else (str(station), DISCARD, 0, index)
        )
        with suppress(OSError):
            if self._channel.reader.has_answered(index, station):
                return True
            with netns.entered(self._channel.namespace):
                packet = socket.socket(family, socket.SOCK_DGRAM)
            with closing(packet):
                packet.sendto(b"", place)
                while time.monotonic() < deadline:
                    if self._channel.reader.has_answered(index, station):
                        return True
                    time.sleep(POLL)
        return False
