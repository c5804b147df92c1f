# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on a namespace's rule set and on daemons."""

from ipaddress import IPv4Address

from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.daemons.ndppd import Proxy
from libvirt_natns.daemons.udhcpc import Client
from libvirt_natns.engine.operations.traits import Traits
from libvirt_natns.firewall.rule import Rule
from libvirt_natns.records import dataclass


@dataclass(frozen=True, slots=True)
class Firewall(Traits):
    """The whole rule set of a namespace."""

    namespace: str
    owner: str
    backend: str
    rules: tuple[Rule, ...]

    def describe(self) -> str:
        return f"firewall of {self.namespace}: {len(self.rules)} rules, {self.backend}"


@dataclass(frozen=True, slots=True)
class Leasing(Traits):
    """A DHCP client; at its start it asks for the address ``request`` first."""

    client: Client
    request: IPv4Address | None = None

    def describe(self) -> str:
        return f"DHCP client on {self.client.link} in {self.client.namespace}"


@dataclass(frozen=True, slots=True)
class NeighbourProxy(Traits):
    """The ndppd that answers on a link for guests behind another link, or its absence."""

    daemon: Proxy

    def describe(self) -> str:
        return self.daemon.describe()


@dataclass(frozen=True, slots=True)
class Dnsmasq(Traits):
    """The dnsmasq of a namespace, or its absence."""

    always_recheck = True

    daemon: Daemon

    def describe(self) -> str:
        none = "" if self.daemon.files else "no "
        return f"{none}dnsmasq in {self.daemon.namespace} on {self.daemon.bridge}"


@dataclass(frozen=True, slots=True)
class IdleDnsmasq(Traits):
    """libvirt's own dnsmasq of a network, without the helper that writes leases."""

    network: str

    def describe(self) -> str:
        return f"libvirt's own dnsmasq of network {self.network} writes no leases"
