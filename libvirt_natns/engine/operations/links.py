# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on namespaces, sysctls and links."""

from dataclasses import dataclass

from libvirt_natns.engine.operations.traits import Traits
from libvirt_natns.kernel.veth import VethPair


@dataclass(frozen=True, slots=True)
class Namespace(Traits):
    """A network namespace; ``owner`` is the uuid of the network it belongs to."""

    encloses = True

    name: str
    owner: str

    def describe(self) -> str:
        return f"namespace {self.name}"


@dataclass(frozen=True, slots=True)
class Sysctl(Traits):
    """A value below /proc/sys/net; ``namespace`` None is the host's own."""

    namespace: str | None
    key: str
    value: str

    def describe(self) -> str:
        return f"sysctl {self.key} = {self.value} in {self.namespace or 'the host'}"


@dataclass(frozen=True, slots=True)
class Settings(Traits):
    """Values below /proc/sys/net of a namespace, in the order in which they are set."""

    namespace: str
    values: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        return "\n".join(
            f"sysctl {key} = {value} in {self.namespace}" for key, value in self.values
        )


@dataclass(frozen=True, slots=True)
class Patch(VethPair, Traits):
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


@dataclass(frozen=True, slots=True)
class Macvlan(Traits):
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


@dataclass(frozen=True, slots=True)
class Port(Traits):
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


@dataclass(frozen=True, slots=True)
class AllMulticast(Traits):
    """A port to which its bridge sends all multicast, also of groups without a member there."""

    port: str
    outer: str | None = None

    def describe(self) -> str:
        return f"all multicast to patch {self.port}"


@dataclass(frozen=True, slots=True)
class LinkUp(Traits):
    """A link of a namespace that is up."""

    namespace: str
    link: str

    def describe(self) -> str:
        return f"link {self.link} up in {self.namespace}"


@dataclass(frozen=True, slots=True)
class TransitBridge(Traits):
    """The host's private bridge to which namespaces of an upstream "host" attach."""

    name: str
    altname: str
    mac: str

    def describe(self) -> str:
        return f"transit bridge {self.name} ({self.altname})"
