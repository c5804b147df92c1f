# SPDX-License-Identifier: LGPL-2.1-or-later
"""Namespaces, links, addresses, routes and sysctls: the only user of pyroute2's route socket.

pyroute2 makes the changes; looking is ``rtnetlink``'s.  Sockets for the host and
for each namespace are opened inside and usable from outside: nothing jumps
between namespaces to make a change.  A socket keeps its namespace from ending,
whoever deletes it: those of namespaces are closed at the end of each piece of
work.

Every verb states what it wants and changes only what differs; deleting what is
missing is success.
"""

import errno
import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from libvirt_natns import names
from libvirt_natns.addresses import Address, Family, Interface, IPNetwork, by_family
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns, rtnetlink
from libvirt_natns.kernel.netlink import (
    MULTICAST_ROUTER_ALWAYS,
    NTF_PROXY,
    InterruptedDumpError,
)
from libvirt_natns.kernel.pyroute2_lite import IPRoute, NetlinkError
from libvirt_natns.kernel.rtnetlink import Link, LinkAddress, ProxiedNeighbour, Route

BRIDGE_PORTS = 1023
"""The most ports that a Linux bridge takes."""

DUMP_TRIES = 100
"""How often a listing is asked for again that a change made on the way invalid."""

LOOPBACK = 1
"""The index of ``lo``, the first link of every namespace."""

MAIN_TABLE = 254
RTPROT_KERNEL = 2
RTPROT_BOOT = 3
RTNH_F_ONLINK = 4
SCOPE_GLOBAL = 0
SCOPE_LINK = 253
IFA_F_NODAD = 2
METRICS: dict[Family, int | None] = {4: None, 6: 1024}
"""The metric of a route for which none is asked, as the kernel tells it."""
SUBNET_METRICS: dict[Family, int | None] = {4: None, 6: 256}
"""That of the route to a link's own subnet, which the kernel makes."""

IPV6_ROUTES = "/proc/thread-self/net/ipv6_route"
RTF_ANYCAST = 0x100000
RTF_LOCAL = 0x80000000
WITHIN_LINK = ("fe8", "fe9", "fea", "feb", "ff")
"""How link-local and multicast destinations begin there."""
T = TypeVar("T")


class Kernel:
    """A session with the kernel; close it, or use it in a ``with``.

    For one thread at a time.  ``spares``, of a resident process, are where its
    namespaces come from.
    """

    def __init__(self, spares: netns.Spares | None = None) -> None:
        self._sockets: dict[str | None, Any] = {}
        self._sessions: dict[str | None, rtnetlink.Session] = {}
        self._spares = spares
        self._depth = 0
        self._memory: dict[tuple[str, str | None, str], Any] = {}
        self._remembers = False

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
        self._leave(*{*self._sockets, *self._sessions})

    @contextmanager
    def work(self) -> Iterator[None]:
        """A piece of work, which may be part of another one.

        At its end no namespace is held any more.
        """
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.forget()
                self._leave(*{*self._sockets, *self._sessions} - {None})

    def _leave(self, *namespaces: str | None) -> None:
        for name in namespaces:
            for opened in (self._sockets, self._sessions):
                found = opened.pop(name, None)
                if found is not None:
                    found.close()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Ask for each thing only once in here, until ``forget`` or the work's end.

        Nothing must be changed inside.
        """
        self._remembers = True
        try:
            yield
        finally:
            self._remembers = False

    def forget(self) -> None:
        """Ask again for what was remembered: something was changed."""
        self._memory.clear()

    def _look(self, what: str, namespace: str | None, name: str, ask: Callable[[], T]) -> T:
        if not self._remembers:
            return ask()
        key = (what, namespace, name)
        if key not in self._memory:
            self._memory[key] = ask()
        found: T = self._memory[key]
        return found

    def _socket(self, namespace: str | None) -> Any:  # noqa: ANN401
        if namespace not in self._sockets:
            with netns.entered(namespace):
                self._sockets[namespace] = IPRoute()
        return self._sockets[namespace]

    def _session(self, namespace: str | None) -> rtnetlink.Session:
        if namespace not in self._sessions:
            with netns.entered(namespace):
                self._sessions[namespace] = rtnetlink.Session()
        return self._sessions[namespace]

    def _listed(self, what: str, namespace: str | None, listing: Callable[[], list[T]]) -> list[T]:
        """All of a listing, such as that of links; whole, although others make changes."""

        def whole() -> list[T]:
            for _ in range(DUMP_TRIES):
                with suppress(InterruptedDumpError):
                    return listing()
            raise KernelError("the kernel's network settings keep changing", "try again")

        try:
            return self._look(what, namespace, "", whole)
        except OSError as error:
            raise KernelError(f"cannot list the {what}", error.strerror or str(error)) from error

    def _links(self, namespace: str | None = None) -> list[Link]:
        """All links of the host, or of a namespace."""
        return self._listed("links", namespace, self._session(namespace).links)

    def _addresses(self, namespace: str | None) -> list[LinkAddress]:
        return self._listed("addresses", namespace, self._session(namespace).addresses)

    def _routes(self, namespace: str | None, *families: Family) -> list[Route]:
        """All routes of the main table, of these families or both."""
        found = self._listed(
            f"IPv{families[0]} routes" if families else "routes",
            namespace,
            lambda: self._session(namespace).routes(*families),
        )
        return [route for route in found if route.table == MAIN_TABLE]

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """Run one request; a refusal becomes a KernelError that says what it was for."""
        try:
            return call()
        except NetlinkError as error:
            raise KernelError(f"the kernel refuses {what}", os.strerror(error.code)) from error

    # -- namespaces --------------------------------------------------------

    def create_namespace(self, name: str, owner: str) -> None:
        """Make a namespace and note on its loopback interface whom it belongs to."""
        spare = self._spares.take() if self._spares else None
        descriptor = netns.make() if spare is None else spare
        try:
            netns.bind(name, descriptor)
        except OSError as error:
            raise KernelError(f"cannot create namespace {name}", str(error)) from error
        finally:
            os.close(descriptor)
        self._socket(name).link("set", index=LOOPBACK, ifalias=_tag(owner))

    def delete_namespace(self, name: str) -> None:
        """Remove a namespace's name; the kernel ends it once nobody is inside."""
        self._leave(name)
        try:
            netns.remove(name)
        except OSError as error:
            raise KernelError(f"cannot delete namespace {name}", str(error)) from error

    def namespace_owner(self, name: str) -> str | None:
        """The uuid of the network that a namespace was made for.

        "" for a namespace that is not ours; None where there is none, or only
        the empty file that a killed start left behind.
        """
        if not netns.exists(name):
            return None
        with self.work():
            link = self.link(name, "lo")
        alias = link.alias if link else ""
        return alias.removeprefix(_tag("")) if alias.startswith(_tag("")) else ""

    # -- links -------------------------------------------------------------

    def link(self, namespace: str | None, name: str) -> Link | None:
        """What the kernel says of a link, or None where there is no such link."""
        return self._look("link", namespace, name, lambda: self._link(namespace, name))

    def _link(self, namespace: str | None, name: str) -> Link | None:
        try:
            return self._session(namespace).link(name)
        except OSError as error:
            raise KernelError(f"cannot read link {name}", error.strerror or str(error)) from error

    def _index(self, namespace: str | None, name: str) -> int:
        # Asking netlink for all that is to be said of a link takes ten times as long.
        try:
            with netns.entered(namespace):
                return socket.if_nametoindex(name)
        except OSError:
            raise KernelError(f"there is no link {name} in {namespace or 'the host'}") from None

    def mtu(self, name: str) -> int | None:
        """The MTU, in octets, of a link of the host."""
        link = self.link(None, name)
        return link.mtu if link else None

    def mac(self, name: str) -> str | None:
        """The MAC address of a link of the host, in lower case."""
        link = self.link(None, name)
        return link.mac if link else None

    def is_up(self, name: str) -> bool:
        """Whether a link of the host is set up."""
        link = self.link(None, name)
        return link is not None and link.up

    def is_bridge(self, name: str) -> bool:
        """Whether a link of the host is a Linux bridge."""
        link = self.link(None, name)
        return link is not None and link.kind == "bridge"

    def port_count(self, bridge: str, namespace: str | None = None) -> int:
        """How many ports a bridge has."""
        return len(self._ports(bridge, namespace))

    def _ports(self, bridge: str, namespace: str | None = None) -> list[str]:
        ports = Path("/sys/class/net", bridge, "brif")
        if namespace is None and ports.is_dir():
            # Listing all links takes 0.2 s with a few hundred of them.
            with os.scandir(ports) as entries:
                return [entry.name for entry in entries]
        index = self._index(namespace, bridge)
        return [link.name for link in self._links(namespace) if link.master == index]

    def foreign_mtu(self, bridge: str, own: str) -> int | None:
        """The smallest MTU, in octets, of a bridge's ports that lead to somewhere else.

        Neither to a guest nor, by the port ``own``, to a namespace.  The kernel
        makes it the bridge's own MTU, but not where somebody has set that one, as
        libvirt does for ``<mtu size>``.
        """
        others = [
            link
            for name in self._ports(bridge)
            if name != own and not name.startswith(names.GUEST_PREFIX)
            if (link := self.link(None, name)) and link.kind != "tun"
        ]
        return min((link.mtu for link in others), default=None)

    def delete_link(self, name: str, namespace: str | None = None) -> None:
        """Delete a link, and with one end of a veth pair the other one too."""
        link = self.link(namespace, name)
        if link is None:
            return
        try:
            self._socket(namespace).link("del", index=link.index)
        except NetlinkError as error:
            if error.code not in (errno.ENODEV, errno.ENXIO):
                raise KernelError(f"cannot delete link {name}", os.strerror(error.code)) from error

    def delete_links(self, group: int, *names: str) -> None:
        """Delete links of the host, where they are there; ``group`` is a number of theirs alone.

        All at once: the kernel waits for each deletion to have gone round (8 ms
        and more), and for those of a group once.
        """
        try:
            for name in names:
                with suppress(KernelError):
                    index = self._index(None, name)
                    self._socket(None).link("set", index=index, group=group)
            self._socket(None).link("del", group=group)
        except NetlinkError:
            # One of them has just gone by itself, or there was none.
            for name in names:
                self.delete_link(name)

    def set_up(self, namespace: str | None, name: str) -> None:
        """Set a link up."""
        index = self._index(namespace, name)
        self._ask(
            f"to set {name} up",
            lambda: self._socket(namespace).link("set", index=index, state="up"),
        )

    def link_differences(self, namespace: str | None, name: str) -> list[str]:
        """Why a link is not simply up."""
        link = self.link(namespace, name)
        where = namespace or "the host"
        if link is None:
            return [f"link {name} is missing in {where}"]
        return [] if link.up else [f"link {name} is down in {where}"]

    # -- patches -----------------------------------------------------------

    def patch_differences(
        self,
        namespace: str,
        link: str,
        port: str,
        mtu: int,
        link_mtu: int | None = None,
        where: str | None = None,
    ) -> list[str]:
        """What is wrong with a veth pair between the host, or ``where``, and a namespace.

        ``link_mtu`` is the namespace's end's, where that is another one.
        """
        outer = self.link(where, port)
        inner = self.link(namespace, link)
        if outer is None:
            return [f"patch {port} is missing"]
        if inner is None or outer.peer != inner.index:
            return [f"patch {port} does not lead to {link} in {namespace}"]
        found = []
        ends = ((outer, port, mtu), (inner, f"{link} in {namespace}", link_mtu or mtu))
        for end, of, wanted in ends:
            if end.mtu != wanted:
                found.append(f"{of} has MTU {end.mtu} instead of {wanted}")
        return found

    def has_patch(self, namespace: str, link: str, port: str, where: str | None = None) -> bool:
        """Whether both ends of a veth pair are there, and are each other's."""
        outer = self.link(where, port)
        inner = self.link(namespace, link)
        return outer is not None and inner is not None and outer.peer == inner.index

    def create_patch(
        self,
        namespace: str,
        link: str,
        mac: str,
        port: str,
        port_mac: str,
        altname: str,
        mtu: int,
        link_mtu: int | None = None,
        where: str | None = None,
    ) -> None:
        """Make a veth pair with one end in the host and one in a namespace, both down.

        ``where`` is another namespace for the end in the host.
        """
        outer = {"ifname": port, "address": port_mac, "mtu": mtu}
        inner = {"ifname": link, "address": mac, "mtu": link_mtu or mtu}
        try:
            self._create_veth(outer, inner, namespace, where)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise KernelError(
                    f"the kernel refuses to make the patch {port}", os.strerror(error.code)
                ) from error
            # A namespace's end outlives its deletion for a while, and so does the
            # host's: both names must be free.
            self.delete_link(port, where)
            self.delete_link(link, namespace)
            self._ask(
                f"to make the patch {port}",
                lambda: self._create_veth(outer, inner, namespace, where),
            )
        index = self._index(where, port)
        # Kernels before 5.5 have no altnames; nothing depends on them.
        with suppress(NetlinkError):
            self._socket(where).link("property_add", index=index, altname=altname)
        # A bridge port speaks no IP of its own.
        with suppress(KernelError):
            self.set_sysctl(where, f"net/ipv6/conf/{port}/disable_ipv6", "1")

    def _create_veth(
        self, outer: dict[str, Any], inner: dict[str, Any], namespace: str, where: str | None
    ) -> None:
        descriptor = os.open(names.namespace_path(namespace), os.O_RDONLY | os.O_CLOEXEC)
        try:
            peer = {**inner, "net_ns_fd": descriptor}
            self._socket(where).link("add", kind="veth", **outer, peer=peer)
        finally:
            os.close(descriptor)

    # -- macvlans ----------------------------------------------------------

    def macvlan_differences(self, namespace: str, link: str, parent: str, mtu: int) -> list[str]:
        """What is wrong with a namespace's macvlan on a link of the host."""
        if self.link(None, parent) is None:
            return [f"interface {parent} is missing"]
        if not self.has_macvlan(namespace, link, parent):
            return [f"{link} in {namespace} is not a macvlan on {parent}"]
        found = self.link(namespace, link)
        if found is None or found.mtu == mtu:
            return []
        return [f"{link} in {namespace} has MTU {found.mtu} instead of {mtu}"]

    def has_macvlan(self, namespace: str, link: str, parent: str) -> bool:
        """Whether a namespace's link is a macvlan on that link of the host."""
        lower, found = self.link(None, parent), self.link(namespace, link)
        if lower is None or found is None:
            return False
        return found.kind == "macvlan" and found.peer == lower.index

    def create_macvlan(self, namespace: str, link: str, mac: str, parent: str, mtu: int) -> None:
        """Make a macvlan in a namespace on a link of the host, down, in place of what is there."""
        self.delete_link(link, namespace)
        descriptor = os.open(names.namespace_path(namespace), os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._add_macvlan(descriptor, parent, {"ifname": link, "address": mac, "mtu": mtu})
        finally:
            os.close(descriptor)

    def try_macvlan(self, parent: str) -> None:
        """Make a macvlan on a link of the host, in a namespace that ends with this call.

        Raises KernelError where the kernel, or that link, has none.
        """
        descriptor = netns.make()
        try:
            self._add_macvlan(descriptor, parent, {"ifname": names.UPSTREAM_LINK})
        finally:
            os.close(descriptor)

    def _add_macvlan(self, namespace: int, parent: str, request: dict[str, Any]) -> None:
        index = self._index(None, parent)
        self._ask(
            f"to make a macvlan on {parent}",
            lambda: self._socket(None).link(
                "add",
                kind="macvlan",
                macvlan_mode="bridge",
                net_ns_fd=namespace,
                link=index,
                **request,
            ),
        )

    def master_of(self, name: str) -> Link | None:
        """The link of the host, such as a bridge, that another one belongs to."""
        link = self.link(None, name)
        if link is None or link.master is None:
            return None
        return next((each for each in self._links() if each.index == link.master), None)

    def set_mtu(self, namespace: str | None, name: str, mtu: int) -> None:
        """Set a link's MTU, in octets."""
        index = self._index(namespace, name)
        self._ask(
            f"to set the MTU of {name} to {mtu}",
            lambda: self._socket(namespace).link("set", index=index, mtu=mtu),
        )

    def port_differences(
        self, port: str, bridge: str, *, hairpin: bool, outer: str | None = None
    ) -> list[str]:
        """Why a link of the host, or of another namespace, does not serve as a bridge's port."""
        link = self.link(outer, port)
        master = self.link(outer, bridge)
        if master is None:
            return [f"bridge {bridge} is missing"]
        if link is None:
            return [f"patch {port} is missing"]
        found = []
        if link.master != master.index:
            found.append(f"patch {port} is not a port of bridge {bridge}")
        elif hairpin and not link.hairpin:
            found.append(f"patch {port} is not in hairpin mode")
        if not link.up:
            found.append(f"patch {port} is down")
        return found

    def attach(self, port: str, bridge: str, outer: str | None = None) -> None:
        """Make a link of the host, or of another namespace, a port of a bridge; set it up."""
        master = self._index(outer, bridge)
        index = self._index(outer, port)
        self._ask(
            f"to attach {port} to bridge {bridge}",
            lambda: self._socket(outer).link("set", index=index, master=master, state="up"),
        )

    def set_hairpin(self, port: str, outer: str | None = None) -> None:
        """Have a bridge send back through a port what came in by it."""
        index = self._index(outer, port)
        self._ask(
            f"hairpin mode on {port}",
            lambda: self._socket(outer).brport("set", index=index, mode=1),
        )

    def gets_all_multicast(self, port: str, outer: str | None = None) -> bool:
        """Whether a bridge sends all multicast to a port, also what nobody there asked for."""
        link = self.link(outer, port)
        return link is not None and link.all_multicast

    def set_all_multicast(self, port: str, outer: str | None = None) -> None:
        """Have a bridge that watches who asks for which multicast not do so for a port."""
        index = self._index(outer, port)
        self._ask(
            f"all multicast for {port}",
            lambda: self._socket(outer).brport(
                "set", index=index, multicast_router=MULTICAST_ROUTER_ALWAYS
            ),
        )

    def create_bridge(
        self, name: str, altname: str, mac: str, namespace: str | None = None
    ) -> None:
        """Make a bridge in a namespace (None: the host), without spanning tree; set it up."""
        self._ask(
            f"to make the bridge {name}",
            lambda: self._socket(namespace).link(
                "add", ifname=name, kind="bridge", address=mac, br_stp_state=0, br_forward_delay=0
            ),
        )
        with suppress(NetlinkError):
            index = self._index(namespace, name)
            self._socket(namespace).link("property_add", index=index, altname=altname)
        self.set_up(namespace, name)

    def try_links(self, *, macvlan: bool = False) -> None:
        """Make the kinds of links that a network needs: for a namespace that ends soon.

        Raises KernelError where this kernel lacks one.
        """
        self.create_bridge("bridge", "natns-trial", "0a:00:00:00:00:01")
        self._ask(
            "to make a veth pair",
            lambda: self._socket(None).link(
                "add", ifname="outer", kind="veth", peer={"ifname": "inner"}
            ),
        )
        if macvlan:
            parent = self._index(None, "outer")
            self._ask(
                "to make a macvlan",
                lambda: self._socket(None).link(
                    "add", ifname="macvlan", kind="macvlan", link=parent, macvlan_mode="bridge"
                ),
            )

    # -- addresses ---------------------------------------------------------

    def addresses(self, namespace: str | None, link: str) -> set[Interface]:
        """All addresses of a link, with their prefixes."""
        index = self._index(namespace, link)
        if namespace is None:
            # A host has many links: what others have need not even be read.
            listing = partial(self._session(None).addresses, index)
            found = self._listed(f"addresses of link {index}", None, listing)
        else:
            found = self._addresses(namespace)
        return {address.interface for address in found if address.link == index}

    def host_addresses(self) -> set[Address]:
        """All addresses of the host itself, but for those of one link alone.

        Each bridge with IPv6 has such a one, and there may be a thousand bridges.
        """
        listing = partial(self._session(None).addresses, link_local=False)
        found = self._listed("addresses of the host", None, listing)
        return {address.interface.ip for address in found}

    def host_link_in(self, subnet: IPNetwork) -> str | None:
        """The name of the host's first link with an address in a subnet."""
        found = [each.link for each in self._addresses(None) if each.interface.ip in subnet]
        return next((each.name for each in self._links() if each.index in found), None)

    def host_gateways(self, family: Family) -> set[Address]:
        """The routers of the host's default routes in a family."""
        routes = (each for each in self._routes(None, family) if each.destination.prefixlen == 0)
        return {route.gateway for route in routes if route.gateway is not None}

    def foreign_addresses(
        self, namespace: str | None, link: str, wanted: Iterable[Interface]
    ) -> set[Interface]:
        """The addresses of a link that are not wanted, the kernel's own making apart."""
        return {
            address
            for address in self.addresses(namespace, link) - set(wanted)
            if address.version == 4 or not address.is_link_local
        }

    def set_addresses(self, namespace: str | None, link: str, wanted: Iterable[Interface]) -> None:
        """Give a link exactly these addresses, and those that the kernel makes itself."""
        # Foreign ones first: with the oldest of a subnet the kernel removes all others.
        foreign = self.foreign_addresses(namespace, link, wanted)
        for address in foreign:
            self.remove_address(namespace, link, address)
        present = self.addresses(namespace, link)
        for address in wanted:
            if address not in present:
                self.add_address(namespace, link, address)

    def add_address(self, namespace: str | None, link: str, address: Interface) -> None:
        """Add an address to a link, unless it has it; one of IPv6 answers at once."""
        index = self._index(namespace, link)
        request: dict[str, Any] = {
            "address": str(address.ip), "prefixlen": address.network.prefixlen,
        }  # fmt: skip
        if address.version == 6:
            # Whoever is to have it knows already that nobody else does.
            request["flags"] = IFA_F_NODAD
        elif address.network.prefixlen < 31:
            request["broadcast"] = str(address.network.broadcast_address)
        try:
            self._socket(namespace).addr("add", index=index, **request)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise KernelError(
                    f"the kernel refuses the address {address} on {link}",
                    os.strerror(error.code),
                ) from error

    def remove_address(self, namespace: str | None, link: str, address: Interface) -> None:
        """Remove an address from a link, if both are there."""
        found = self.link(namespace, link)
        if found is None:
            return
        try:
            self._socket(namespace).addr(
                "del",
                index=found.index,
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
            )
        except NetlinkError as error:
            if error.code not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                raise KernelError(
                    f"the kernel keeps the address {address} on {link}", os.strerror(error.code)
                ) from error

    # -- routes ------------------------------------------------------------

    def has_route(
        self, namespace: str | None, destination: IPNetwork, gateway: Address | None, link: str
    ) -> bool:
        """Whether the main table leads to ``destination`` through this gateway alone.

        ``gateway`` None: directly, over the link.
        """
        index = self._index(namespace, link)
        found = [
            (route.gateway, route.link)
            for route in self._routes(namespace, _family(destination))
            if route.destination == destination
        ]
        return found == [(gateway, index)]

    def set_route(
        self,
        namespace: str | None,
        destination: IPNetwork,
        gateway: Address | None,
        link: str,
        *,
        alone: bool = False,
    ) -> None:
        """Lead ``destination`` through this gateway, or directly, and in no other way.

        ``alone``: there is no other, as the namespace is new.
        """
        index = self._index(namespace, link)
        metric = METRICS[_family(destination)]
        request: dict[str, Any] = {"dst": str(destination), "oif": index}
        if gateway is not None:
            request["gateway"] = str(gateway)
        if metric is not None:
            request["priority"] = metric
        self._ask(
            f"the route to {destination}{f' via {gateway}' if gateway else ''}",
            lambda: self._socket(namespace).route("replace", **request),
        )
        for route in [] if alone else self._routes(namespace, _family(destination)):
            found = (route.gateway, route.link, route.priority)
            if route.destination == destination and found != (gateway, index, metric):
                self._delete_route(namespace, route)

    def gateways(self, namespace: str, link: str) -> set[tuple[IPNetwork, Address]]:
        """All routes of IPv4, in the main table, through gateways on a link."""
        return {(route.destination, by) for route, by in self._gateways(namespace, link)}

    def _gateways(self, namespace: str, link: str) -> list[tuple[Route, Address]]:
        index = self._index(namespace, link)
        found = ((route, route.gateway) for route in self._routes(namespace, 4))
        return [(route, by) for route, by in found if by is not None and route.link == index]

    def set_gateways(
        self, namespace: str, link: str, wanted: Collection[tuple[IPNetwork, Address]]
    ) -> None:
        """Have exactly these routes through gateways on a link, be they in its subnet or not."""
        index = self._index(namespace, link)
        for route, by in self._gateways(namespace, link):
            if (route.destination, by) not in wanted:
                self._delete_route(namespace, route)
        for destination, gateway in wanted:
            where: dict[str, Any] = {"dst": str(destination), "gateway": str(gateway)}
            replace = partial(self._socket(namespace).route, "replace", **where, oif=index)
            self._ask(
                f"the route to {destination} via {gateway}", partial(replace, flags=RTNH_F_ONLINK)
            )

    def _delete_route(self, namespace: str | None, route: Route) -> None:
        """Delete one route as the kernel listed it; missing is success."""
        # A route that leads nowhere has a type of its own, and no other is deleted.
        same: dict[str, Any] = {
            "type": route.kind, "scope": route.scope, "tos": route.tos, "proto": route.protocol,
        }  # fmt: skip
        if route.priority is not None:
            same["priority"] = route.priority
        if route.destination.version == 6:
            # There may be several with one metric.
            same |= {"oif": route.link} if route.link else {}
            same |= {"gateway": str(route.gateway)} if route.gateway else {}
        with suppress(NetlinkError):
            self._socket(namespace).route("del", dst=str(route.destination), **same)

    def remove_route(self, namespace: str | None, destination: IPNetwork, link: str) -> None:
        """Remove what leads to ``destination`` over a link; missing is success."""
        found = self.link(namespace, link)
        for route in self._routes(namespace, _family(destination)) if found else ():
            if found and (route.destination, route.link) == (destination, found.index):
                self._delete_route(namespace, route)

    def add_route(
        self, namespace: str | None, destination: IPNetwork, gateway: Address, link: str
    ) -> None:
        """Add a route as libvirt does for ``<route>``, with its metric and origin."""
        index = self._index(namespace, link)
        with suppress(NetlinkError):
            self._socket(namespace).route(
                "add",
                dst=str(destination),
                gateway=str(gateway),
                oif=index,
                priority=1,
                proto=RTPROT_BOOT,
            )

    def unlimited_routes(
        self, namespace: str, routes: Iterable[IPNetwork], link: str, mtu: int | None
    ) -> list[IPNetwork]:
        """Those destinations to which other sizes of packets are sent than ``mtu`` allows.

        In octets; None is the link's own.
        """
        index = self._index(namespace, link)
        limits = {
            route.destination: route.mtu
            for route in self._routes(namespace)
            if route.link == index and route.priority == _usual_metric(route)
        }
        return [each for each in routes if limits.get(each) != mtu]

    def limit_subnet(self, namespace: str, subnet: Interface, link: str, mtu: int | None) -> None:
        """Send packets of at most ``mtu`` octets (None: the link's own) to a link's subnet."""
        how: dict[str, Any] = {"proto": RTPROT_KERNEL}
        if subnet.version == 4:
            how |= {"prefsrc": str(subnet.ip), "scope": SCOPE_LINK}
        else:
            # Another metric would make a second route, which is never used.
            how["priority"] = SUBNET_METRICS[6]
        self._limit(namespace, subnet.network, link, mtu, how)

    def limit_route(
        self, namespace: str, destination: IPNetwork, gateway: Address, link: str,
        mtu: int | None,
    ) -> None:  # fmt: skip
        """The same for a route through a gateway."""
        how: dict[str, Any] = {"gateway": str(gateway)}
        if destination.version == 6:
            how["priority"] = METRICS[6]
        self._limit(namespace, destination, link, mtu, how)

    def _limit(
        self, namespace: str, destination: IPNetwork, link: str, mtu: int | None,
        how: dict[str, Any],
    ) -> None:  # fmt: skip
        index = self._index(namespace, link)
        metrics = {"metrics": {"mtu": mtu}} if mtu else {}
        self._ask(
            f"the route to {destination} with MTU {mtu or 'of its link'}",
            lambda: self._socket(namespace).route(
                "replace", dst=str(destination), oif=index, **how, **metrics
            ),
        )

    def host_routes(self, without: Iterable[str] = ()) -> set[IPNetwork]:
        """Destinations that the host has routes to, of both families.

        Default routes and those within a link do not count, nor do links named in
        ``without``.
        """
        ignored = {link.index for name in without if (link := self.link(None, name))}
        return {
            route.destination
            for route in self._routes(None)
            if route.link not in ignored
            and route.destination.prefixlen > 0
            and not _within_link(route.destination)
        }

    def routed_links(self, family: Family = 4) -> set[str]:
        """Names of the host's links that any of its routes of a family leads over."""
        # By name at once; listing all links takes 0.2 s with a few hundred of them.
        if family == 6:
            return _ipv6_routed_links()
        lines = Path("/proc/thread-self/net/route").read_text().splitlines()[1:]
        return {line.split()[0] for line in lines if line.strip()} - {"*"}

    # -- neighbours --------------------------------------------------------

    def proxied(self, namespace: str | None, link: str) -> set[Address]:
        """The IPv6 addresses that neighbours on a link are answered for by proxy."""
        index = self._index(namespace, link)
        return {each.address for each in self._proxied(namespace) if each.link == index}

    def neighbours6(self, namespace: str | None, link: str) -> list[Address]:
        """The IPv6 addresses of stations on a link that have answered, or spoken."""
        index = self._index(namespace, link)
        listing = partial(self._session(namespace).neighbours, index)
        return self._listed(f"stations on {link}", namespace, listing)

    def _proxied(self, namespace: str | None) -> list[ProxiedNeighbour]:
        return self._listed("neighbours", namespace, self._session(namespace).proxied_neighbours)

    def set_proxied(self, namespace: str | None, link: str, wanted: Iterable[Address]) -> None:
        """Have neighbours on a link answered for exactly these IPv6 addresses.

        The kernel does so only where the link's sysctl ``proxy_ndp`` is 1 and the
        way to the address leads over another link.
        """
        index = self._index(namespace, link)
        present, asked = self.proxied(namespace, link), set(wanted)
        changes = [("add", asked - present), ("del", present - asked)]
        for verb, addresses in changes:
            for address in sorted(addresses, key=by_family):
                self._proxy(verb, namespace, index, address)

    def _proxy(self, verb: str, namespace: str | None, index: int, address: Address) -> None:
        try:
            self._socket(namespace).neigh(
                verb, family=socket.AF_INET6, dst=str(address), ifindex=index, flags=NTF_PROXY
            )
        except NetlinkError as error:
            if error.code not in (errno.EEXIST, errno.ENOENT):
                raise KernelError(
                    f"the kernel refuses to {verb} the proxy for {address}",
                    os.strerror(error.code),
                ) from error

    # -- sysctls -----------------------------------------------------------

    def sysctl(self, namespace: str | None, key: str) -> str | None:
        """A value below /proc/sys; None where this kernel has no such setting."""
        return self.sysctls(namespace, [key]).get(key)

    def sysctls(self, namespace: str | None, keys: Iterable[str]) -> dict[str, str]:
        """Values below /proc/sys, but for settings that this kernel lacks."""
        found = {}
        with netns.entered(namespace):
            for key in keys:
                with suppress(FileNotFoundError):
                    found[key] = Path("/proc/sys", key).read_text().strip()
        return found

    def set_sysctl(self, namespace: str | None, key: str, value: str) -> None:
        """Set a value below /proc/sys; a setting this kernel lacks is left out."""
        self.set_sysctls(namespace, [(key, value)])

    def set_sysctls(self, namespace: str | None, settings: Iterable[tuple[str, str]]) -> None:
        """The same for several values, in this order."""
        with netns.entered(namespace):
            for key, value in settings:
                try:
                    Path("/proc/sys", key).write_text(value)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise KernelError(f"cannot set {key} to {value}", str(error)) from error


def _family(destination: IPNetwork) -> Family:
    return 4 if destination.version == 4 else 6


def _usual_metric(route: Route) -> int | None:
    metrics = SUBNET_METRICS if route.gateway is None else METRICS
    return metrics[_family(route.destination)]


def _within_link(destination: IPNetwork) -> bool:
    """Whether every link has a route to it of the kernel's own making."""
    return destination.version == 6 and (destination.is_link_local or destination.is_multicast)


def _ipv6_routed_links() -> set[str]:
    """The same in IPv6: what the kernel makes for every address and link does not count."""
    try:
        lines = Path(IPV6_ROUTES).read_text().splitlines()
    except FileNotFoundError:
        # A kernel without IPv6.
        return set()
    found = set()
    for line in lines:
        # Each bridge has several of its own: only the others are worth a look.
        if line.startswith(WITHIN_LINK):
            continue
        *_, flags, link = line.split()
        if not int(flags, 16) & (RTF_LOCAL | RTF_ANYCAST):
            found.add(link)
    # An unreachable destination is led to lo.
    return found - {"lo"}


def _tag(owner: str) -> str:
    return f"libvirt-natns {owner}"
