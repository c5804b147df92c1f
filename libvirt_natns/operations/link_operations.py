# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on links."""

from dataclasses import dataclass

from libvirt_natns.kernel.session import Kernel
from libvirt_natns.kernel.veth import VethPair
from libvirt_natns.operations.operation import ApplyContext, Operation


@dataclass(frozen=True, slots=True)
class Patch(VethPair, Operation):
    """A veth pair between a bridge and a namespace.

    ``mtu`` is the MTU of the bridge, which takes the least MTU of its ports.  So
    ``link_mtu`` alone may be less.
    """

    def describe(self) -> str:
        less = f" ({self.link_mtu} there)" if self.link_mtu else ""
        where = f" in {self.outer}" if self.outer else ""
        return (
            f"patch {self.port} ({self.altname}){where} to {self.link} in {self.namespace},"
            f" MTU {self.mtu}{less}"
        )

    def differs(self, kernel: Kernel) -> list[str]:
        return kernel.patches.differences(self)

    def ensure(self, context: ApplyContext) -> None:
        patches = context.kernel.patches
        if not context.is_fresh(self) and patches.exists(self):
            patches.set_mtu(self)
            return
        context.undo.add(self.take_back, context.kernel)
        patches.create(self)

    def take_back(self, kernel: Kernel) -> None:
        kernel.at(self.outer).links.delete(self.port)


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
        return kernel.at(self.namespace).macvlans.differences(self.link, self.parent, self.mtu)

    def ensure(self, context: ApplyContext) -> None:
        kernel, undo = context.kernel, context.undo
        namespace, link, parent = self.namespace, self.link, self.parent
        if not context.is_fresh(self) and kernel.at(namespace).macvlans.exists(link, parent):
            kernel.at(namespace).links.set_mtu(link, self.mtu)
            return
        undo.add(self.take_back, kernel)
        kernel.at(namespace).macvlans.create(link, self.mac, parent, self.mtu)

    def take_back(self, kernel: Kernel) -> None:
        kernel.at(self.namespace).links.delete(self.link)


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
        return kernel.at(self.outer).bridges.port_differences(
            self.port, self.bridge, hairpin=self.hairpin
        )

    def ensure(self, context: ApplyContext) -> None:
        bridges = context.kernel.at(self.outer).bridges
        bridges.attach(self.port, self.bridge)
        if self.hairpin:
            bridges.set_hairpin(self.port)


@dataclass(frozen=True, slots=True)
class AllMulticast(Operation):
    """A port to which its bridge sends all multicast, also of groups without a member there."""

    port: str
    outer: str | None = None

    def describe(self) -> str:
        return f"all multicast to patch {self.port}"

    def differs(self, kernel: Kernel) -> list[str]:
        if kernel.at(self.outer).bridges.gets_all_multicast(self.port):
            return []
        return [f"patch {self.port} does not get all multicast"]

    def ensure(self, context: ApplyContext) -> None:
        context.kernel.at(self.outer).bridges.set_all_multicast(self.port)


@dataclass(frozen=True, slots=True)
class LinkUp(Operation):
    """A link of a namespace that is up."""

    namespace: str
    link: str

    def describe(self) -> str:
        return f"link {self.link} up in {self.namespace}"

    def differs(self, kernel: Kernel) -> list[str]:
        return kernel.at(self.namespace).links.differences(self.link)

    def ensure(self, context: ApplyContext) -> None:
        context.kernel.at(self.namespace).links.set_up(self.link)


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
        return kernel.at(self.namespace).links.differences(self.name)

    def ensure(self, context: ApplyContext) -> None:
        kernel = context.kernel
        if kernel.at(self.namespace).links.get(self.name) is None:
            kernel.at(self.namespace).bridges.create(self.name, self.altname, self.mac)
        if self.mtu is not None:
            kernel.at(self.namespace).links.set_mtu(self.name, self.mtu)
        kernel.at(self.namespace).links.set_up(self.name)
