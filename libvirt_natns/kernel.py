# SPDX-License-Identifier: LGPL-2.1-or-later
"""Namespaces, links, addresses, routes and sysctls: the only user of pyroute2.

One netlink socket for the host and one for each namespace, opened inside it
and usable from outside: nothing jumps between namespaces to make a change.

Every verb states what it wants and changes only what differs; deleting what is
missing is success.
"""

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from socket import AF_INET
from types import TracebackType
from typing import Any, Self, TypeVar

from pyroute2 import IPRoute
from pyroute2 import netns as pyroute2_netns
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from libvirt_natns import names, netns
from libvirt_natns.errors import KernelError
from libvirt_natns.locks import locked

IFF_UP = 1
BRIDGE_PORTS = 1023
"""The most ports that a Linux bridge takes."""

DUMP_TRIES = 100
"""How often a listing is asked for again that a change made on the way invalid."""

MAIN_TABLE = 254
RTPROT_BOOT = 3
SCOPE_GLOBAL = 0
Link = dict[str, Any]
T = TypeVar("T")


class Kernel:
    """A session with the kernel; close it, or use it in a ``with``."""

    def __init__(self) -> None:
        self._sockets: dict[str | None, Any] = {}

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
        while self._sockets:
            self._sockets.popitem()[1].close()

    def leave_namespaces(self) -> None:
        """Close the sockets that keep namespaces alive, but not the host's."""
        for namespace in [name for name in self._sockets if name is not None]:
            self._sockets.pop(namespace).close()

    def _socket(self, namespace: str | None) -> Any:  # noqa: ANN401
        if namespace not in self._sockets:
            with netns.entered(namespace):
                self._sockets[namespace] = IPRoute()
        return self._sockets[namespace]

    def _listed(self, listing: Callable[[], Iterable[Any]]) -> list[Any]:
        """All of a listing, such as that of links; whole, although others make changes."""
        for _ in range(DUMP_TRIES):
            with suppress(NetlinkDumpInterrupted):
                return list(listing())
        raise KernelError("the kernel's network settings change all the time", "try again")

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """Run one request; a refusal becomes a KernelError that says what it was for."""
        try:
            return call()
        except NetlinkError as error:
            raise KernelError(f"the kernel refuses {what}", os.strerror(error.code)) from error

    # -- namespaces --------------------------------------------------------

    def create_namespace(self, name: str, owner: str) -> None:
        """Make a namespace and note on its loopback interface whom it belongs to."""
        try:
            # The first namespace of a boot turns /run/netns into a mount of its
            # own; two that do it at once would hide each other's.  ip(8) takes
            # the same lock.
            with locked(names.NETNS_DIRECTORY):
                pyroute2_netns.create(name)
        except OSError as error:
            raise KernelError(f"cannot create namespace {name}", str(error)) from error
        loopback = self._index(name, "lo")
        self._socket(name).link("set", index=loopback, ifalias=_tag(owner))

    def delete_namespace(self, name: str) -> None:
        """Remove a namespace's name; the kernel ends it once nobody is inside."""
        found = self._sockets.pop(name, None)
        if found is not None:
            found.close()
        path = names.namespace_path(name)
        if not os.path.lexists(path):
            return
        try:
            pyroute2_netns.remove(name)
        except OSError as error:
            raise KernelError(f"cannot delete namespace {name}", str(error)) from error

    def namespace_owner(self, name: str) -> str | None:
        """The uuid of the network that a namespace was made for.

        "" for a namespace that is not ours; None where there is none, or only
        the empty file that a killed start left behind.
        """
        if not netns.exists(name):
            return None
        link = self.link(name, "lo") or {}
        alias = _attribute(link, "IFLA_IFALIAS") or ""
        return str(alias).removeprefix(_tag("")) if str(alias).startswith(_tag("")) else ""

    # -- links -------------------------------------------------------------

    def link(self, namespace: str | None, name: str) -> Link | None:
        """What the kernel says of a link, or None where there is no such link."""
        try:
            found = list(self._socket(namespace).link("get", ifname=name))
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise KernelError(f"cannot look at link {name}", os.strerror(error.code)) from error
        return found[0] if found else None

    def _index(self, namespace: str | None, name: str) -> int:
        link = self.link(namespace, name)
        if link is None:
            raise KernelError(f"there is no link {name} in {namespace or 'the host'}")
        return int(link["index"])

    def mtu(self, name: str) -> int | None:
        """The MTU, in octets, of a link of the host."""
        link = self.link(None, name)
        return int(_attribute(link, "IFLA_MTU")) if link else None

    def mac(self, name: str) -> str | None:
        """The MAC address of a link of the host, in lower case."""
        link = self.link(None, name)
        return str(_attribute(link, "IFLA_ADDRESS")).lower() if link else None

    def is_up(self, name: str) -> bool:
        """Whether a link of the host is set up."""
        link = self.link(None, name)
        return bool(link and link["flags"] & IFF_UP)

    def is_bridge(self, name: str) -> bool:
        """Whether a link of the host is a Linux bridge."""
        return (Path("/sys/class/net") / name / "bridge").is_dir() or _kind(
            self.link(None, name)
        ) == "bridge"

    def port_count(self, bridge: str) -> int:
        """How many ports a bridge of the host has."""
        ports = Path("/sys/class/net", bridge, "brif")
        if ports.is_dir():
            # Listing all links takes 0.2 s with a few hundred of them.
            with os.scandir(ports) as entries:
                return sum(1 for _ in entries)
        index = self._index(None, bridge)
        links = self._listed(self._socket(None).get_links)
        return sum(_attribute(link, "IFLA_MASTER") == index for link in links)

    def delete_link(self, name: str, namespace: str | None = None) -> None:
        """Delete a link, and with one end of a veth pair the other one too."""
        link = self.link(namespace, name)
        if link is None:
            return
        try:
            self._socket(namespace).link("del", index=link["index"])
        except NetlinkError as error:
            if error.code not in (errno.ENODEV, errno.ENXIO):
                raise KernelError(f"cannot delete link {name}", os.strerror(error.code)) from error

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
        return [] if link["flags"] & IFF_UP else [f"link {name} is down in {where}"]

    # -- patches -----------------------------------------------------------

    def patch_differences(
        self, namespace: str, link: str, port: str, bridge: str, mtu: int
    ) -> list[str]:
        """What is wrong with a veth pair between a bridge and a namespace."""
        outer = self.link(None, port)
        inner = self.link(namespace, link)
        if outer is None:
            return [f"patch {port} is missing"]
        if inner is None or _attribute(outer, "IFLA_LINK") != inner["index"]:
            return [f"patch {port} does not lead to {link} in {namespace}"]
        master = self.link(None, bridge)
        if master is None:
            return [f"bridge {bridge} is missing"]
        found = []
        if _attribute(outer, "IFLA_MASTER") != master["index"]:
            found.append(f"patch {port} is not a port of bridge {bridge}")
        if not outer["flags"] & IFF_UP:
            found.append(f"patch {port} is down")
        for end, of in ((outer, port), (inner, f"{link} in {namespace}")):
            actual = _attribute(end, "IFLA_MTU")
            if actual != mtu:
                found.append(f"{of} has MTU {actual} instead of {mtu}")
        return found

    def has_patch(self, namespace: str, link: str, port: str) -> bool:
        """Whether both ends of a veth pair are there, and are each other's."""
        outer = self.link(None, port)
        inner = self.link(namespace, link)
        return bool(outer and inner and _attribute(outer, "IFLA_LINK") == inner["index"])

    def create_patch(
        self,
        namespace: str,
        link: str,
        mac: str,
        port: str,
        port_mac: str,
        altname: str,
        mtu: int,
    ) -> None:
        """Make a veth pair with one end in the host and one in a namespace, both down."""
        # A namespace's end outlives its deletion for a while, and so does the
        # host's: both names must be free.
        self.delete_link(port)
        self.delete_link(link, namespace)
        descriptor = os.open(names.namespace_path(namespace), os.O_RDONLY | os.O_CLOEXEC)
        try:
            peer = {"ifname": link, "address": mac, "mtu": mtu, "net_ns_fd": descriptor}
            self._ask(
                f"to make the patch {port}",
                lambda: self._socket(None).link(
                    "add", ifname=port, kind="veth", address=port_mac, mtu=mtu, peer=peer
                ),
            )
        finally:
            os.close(descriptor)
        index = self._index(None, port)
        # Kernels before 5.5 have no altnames; nothing depends on them.
        with suppress(NetlinkError):
            self._socket(None).link("property_add", index=index, altname=altname)
        # A bridge port speaks no IP of its own.
        with suppress(KernelError):
            self.set_sysctl(None, f"net/ipv6/conf/{port}/disable_ipv6", "1")

    def attach(self, namespace: str, link: str, port: str, bridge: str, mtu: int) -> None:
        """Make the host end of a patch a port of a bridge, and set it up."""
        master = self._index(None, bridge)
        self._ask(
            f"to set the MTU of {link} to {mtu}",
            lambda: self._socket(namespace).link(
                "set", index=self._index(namespace, link), mtu=mtu
            ),
        )
        index = self._index(None, port)
        self._ask(
            f"to attach {port} to bridge {bridge}",
            lambda: self._socket(None).link("set", index=index, mtu=mtu, master=master),
        )
        self.set_up(None, port)

    def has_hairpin(self, port: str) -> bool:
        """Whether a bridge sends back through a port what came in by it."""
        info = _attribute(self.link(None, port), "IFLA_LINKINFO")
        settings = _attribute(info, "IFLA_INFO_SLAVE_DATA")
        return bool(_attribute(settings, "IFLA_BRPORT_MODE"))

    def set_hairpin(self, port: str) -> None:
        """Have a bridge send back through a port what came in by it."""
        index = self._index(None, port)
        self._ask(
            f"hairpin mode on {port}",
            lambda: self._socket(None).brport("set", index=index, mode=1),
        )

    def create_bridge(self, name: str, altname: str, mac: str) -> None:
        """Make a bridge in the host, without spanning tree, and set it up."""
        self._ask(
            f"to make the bridge {name}",
            lambda: self._socket(None).link(
                "add", ifname=name, kind="bridge", address=mac, br_stp_state=0, br_forward_delay=0
            ),
        )
        with suppress(NetlinkError):
            self._socket(None).link("property_add", index=self._index(None, name), altname=altname)
        self.set_up(None, name)

    def try_links(self) -> None:
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

    # -- addresses ---------------------------------------------------------

    def addresses(self, namespace: str | None, link: str) -> set[IPv4Interface]:
        """All IPv4 addresses of a link, with their prefixes."""
        index = self._index(namespace, link)
        return {
            IPv4Interface((_attribute(entry, "IFA_LOCAL"), entry["prefixlen"]))
            for entry in self._listed(lambda: self._socket(namespace).get_addr(family=AF_INET))
            if entry["index"] == index
        }

    def host_addresses(self) -> set[IPv4Address]:
        """All IPv4 addresses of the host itself."""
        entries = self._listed(lambda: self._socket(None).get_addr(family=AF_INET))
        return {IPv4Address(_attribute(entry, "IFA_LOCAL")) for entry in entries}

    def set_addresses(
        self, namespace: str | None, link: str, wanted: Iterable[IPv4Interface]
    ) -> None:
        """Give a link exactly these IPv4 addresses."""
        # Foreign ones first: with the oldest of a subnet the kernel removes all others.
        for address in self.addresses(namespace, link) - set(wanted):
            self.remove_address(namespace, link, address)
        present = self.addresses(namespace, link)
        for address in wanted:
            if address not in present:
                self.add_address(namespace, link, address)

    def add_address(self, namespace: str | None, link: str, address: IPv4Interface) -> None:
        """Add an address to a link, unless it has it."""
        index = self._index(namespace, link)
        request = {"address": str(address.ip), "prefixlen": address.network.prefixlen}
        if address.network.prefixlen < 31:
            request["broadcast"] = str(address.network.broadcast_address)
        try:
            self._socket(namespace).addr("add", index=index, **request)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise KernelError(
                    f"the kernel refuses the address {address} on {link}",
                    os.strerror(error.code),
                ) from error

    def remove_address(self, namespace: str | None, link: str, address: IPv4Interface) -> None:
        """Remove an address from a link, if both are there."""
        found = self.link(namespace, link)
        if found is None:
            return
        try:
            self._socket(namespace).addr(
                "del",
                index=found["index"],
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
        self, namespace: str | None, destination: IPv4Network, gateway: IPv4Address, link: str
    ) -> bool:
        """Whether the main table leads to ``destination`` through this gateway alone."""
        index = self._index(namespace, link)
        found = [
            (_attribute(entry, "RTA_GATEWAY"), _attribute(entry, "RTA_OIF"))
            for entry in self._routes(namespace)
            if _destination(entry) == destination
        ]
        return found == [(str(gateway), index)]

    def _routes(self, namespace: str | None) -> list[Any]:
        entries = self._listed(lambda: self._socket(namespace).get_routes(family=AF_INET))
        return [entry for entry in entries if _attribute(entry, "RTA_TABLE") == MAIN_TABLE]

    def set_route(
        self, namespace: str | None, destination: IPv4Network, gateway: IPv4Address, link: str
    ) -> None:
        """Lead ``destination`` through this gateway, and through no other."""
        index = self._index(namespace, link)
        self._ask(
            f"the route to {destination} via {gateway}",
            lambda: self._socket(namespace).route(
                "replace", dst=str(destination), gateway=str(gateway), oif=index
            ),
        )
        wanted = (str(gateway), index, None)
        for entry in self._routes(namespace):
            found = [_attribute(entry, f"RTA_{name}") for name in ("GATEWAY", "OIF", "PRIORITY")]
            if _destination(entry) == destination and tuple(found) != wanted:
                self._delete_route(namespace, entry)

    def _delete_route(self, namespace: str | None, entry: Any) -> None:  # noqa: ANN401
        """Delete one route as the kernel listed it; missing is success."""
        priority = _attribute(entry, "RTA_PRIORITY")
        metric = {} if priority is None else {"priority": priority}
        # A route that leads nowhere has a type of its own, and no other is deleted.
        same = {key: entry[key] for key in ("type", "scope", "tos", "proto")}
        with suppress(NetlinkError):
            self._socket(namespace).route("del", dst=str(_destination(entry)), **same, **metric)

    def add_route(
        self, namespace: str | None, destination: IPv4Network, gateway: IPv4Address, link: str
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

    def host_routes(self, without: Iterable[str] = ()) -> set[IPv4Network]:
        """Destinations that the host has routes to, the default route left out.

        Links named in ``without`` do not count.
        """
        ignored = {link["index"] for name in without if (link := self.link(None, name))}
        return {
            _destination(entry)
            for entry in self._routes(None)
            if _attribute(entry, "RTA_OIF") not in ignored and entry["dst_len"] > 0
        }

    def routed_links(self) -> set[str]:
        """Names of the host's links that any of its IPv4 routes leads over."""
        # By name at once; listing all links takes 0.2 s with a few hundred of them.
        lines = Path("/proc/thread-self/net/route").read_text().splitlines()[1:]
        return {line.split()[0] for line in lines if line.strip()} - {"*"}

    # -- sysctls -----------------------------------------------------------

    def sysctl(self, namespace: str | None, key: str) -> str | None:
        """A value below /proc/sys; None where this kernel has no such setting."""
        with netns.entered(namespace):
            try:
                return Path("/proc/sys", key).read_text().strip()
            except FileNotFoundError:
                return None

    def set_sysctl(self, namespace: str | None, key: str, value: str) -> None:
        """Set a value below /proc/sys; a setting this kernel lacks is left out."""
        with netns.entered(namespace):
            try:
                Path("/proc/sys", key).write_text(value)
            except FileNotFoundError:
                return
            except OSError as error:
                raise KernelError(f"cannot set {key} to {value}", str(error)) from error


def _tag(owner: str) -> str:
    return f"libvirt-natns {owner}"


def _attribute(message: Any, name: str) -> Any:  # noqa: ANN401
    return message.get_attr(name) if message is not None else None


def _kind(link: Link | None) -> str | None:
    info = _attribute(link, "IFLA_LINKINFO") if link else None
    return _attribute(info, "IFLA_INFO_KIND") if info else None


def _destination(entry: Any) -> IPv4Network:  # noqa: ANN401
    return IPv4Network((_attribute(entry, "RTA_DST") or "0.0.0.0", entry["dst_len"]))
