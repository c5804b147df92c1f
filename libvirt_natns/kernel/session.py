# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session with the kernel: namespaces, and views of the settings of each.

``kernel.at("nat-a").links.set_up("upstream")`` changes a link of a namespace;
``kernel.host`` is the view of the host.  Every verb states a wish and changes only what
differs.  To delete what is missing is success.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.bridges import Bridges
from libvirt_natns.kernel.channel import NetlinkChannel, Sockets
from libvirt_natns.kernel.ipv6_neighbours import IPv6Neighbours
from libvirt_natns.kernel.link_addresses import LinkAddresses
from libvirt_natns.kernel.links import Links
from libvirt_natns.kernel.macvlans import Macvlans
from libvirt_natns.kernel.policy_rules import PolicyRules
from libvirt_natns.kernel.queues import Queues
from libvirt_natns.kernel.route_limits import RouteLimits
from libvirt_natns.kernel.route_lookup import RouteLookup
from libvirt_natns.kernel.routes import Routes
from libvirt_natns.kernel.sysctl import Sysctls
from libvirt_natns.kernel.veth import VethPairs

LOOPBACK = 1
"""The index of ``lo``, the first link of every namespace."""


class NamespaceView:
    """The network settings of one namespace, by topic; ``namespace`` None is the host.

    A view holds no socket of its own and may be kept for as long as its session.
    """

    __slots__ = ("_channel",)

    def __init__(self, sockets: Sockets, namespace: str | None) -> None:
        self._channel = NetlinkChannel(sockets, namespace)

    @property
    def links(self) -> Links:
        return Links(self._channel)

    @property
    def bridges(self) -> Bridges:
        return Bridges(self._channel)

    @property
    def macvlans(self) -> Macvlans:
        return Macvlans(self._channel)

    @property
    def addresses(self) -> LinkAddresses:
        return LinkAddresses(self._channel)

    @property
    def routes(self) -> Routes:
        return Routes(self._channel)

    @property
    def route_lookup(self) -> RouteLookup:
        return RouteLookup(self._channel)

    @property
    def policy_rules(self) -> PolicyRules:
        return PolicyRules(self._channel)

    @property
    def route_limits(self) -> RouteLimits:
        return RouteLimits(self._channel)

    @property
    def queues(self) -> Queues:
        return Queues(self._channel)

    @property
    def neighbours6(self) -> IPv6Neighbours:
        return IPv6Neighbours(self._channel)

    @property
    def sysctls(self) -> Sysctls:
        return Sysctls(self._channel.namespace)


class Kernel:
    """A session with the kernel, for one thread at a time; close it, or use it in a ``with``."""

    def __init__(self) -> None:
        self._sockets = Sockets()
        self._depth = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all sockets."""
        self._sockets.close(*self._sockets.namespaces())

    def at(self, namespace: str | None) -> NamespaceView:
        """Return the view of a namespace; None is the host."""
        return NamespaceView(self._sockets, namespace)

    @property
    def host(self) -> NamespaceView:
        """Return the view of the host."""
        return self.at(None)

    @property
    def patches(self) -> VethPairs:
        """Return the veth pairs between two namespaces."""
        return VethPairs(self._sockets)

    @contextmanager
    def work(self) -> Iterator[None]:
        """Keep the sockets of namespaces open for the body, which may be part of another body.

        The session holds no namespace after the outermost body.
        """
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.forget()
                self._sockets.close(*self._sockets.namespaces() - {None})

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Read each thing only once in the body, until ``forget`` or the end of the work.

        The body must change nothing.
        """
        self._sockets.remembers = True
        try:
            yield
        finally:
            self._sockets.remembers = False

    def forget(self) -> None:
        """Drop all remembered readings: something was changed."""
        self._sockets.readings.clear()

    def distrust(self) -> None:
        """Drop all remembered readings, and check each namespace before it is used again.

        This is for a lock that has just become free: until then, others may have changed
        everything, and put another namespace in the place of one.
        """
        self.forget()
        self._sockets.doubt()

    def create_namespace(self, name: str, owner: str) -> None:
        """Make a namespace, and note its owner as the alias of its loopback interface."""
        descriptor = netns.make()
        try:
            netns.bind(name, descriptor)
        except OSError as error:
            raise KernelError(f"cannot create namespace {name}", str(error)) from error
        finally:
            os.close(descriptor)
        channel = NetlinkChannel(self._sockets, name)
        channel.change(
            f"a tag for namespace {name}",
            lambda: channel.writer.link("set", index=LOOPBACK, ifalias=_tag(owner)),
        )

    def delete_namespace(self, name: str) -> None:
        """Remove a namespace's name; the kernel ends the namespace once no process is inside."""
        self._sockets.close(name)
        try:
            netns.remove(name)
        except OSError as error:
            raise KernelError(f"cannot delete namespace {name}", str(error)) from error

    def namespace_owner(self, name: str) -> str | None:
        """Return the uuid of the network that a namespace was made for.

        "" is a namespace that is not ours.  None is no namespace, or only the empty file
        that a killed start left behind.
        """
        if not netns.exists(name):
            return None
        with self.work():
            link = self.at(name).links.get("lo")
        alias = link.alias if link else ""
        return alias.removeprefix(_tag("")) if alias.startswith(_tag("")) else ""


def _tag(owner: str) -> str:
    return f"libvirt-natns {owner}"
