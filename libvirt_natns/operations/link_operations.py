# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on links."""

from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation
from libvirt_natns.records import dataclass


@dataclass(frozen=True, slots=True)
class Patch(Operation):
    """A veth pair: ``port`` in the host, ``link`` in the namespace.

    ``mtu``, in octets, is the MTU of the port's bridge.  ``link_mtu`` is the MTU of the
    namespace's end where it must be less; a bridge takes the least MTU of its ports.
    ``outer`` is the namespace of the port, None for the host.
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

    def describe(self) -> str:
        less = f" ({self.link_mtu} there)" if self.link_mtu else ""
        where = f" in {self.outer}" if self.outer else ""
        return (
            f"patch {self.port} ({self.altname}){where} to {self.link} in {self.namespace},"
            f" MTU {self.mtu}{less}"
        )

    def differs(self, kernel: Kernel) -> list[str]:
        return kernel.patch_differences(
            self.namespace,
            self.link,
            self.port,
            self.mtu,
            self.link_mtu,
            self.outer,
        )

    def ensure(self, context: ApplyContext) -> None:
        kernel, undo = context.kernel, context.undo
        namespace, link, port = self.namespace, self.link, self.port
        outer = self.outer
        if not context.is_fresh(self) and kernel.has_patch(namespace, link, port, outer):
            inner = self.link_mtu or self.mtu
            for where, name, mtu in ((namespace, link, inner), (outer, port, self.mtu)):
                kernel.set_mtu(where, name, mtu)
            return
        undo.add(self.take_back, kernel)
        kernel.create_patch(
            namespace,
            link,
            self.mac,
            port,
            self.port_mac,
            self.altname,
            self.mtu,
            self.link_mtu,
            outer,
        )

    def take_back(self, kernel: Kernel) -> None:
        kernel.delete_link(self.port, self.outer)


@dataclass(frozen=True, slots=True)
class Macvlan(Operation):
    """A link of the namespace with a MAC address of its own on a link of the host.

    In macvlan's mode "bridge", links on one ``parent`` reach each other, but not the
    host.  ``mtu``, in octets, is at most the parent's.
    """

    namespace: str
    link: str
    mac: str
    parent: str
    mtu: int

    def describe(self) -> str:
        return f"macvlan {self.link} on {self.parent} in {self.namespace}, MTU {self.mtu}"

    def differs(self, kernel: Kernel) -> list[str]:
        return kernel.macvlan_differences(self.namespace, self.link, self.parent, self.mtu)

    def ensure(self, context: ApplyContext) -> None:
        kernel, undo = context.kernel, context.undo
        namespace, link, parent = self.namespace, self.link, self.parent
        if not context.is_fresh(self) and kernel.has_macvlan(namespace, link, parent):
            kernel.set_mtu(namespace, link, self.mtu)
            return
        undo.add(self.take_back, kernel)
        kernel.create_macvlan(namespace, link, self.mac, parent, self.mtu)

    def take_back(self, kernel: Kernel) -> None:
        kernel.delete_link(self.link, self.namespace)


@dataclass(frozen=True, slots=True)
class Port(Operation):
    """The outer end of a patch, which is up and a port of a bridge.

    ``hairpin``: the bridge may send a frame back through the port by which it came.  Port
    and bridge are in the namespace ``outer``, None for the host.
    """

    port: str
    bridge: str
    hairpin: bool = False
    outer: str | None = None

    def describe(self) -> str:
        where = f" in {self.outer}" if self.outer else ""
        hairpin = ", hairpin" if self.hairpin else ""
        return f"patch {self.port} on bridge {self.bridge}{where}{hairpin}"

    def differs(self, kernel: Kernel) -> list[str]:
        return kernel.port_differences(
            self.port, self.bridge, hairpin=self.hairpin, outer=self.outer
        )

    def ensure(self, context: ApplyContext) -> None:
        context.kernel.attach(self.port, self.bridge, self.outer)
        if self.hairpin:
            context.kernel.set_hairpin(self.port, self.outer)


@dataclass(frozen=True, slots=True)
class AllMulticast(Operation):
    """A port to which its bridge sends all multicast, also of groups without a member there."""

    port: str
    outer: str | None = None

    def describe(self) -> str:
        return f"all multicast to patch {self.port}"

    def differs(self, kernel: Kernel) -> list[str]:
        if kernel.gets_all_multicast(self.port, self.outer):
            return []
        return [f"patch {self.port} does not get all multicast"]

    def ensure(self, context: ApplyContext) -> None:
        context.kernel.set_all_multicast(self.port, self.outer)


@dataclass(frozen=True, slots=True)
class LinkUp(Operation):
    """A link of a namespace that is up."""

    namespace: str
    link: str

    def describe(self) -> str:
        return f"link {self.link} up in {self.namespace}"

    def differs(self, kernel: Kernel) -> list[str]:
        return kernel.link_differences(self.namespace, self.link)

    def ensure(self, context: ApplyContext) -> None:
        context.kernel.set_up(self.namespace, self.link)


@dataclass(frozen=True, slots=True)
class TransitBridge(Operation):
    """The private bridge to which networks' namespaces attach, in the host or in a router.

    ``namespace`` is the router's, None for the host.  ``mtu``, in octets, is set where the
    bridge must have a certain MTU before it has ports.
    """

    name: str
    altname: str
    mac: str
    namespace: str | None = None
    mtu: int | None = None

    def describe(self) -> str:
        where = f" in {self.namespace}" if self.namespace else ""
        return f"transit bridge {self.name} ({self.altname}){where}"

    def differs(self, kernel: Kernel) -> list[str]:
        return kernel.link_differences(self.namespace, self.name)

    def ensure(self, context: ApplyContext) -> None:
        kernel, undo = context.kernel, context.undo
        if kernel.link(self.namespace, self.name) is None:
            undo.add(self.take_back, kernel)
            kernel.create_bridge(self.name, self.altname, self.mac, self.namespace)
        if self.mtu is not None:
            kernel.set_mtu(self.namespace, self.name, self.mtu)
        kernel.set_up(self.namespace, self.name)

    def take_back(self, kernel: Kernel) -> None:
        if self.namespace is None:
            kernel.delete_link(self.name)
