# SPDX-License-Identifier: LGPL-2.1-or-later
"""Patches: veth pairs with one end in the host, or another namespace, and one in a namespace."""

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.channel import NetlinkChannel, Sockets
from libvirt_natns.kernel.links import Links
from libvirt_natns.kernel.sysctl import Sysctls


@dataclass(frozen=True, slots=True)
class VethPair:
    """A veth pair: ``port`` in the host, ``link`` in the namespace.

    ``mtu``, in octets, is the MTU of the port.  ``link_mtu`` is the MTU of the namespace's
    end, where it is another.  ``outer`` is the namespace of the port, None for the host.
    """

    namespace: str
    link: str
    mac: str
    port: str
    port_mac: str
    altname: str
    mtu: int
    link_mtu: int | None = None
    outer: str | None = None

    @property
    def inner_mtu(self) -> int:
        """Return the MTU, in octets, of the namespace's end."""
        return self.link_mtu or self.mtu


class VethPairs:
    """The veth pairs between namespaces."""

    __slots__ = ("_sockets",)

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets

    def _outer(self, pair: VethPair) -> NetlinkChannel:
        return NetlinkChannel(self._sockets, pair.outer)

    def _inner(self, pair: VethPair) -> NetlinkChannel:
        return NetlinkChannel(self._sockets, pair.namespace)

    def differences(self, pair: VethPair) -> list[str]:
        """Return in words why a veth pair is not as asked for."""
        outer = Links(self._outer(pair)).get(pair.port)
        inner = Links(self._inner(pair)).get(pair.link)
        if outer is None:
            return [f"patch {pair.port} is missing"]
        if inner is None or outer.peer != inner.index:
            return [f"patch {pair.port} does not lead to {pair.link} in {pair.namespace}"]
        ends = (
            (outer, pair.port, pair.mtu),
            (inner, f"{pair.link} in {pair.namespace}", pair.inner_mtu),
        )
        return [
            f"{name} has MTU {end.mtu} instead of {mtu}"
            for end, name, mtu in ends
            if end.mtu != mtu
        ]

    def exists(self, pair: VethPair) -> bool:
        """Return True if both ends are there, and are each other's peer."""
        outer = Links(self._outer(pair)).get(pair.port)
        inner = Links(self._inner(pair)).get(pair.link)
        return outer is not None and inner is not None and outer.peer == inner.index

    def set_mtu(self, pair: VethPair) -> None:
        """Set the MTU of both ends."""
        Links(self._inner(pair)).set_mtu(pair.link, pair.inner_mtu)
        Links(self._outer(pair)).set_mtu(pair.port, pair.mtu)

    def create(self, pair: VethPair) -> None:
        """Make a veth pair; both ends are down.  Raises KernelError."""
        outer = self._outer(pair)
        code = outer.attempt(lambda: self._add(pair))
        if code == errno.EEXIST:
            # Each end outlives its deletion for a while, and both names must be free.
            Links(outer).delete(pair.port)
            Links(self._inner(pair)).delete(pair.link)
            code = outer.attempt(lambda: self._add(pair))
        if code:
            raise KernelError(
                f"the kernel refuses to make the patch {pair.port}", os.strerror(code)
            )
        index = outer.index(pair.port)
        # Kernels before 5.5 have no altnames; nothing depends on them.
        outer.attempt(lambda: outer.writer.link("property_add", index=index, altname=pair.altname))
        # A bridge port speaks no IP of its own.
        with suppress(KernelError):
            Sysctls(pair.outer).set(f"net/ipv6/conf/{pair.port}/disable_ipv6", "1")

    def _add(self, pair: VethPair) -> None:
        with netns.opened(pair.namespace) as descriptor:
            peer: dict[str, Any] = {
                "ifname": pair.link, "address": pair.mac, "mtu": pair.inner_mtu,
                "net_ns_fd": descriptor,
            }  # fmt: skip
            self._outer(pair).writer.link(
                "add", kind="veth", ifname=pair.port, address=pair.port_mac, mtu=pair.mtu, peer=peer
            )
