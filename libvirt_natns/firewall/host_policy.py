# SPDX-License-Identifier: LGPL-2.1-or-later
"""The policy of the host's rules, for all networks that are up."""

from dataclasses import dataclass

from libvirt_natns.addresses import Address, IPNetwork
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall.rule import checked_interface
from libvirt_natns.model.publication import Forward, PortProtocol
from libvirt_natns.model.upstream import Helper


@dataclass(frozen=True, slots=True)
class Transit:
    """A private transit bridge and the subnet of its namespaces' upstream addresses.

    A bridge with subnets of both families has a ``Transit`` for each.
    """

    bridge: str
    subnet: IPNetwork


@dataclass(frozen=True, slots=True)
class Private:
    """The private bridge of a network that is up, with its subnets.

    ``zone`` is the bridge's zone in conntrack, 0 for the preferred zone of its name.
    """

    bridge: str
    subnets: tuple[IPNetwork, ...] = ()
    zone: int = 0


@dataclass(frozen=True, slots=True)
class Provider:
    """A network's upstream address on an existing bridge to the outside.

    Or a subnet that passes there untranslated; ``routed``: the host routes the subnet.
    """

    bridge: str
    address: Address | IPNetwork
    routed: bool = False


@dataclass(frozen=True, slots=True)
class HostForward:
    """Published ports ``first`` to ``last`` of a host's address, or of all with None.

    ``target`` is the transit address of the namespace that knows the guest, and ``bridge``
    the namespace's transit bridge.  ``sources`` are the allowed clients,
    empty means all; a guest counts with its network's transit address.
    """

    proto: PortProtocol
    address: Address | None
    first: int
    last: int
    target: Address
    bridge: str
    sources: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class Followed:
    """A network's address on a transit bridge: conntrack's ``helpers`` follow flows from there."""

    bridge: str
    address: Address
    helpers: tuple[Helper, ...]


def host_forward(forward: Forward, transit: Address, bridge: str) -> HostForward:
    """Return the host's part of a forward to a namespace with that transit address."""
    return HostForward(
        forward.proto,
        forward.address if int(forward.address) else None,
        forward.first,
        forward.last,
        transit,
        bridge,
        forward.sources,
    )


@dataclass(frozen=True, slots=True)
class Ways:
    """Links that transit bridges may lead to, and links that are closed (``boundary``).

    ``outward`` are bridges that lead out of the host, ``links`` all links that do
    (for iptables, which cannot tell a bridge).  ``closed`` are links that forward IPv4
    because of a transit bridge alone.  ``marks`` are marks of replies, by the network of the
    host's own address that a flow was begun to.  ``closed6``: the host forwards IPv6 because of
    networks alone, and then ``links`` are the links that forward IPv6 since then.
    """

    outward: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    closed6: bool = False
    marks: tuple[tuple[IPNetwork, int], ...] = ()


@dataclass(frozen=True, slots=True)
class HostPolicy:
    """The traffic that the host must let through, for all networks that are up.

    ``bridge_nf``: net.bridge.bridge-nf-call-iptables is 1.  ``bridge_nf6``:
    bridge-nf-call-ip6tables is 1.  Entries of ``private`` and ``provider``
    matter where the setting of their family is 1.  ``public`` are subnets behind a transit
    bridge that pass untranslated; their namespaces decide about flows to them.  ``dhcp`` are
    bridges on which networks without an address ask a DHCP server.  ``followed`` are networks
    with conntrack's helpers.  Without ``ways`` a transit bridge may lead anywhere.
    """

    transits: tuple[Transit, ...] = ()
    private: tuple[Private, ...] = ()
    provider: tuple[Provider, ...] = ()
    bridge_nf: bool = False
    forwards: tuple[HostForward, ...] = ()
    dhcp: tuple[str, ...] = ()
    bridge_nf6: bool = False
    public: tuple[Provider, ...] = ()
    followed: tuple[Followed, ...] = ()
    ways: Ways | None = None

    @property
    def is_empty(self) -> bool:
        """True if the host needs no rules at all."""
        routed = any(provider.routed for provider in self.provider)
        return not (self.transits or self.bridge_nf or self.bridge_nf6 or routed)

    def filters_ipv6_of(self, private: Private) -> bool:
        """True if frames of IPv6 on a private bridge meet the host's rules."""
        return self.bridge_nf6 and any(subnet.version == 6 for subnet in private.subnets)

    def __post_init__(self) -> None:
        attached: tuple[Transit | Private | Provider, ...] = (
            *self.transits,
            *self.private,
            *self.provider,
        )
        ways = self.ways or Ways()
        links = (*ways.outward, *ways.links, *ways.closed)
        for bridge in (*(end.bridge for end in attached), *self.dhcp, *links):
            checked_interface(bridge)
        if not {forward.bridge for forward in self.forwards} <= {t.bridge for t in self.transits}:
            raise FirewallError("a port is forwarded to a bridge that is not a transit bridge")
