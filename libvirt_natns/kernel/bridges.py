# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bridges of one namespace and their ports."""

import os
from contextlib import suppress
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.kernel.channel import NetlinkChannel
from libvirt_natns.kernel.links import Links
from libvirt_natns.kernel.netlink import MULTICAST_ROUTER_ALWAYS

BRIDGE_PORTS = 1023
"""The most ports that a Linux bridge takes."""


class Bridges:
    """The bridges of one namespace."""

    __slots__ = ("_channel", "_links")

    def __init__(self, channel: NetlinkChannel) -> None:
        self._channel = channel
        self._links = Links(channel)

    def create(self, name: str, altname: str, mac: str) -> None:
        """Make a bridge without spanning tree, and set it up."""
        self._channel.change(
            f"to make the bridge {name}",
            lambda: self._channel.writer.link(
                "add", ifname=name, kind="bridge", address=mac, br_stp_state=0, br_forward_delay=0
            ),
        )
        index = self._channel.index(name)
        # Kernels before 5.5 have no altnames; nothing depends on them.
        self._channel.attempt(
            lambda: self._channel.writer.link("property_add", index=index, altname=altname)
        )
        self._links.set_up(name)

    def port_count(self, bridge: str) -> int:
        """Return the number of a bridge's ports."""
        return len(self._ports(bridge))

    def _ports(self, bridge: str) -> list[str]:
        ports = Path("/sys/class/net", bridge, "brif")
        if self._channel.namespace is None and ports.is_dir():
            # Listing all links takes 0.2 s with a few hundred of them.
            with suppress(FileNotFoundError), os.scandir(ports) as entries:
                return [entry.name for entry in entries]
        index = self._channel.index(bridge)
        return [link.name for link in self._channel.links() if link.master == index]

    def foreign_mtu(self, bridge: str, own: str) -> int | None:
        """Return the smallest MTU, in octets, of the ports that lead to other machines.

        Ports of guests do not count, nor does the port ``own``.  The kernel makes this MTU
        the bridge's own, unless the bridge's MTU was set, as libvirt does for
        ``<mtu size>``.
        """
        others = [
            link
            for name in self._ports(bridge)
            if name != own and not name.startswith(names.GUEST_PREFIX)
            if (link := self._links.get(name)) and link.kind != "tun"
        ]
        return min((link.mtu for link in others), default=None)

    def port_differences(self, port: str, bridge: str, *, hairpin: bool) -> list[str]:
        """Return in words why a link does not serve as a port of a bridge."""
        link = self._links.get(port)
        master = self._links.get(bridge)
        if master is None:
            return [f"bridge {bridge} is missing"]
        if link is None:
            return [f"patch {port} is missing"]
        differences = []
        if link.master != master.index:
            differences.append(f"patch {port} is not a port of bridge {bridge}")
        elif hairpin and not link.hairpin:
            differences.append(f"patch {port} is not in hairpin mode")
        if not link.up:
            differences.append(f"patch {port} is down")
        return differences

    def attach(self, port: str, bridge: str) -> None:
        """Make a link a port of a bridge, and set it up."""
        master = self._channel.index(bridge)
        index = self._channel.index(port)
        self._channel.change(
            f"to attach {port} to bridge {bridge}",
            lambda: self._channel.writer.link("set", index=index, master=master, state="up"),
        )

    def set_hairpin(self, port: str) -> None:
        """Let a bridge send a frame back through the port by which it came."""
        index = self._channel.index(port)
        self._channel.change(
            f"hairpin mode on {port}",
            lambda: self._channel.writer.brport("set", index=index, mode=1),
        )

    def gets_all_multicast(self, port: str) -> bool:
        """Return True if a bridge sends all multicast to a port, also of unknown groups."""
        link = self._links.get(port)
        return link is not None and link.all_multicast

    def set_all_multicast(self, port: str) -> None:
        """Let a bridge with multicast snooping send all multicast to a port."""
        index = self._channel.index(port)
        self._channel.change(
            f"all multicast for {port}",
            lambda: self._channel.writer.brport(
                "set", index=index, multicast_router=MULTICAST_ROUTER_ALWAYS
            ),
        )
