# SPDX-License-Identifier: LGPL-2.1-or-later
"""Macvlans of one namespace on links of the host, in macvlan's mode "bridge"."""

import os
from typing import Any

from libvirt_natns import names
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.channel import NetlinkChannel
from libvirt_natns.kernel.links import Links


class Macvlans:
    """The macvlans of one namespace; their parents are links of the host."""

    __slots__ = ("_channel", "_host")

    def __init__(self, channel: NetlinkChannel) -> None:
        self._channel = channel
        self._host = NetlinkChannel(channel.sockets, None)

    def differences(self, link: str, parent: str, mtu: int) -> list[str]:
        """Return in words why a link is not the macvlan that is asked for; ``mtu`` in octets."""
        place = self._channel.place
        if Links(self._host).get(parent) is None:
            return [f"interface {parent} is missing"]
        if not self.exists(link, parent):
            return [f"{link} in {place} is not a macvlan on {parent}"]
        macvlan = Links(self._channel).get(link)
        if macvlan is None or macvlan.mtu == mtu:
            return []
        return [f"{link} in {place} has MTU {macvlan.mtu} instead of {mtu}"]

    def exists(self, link: str, parent: str) -> bool:
        """Return True if a link is a macvlan on that link of the host."""
        lower, upper = Links(self._host).get(parent), Links(self._channel).get(link)
        if lower is None or upper is None:
            return False
        return upper.kind == "macvlan" and upper.peer == lower.index

    def create(self, link: str, mac: str, parent: str, mtu: int) -> None:
        """Make a macvlan on a link of the host, down, in place of a link of that name."""
        Links(self._channel).delete(link)
        with netns.opened(self._channel.place) as descriptor:
            _add(self._host, descriptor, parent, {"ifname": link, "address": mac, "mtu": mtu})

    def probe(self, parent: str) -> None:
        """Make a macvlan on a link of the host, in a namespace that ends with this call.

        Raises KernelError if the kernel, or that link, takes no macvlan.
        """
        descriptor = netns.make()
        try:
            _add(self._host, descriptor, parent, {"ifname": names.UPSTREAM_LINK})
        finally:
            os.close(descriptor)


def _add(host: NetlinkChannel, namespace: int, parent: str, request: dict[str, Any]) -> None:
    """Make a macvlan in the namespace of a descriptor."""
    index = host.index(parent)
    host.change(
        f"to make a macvlan on {parent}",
        lambda: host.writer.link(
            "add",
            kind="macvlan",
            macvlan_mode="bridge",
            net_ns_fd=namespace,
            link=index,
            **request,
        ),
    )
