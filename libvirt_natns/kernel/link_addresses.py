# SPDX-License-Identifier: LGPL-2.1-or-later
"""IP addresses of the links of one namespace."""

import errno
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

from libvirt_natns.addresses import Address, Interface, IPNetwork
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netlink
from libvirt_natns.kernel.channel import NetlinkChannel
from libvirt_natns.kernel.links import Links


class LinkAddresses:
    """The addresses of one namespace's links."""

    __slots__ = ("_channel",)

    def __init__(self, channel: NetlinkChannel) -> None:
        self._channel = channel

    def of(self, link: str) -> set[Interface]:
        """Return all addresses of a link, with their prefixes."""
        index = self._channel.index(link)
        if self._channel.namespace is None:
            # A host has many links: the addresses of others need not even be read.
            listing = partial(self._channel.reader.addresses, index)
            addresses = self._channel.listed(f"addresses of link {index}", listing)
        else:
            addresses = self._channel.listed("addresses", lambda: self._channel.reader.addresses())
        return {address.interface for address in addresses if address.link == index}

    def beyond_link(self) -> set[Address]:
        """Return all addresses of all links but those that are valid on one link alone.

        Each bridge with IPv6 has a link-local address, and there may be a thousand bridges.
        """
        listing = partial(self._channel.reader.addresses, link_local=False)
        addresses = self._channel.listed("addresses of the host", listing)
        return {address.interface.ip for address in addresses}

    def link_in(self, subnet: IPNetwork) -> str | None:
        """Return the name of the first link with an address in a subnet, or None."""
        addresses = self._channel.listed("addresses", lambda: self._channel.reader.addresses())
        indexes = {address.link for address in addresses if address.interface.ip in subnet}
        return next((link.name for link in self._channel.links() if link.index in indexes), None)

    def foreign(self, link: str, wanted: Iterable[Interface]) -> set[Interface]:
        """Return a link's addresses that are not wanted, without those the kernel makes."""
        return {
            address
            for address in self.of(link) - set(wanted)
            if address.version == 4 or not address.is_link_local
        }

    def replace(self, link: str, wanted: Iterable[Interface]) -> None:
        """Give a link exactly these addresses, beside those that the kernel makes."""
        # Foreign ones first: with the oldest of a subnet the kernel removes all others.
        for address in self.foreign(link, wanted):
            self.remove(link, address)
        present = self.of(link)
        for address in wanted:
            if address not in present:
                self.add(link, address)

    def add(self, link: str, address: Interface) -> None:
        """Add an address to a link, unless the link has it.  Raises KernelError."""
        index = self._channel.index(link)
        request: dict[str, Any] = {
            "address": str(address.ip), "prefixlen": address.network.prefixlen,
        }  # fmt: skip
        if address.version == 6:
            # The caller has probed the address.  Without the flag it would not answer at once.
            request["flags"] = netlink.IFA_F_NODAD
        elif address.network.prefixlen < 31:
            request["broadcast"] = str(address.network.broadcast_address)
        self._channel.change(
            f"the address {address} on {link}",
            lambda: self._channel.writer.addr("add", index=index, **request),
            harmless=[errno.EEXIST],
        )

    def remove(self, link: str, address: Interface) -> None:
        """Remove an address from a link, if both are there.  Raises KernelError."""
        present = Links(self._channel).get(link)
        if present is None:
            return
        code = self._channel.attempt(
            lambda: self._channel.writer.addr(
                "del",
                index=present.index,
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
            )
        )
        if code not in (0, errno.EADDRNOTAVAIL, errno.ENODEV):
            raise KernelError(
                f"the kernel keeps the address {address} on {link}", os.strerror(code)
            )
