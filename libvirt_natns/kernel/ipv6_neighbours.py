# SPDX-License-Identifier: LGPL-2.1-or-later
"""IPv6 neighbours of one namespace: stations on a link, and addresses answered for by proxy."""

import errno
import socket
from collections.abc import Iterable
from functools import partial

from libvirt_natns.addresses import Address, by_family
from libvirt_natns.kernel.channel import NetlinkChannel
from libvirt_natns.kernel.netlink import NTF_PROXY


class IPv6Neighbours:
    """The IPv6 neighbour table of one namespace."""

    __slots__ = ("_channel",)

    def __init__(self, channel: NetlinkChannel) -> None:
        self._channel = channel

    def stations(self, link: str) -> list[Address]:
        """Return the addresses of stations on a link that have answered, or spoken."""
        listing = partial(self._channel.reader.neighbours, self._channel.index(link))
        return self._channel.listed(f"stations on {link}", listing)

    def proxied(self, link: str) -> set[Address]:
        """Return the addresses for which neighbours on a link are answered by proxy."""
        index = self._channel.index(link)
        neighbours = self._channel.listed(
            "neighbours", lambda: self._channel.reader.proxied_neighbours()
        )
        return {neighbour.address for neighbour in neighbours if neighbour.link == index}

    def replace_proxied(self, link: str, wanted: Iterable[Address]) -> None:
        """Answer neighbours on a link for exactly these addresses.

        The kernel does so only if the link's sysctl ``proxy_ndp`` is 1 and the route to
        the address leads over another link.
        """
        index = self._channel.index(link)
        present, asked = self.proxied(link), set(wanted)
        changes = [("add", asked - present), ("del", present - asked)]
        for verb, addresses in changes:
            for address in sorted(addresses, key=by_family):
                self._proxy(verb, index, address)

    def _proxy(self, verb: str, index: int, address: Address) -> None:
        self._channel.change(
            f"to {verb} the proxy for {address}",
            lambda: self._channel.writer.neigh(
                verb, family=socket.AF_INET6, dst=str(address), ifindex=index, flags=NTF_PROXY
            ),
            harmless=[errno.EEXIST, errno.ENOENT],
        )
