# SPDX-License-Identifier: LGPL-2.1-or-later
"""The policy of one namespace's firewall, and what the policy says of each family."""

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from itertools import pairwise

from libvirt_natns.addresses import (
    FAMILIES,
    Address,
    Family,
    Interface,
    IPNetwork,
    by_family,
    host_network,
)
from libvirt_natns.errors import FirewallError
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.model.upstream import DEFAULT_MAX_FLOWS, Helper


@dataclass(frozen=True, slots=True)
class Policy:
    """The task of one namespace's firewall.

    ``inner`` is the interface on the private bridge, ``upstream`` the interface to the
    outside.  ``subnets`` are all private subnets, routed subnets included, and ``gateways``
    the namespace's own addresses on ``inner``.  ``address`` is the namespace's address on
    ``upstream``, ``address6`` its address of IPv6; the addresses of ``statics`` come on top.
    ``public`` are the subnets that pass untranslated.
    Each of ``forwards`` listens on one of these addresses, no two on one port.  Or it
    lets in to an address of ``public``, which is its target, too.

    A family without subnets and without an address has no rules.  A subnet that is not
    ``public`` stays inside where its family has no address.
    ``by_dhcp``: a DHCP client of the namespace's own keeps ``address``.

    ``segments`` are the subnets that the namespace has on-link on ``upstream``.
    ``transit`` are the gateway's addresses on a transit bridge, with its subnets.  The gateway
    is the only station there that may ask for published ports.
    ``served`` are ports of ``gateways`` beside those of DHCP, DNS and TFTP, with "udp" or "tcp".
    ``helpers`` follow flows of guests.
    ``link_local``: link-local destinations outside are forwarded.  ``max_flows`` is
    about the number of flows tracked at one time.
    """

    inner: str
    upstream: str
    subnets: tuple[IPNetwork, ...]
    gateways: tuple[Address, ...]
    address: Address | None
    forwards: tuple[Forward, ...] = ()
    statics: tuple[StaticNat, ...] = ()
    address6: IPv6Address | None = None
    public: tuple[IPv6Network, ...] = ()
    by_dhcp: bool = False
    segments: tuple[IPNetwork, ...] = ()
    transit: tuple[Interface, ...] = ()
    link_local: bool = False
    max_flows: int = DEFAULT_MAX_FLOWS
    served: tuple[tuple[str, int], ...] = ()
    helpers: tuple[Helper, ...] = ()

    def __post_init__(self) -> None:
        # An empty match would match all packets.
        if not (self.inner and self.upstream and self.subnets and self.gateways):
            raise FirewallError("a namespace without interfaces or subnets has no firewall policy")
        addresses = self.addresses
        for forward in self.forwards:
            if forward.address not in addresses and not lets_in(self, forward):
                raise FirewallError(f"no port of {forward.address} can be published here")
            _check_families(forward)
        for forward, rival in pairwise(sorted(self.forwards, key=by_port)):
            listener = (forward.address, forward.proto)
            if listener == (rival.address, rival.proto) and rival.first <= forward.last:
                raise FirewallError(
                    f"{rival.proto} port {rival.first} of {rival.address} is published twice"
                )

    @property
    def addresses(self) -> frozenset[Address]:
        """Return all addresses that the namespace answers to on ``upstream``."""
        addresses = (self.address, self.address6, *(static.address for static in self.statics))
        return frozenset(address for address in addresses if address)


def by_port(forward: Forward) -> tuple[int, int, str, int]:
    """Return a key that sorts forwards without regard to their age."""
    return *by_family(forward.address), forward.proto, forward.first


def _check_families(forward: Forward) -> None:
    family = forward.address.version
    if forward.target.version != family or any(
        source.version != family for source in forward.sources
    ):
        raise FirewallError(f"{forward.address} and its target are of two families")


def lets_in(policy: Policy, forward: Forward) -> bool:
    """True if a forward publishes a guest's own address, untranslated."""
    return (
        bool(policy.public)
        and forward.address == forward.target
        and (forward.first, forward.last) == (forward.to, forward.to_last)
        and any(forward.address in subnet for subnet in policy.public)
    )


@dataclass(frozen=True, slots=True)
class FamilyPolicy:
    """The half of a policy that concerns one family; ``both``: the other family has a half, too.

    Private subnets leave by ``address``.  ``own`` are all of the namespace's addresses on the
    upstream.  ``public`` are the subnets that pass as they are, ``outgoing`` all sources
    that may leave.
    """

    family: Family
    both: bool
    policy: Policy
    address: Address | None
    subnets: tuple[IPNetwork, ...]
    gateways: tuple[IPNetwork, ...]
    own: tuple[IPNetwork, ...]
    public: tuple[IPNetwork, ...]
    outgoing: tuple[IPNetwork, ...]

    @property
    def only(self) -> Family | None:
        """Return the family that limits a rule without addresses; None where no limit is needed."""
        return self.family if self.both else None

    @property
    def on_link(self) -> tuple[IPNetwork, ...]:
        """Return all subnets in which the namespace asks by ARP or Neighbour Discovery."""
        segments = (net for net in self.policy.segments if net.version == self.family)
        return (*self.subnets, *segments)

    @property
    def outside(self) -> tuple[IPNetwork, ...]:
        """Return all addresses of ours that the outside may see."""
        return (*self.own, *self.public)

    @property
    def public_gateways(self) -> tuple[IPNetwork, ...]:
        """Return the namespace's own addresses in public subnets."""
        return tuple(own for own in self.gateways if any(map(own.overlaps, self.public)))


def family_policies(policy: Policy) -> tuple[FamilyPolicy, ...]:
    """Return a policy's halves, one for each family that has subnets or an address."""
    present = [family for family in FAMILIES if _subnets(policy, family) or _own(policy, family)]
    return tuple(_family_policy(policy, family, len(present) > 1) for family in present)


def _family_policy(policy: Policy, family: Family, both: bool) -> FamilyPolicy:
    subnets, public = _subnets(policy, family), policy.public if family == 6 else ()
    address = policy.address if family == 4 else policy.address6
    targets = (host_network(s.target) for s in policy.statics if s.target.version == family)
    return FamilyPolicy(
        family=family,
        both=both,
        policy=policy,
        address=address,
        subnets=subnets,
        gateways=tuple(host_network(own) for own in policy.gateways if own.version == family),
        own=_own(policy, family),
        public=public,
        outgoing=subnets if address else (*public, *targets),
    )


def _subnets(policy: Policy, family: Family) -> tuple[IPNetwork, ...]:
    return tuple(subnet for subnet in policy.subnets if subnet.version == family)


def _own(policy: Policy, family: Family) -> tuple[IPNetwork, ...]:
    own = sorted(policy.addresses, key=by_family)
    return tuple(host_network(address) for address in own if address.version == family)


def translated(policy: Policy) -> Iterator[Forward]:
    """Yield the forwards with a translated destination."""
    return (forward for forward in policy.forwards if not lets_in(policy, forward))


def translated_families(policy: Policy) -> set[Family]:
    """Return the families that have a translated destination."""
    families: set[Family] = {forward.address.version for forward in translated(policy)}
    return families | {static.address.version for static in policy.statics}
