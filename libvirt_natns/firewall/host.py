# SPDX-License-Identifier: LGPL-2.1-or-later
"""The few rules that the host's own namespace needs.

* Transit bridges (upstreams of kind "host"): routed and masqueraded, replies in,
  and what is addressed to a published port of the host's; nothing else.  A flow that
  begins there leaves by links that lead out of the host.  Bridges for guests and
  containers of others are closed to it, unless the host itself published something there.
* Links whose forwarding was switched on for a transit bridge forward for that alone.
* Published ports answer on the host's addresses, to whoever asks: clients
  outside, the host itself, and guests, whose namespaces it takes for clients.
  Ports stay what they are; the namespace knows whose they are.
* Where bridged frames pass through iptables (bridge-nf-call-iptables, which is
  never written here): private frames have a zone of conntrack for each bridge, or
  twins with one address would be one flow; and the host's NAT leaves them alone.  With the
  backend iptables, a table of ours in nft keeps off the NAT that others have there.
* A way past foreign chains that drop what they do not know, Docker's above all: an accept
  of ours does not undo another chain's drop, so a chain that libvirt's networks share
  gets one jump to a chain of ours: the last rule, or the last ahead of one that refuses
  everything.  So explicit rules of others decide first.  An administrator's own chains
  are never changed: what they drop stays dropped (``host_nftables.obstacles``).

A client's own address is kept, except where the reply could not find back: of
namespaces (two on one bridge would answer each other directly) and of 127.0.0.1
the host's address on the transit bridge is seen.  127.0.0.1 reaches a published port
only where route_localnet is 1 for that bridge.  Then the kernel takes loopback
addresses for good that come from there, so they are dropped on arrival; and so
is what comes for them from any other side, ahead of its translation.

The last sort accepts what goes into a transit bridge whatever its state,
because iptables-nft cannot list nft's own way of asking for the state.  Our own
rules, which every such packet passes too, let in replies alone.

Everything of ours is in the table ``inet natns`` or in chains called NATNS-*,
and is found again by these names; callers hold a lock, so that one at a time
compares and changes.

IPv6 is the same with a transit bridge that has a private subnet of that, too.  The kernel
takes ::1 from no link but lo and routes it nowhere, so a published port is not reached
there, and what the host itself has on that address is left alone.  Where bridged frames
pass through ip6tables, neighbours must find each other on a bridge to the outside:
link-local addresses and groups pass there.

Limits: A client of a published port whose address lies in the private
subnet behind it is not answered.  A legacy table that this module was the first to use stays,
empty, for the kernel cannot drop one.  Foreign chains in nft are seen only
where the program nft is.  The check of our jump in a foreign chain holds for the moment:
reloading that chain drops the jump.  With legacy iptables, fragments of twins' packets
are put together before they have a zone, so two that bear the same addresses and
identification can mix.  With the backend iptables, NAT rules that iptables-nft gets
later than our own come ahead of published ports, and where the program nft is missing they
translate bridged frames, too; and links that come later are closed to guests
until the next change of a network, or the service, notices them.
"""

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Protocol

from libvirt_natns.addresses import Address, Family, IPNetwork
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import boundary, host_iptables, host_nftables, zones
from libvirt_natns.firewall.rules import (
    LINK_LOCAL,
    MULTICAST,
    Rule,
    checked_interface,
    limited,
    single,
)
from libvirt_natns.model.publication import Protocol as TransportProtocol
from libvirt_natns.records import dataclass

COMMENT = "libvirt-natns"

Announce = Callable[[], None]

DHCP = (IPv4Address("0.0.0.0"), IPv4Address("255.255.255.255"))
"""What a client asks from as long as it has no address, and where it is answered."""

LOOPBACK = (IPv4Network("127.0.0.0/8"),)
LOOPBACK6 = (IPv6Network("::1"),)


@dataclass(frozen=True, slots=True)
class Transit:
    """A private transit bridge and the subnet of its namespaces' upstream addresses.

    A bridge with subnets of both families is there once for each.
    """

    bridge: str
    subnet: IPNetwork


@dataclass(frozen=True, slots=True)
class Private:
    """The private bridge of a network that is up, with its subnets.

    ``zone`` is its number in conntrack, 0 for the one that its name prefers.
    """

    bridge: str
    subnets: tuple[IPNetwork, ...] = ()
    zone: int = 0


@dataclass(frozen=True, slots=True)
class Provider:
    """A network's upstream address on an existing bridge to the outside.

    Or a subnet that passes there untranslated; ``routed``: which the host routes.
    """

    bridge: str
    address: Address | IPNetwork
    routed: bool = False


@dataclass(frozen=True, slots=True)
class HostForward:
    """Published ports ``first`` to ``last`` of a host's address, or of all with None.

    ``target`` is the transit address of the namespace that knows the rest, and
    ``bridge`` the transit bridge it is on.  ``sources`` are the clients allowed,
    empty means all; a guest counts with its network's transit address.
    """

    proto: TransportProtocol
    address: Address | None
    first: int
    last: int
    target: Address
    bridge: str
    sources: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class Ways:
    """Where transit bridges may lead, and what is closed besides (``boundary``).

    ``outward`` are bridges that lead out of the host, ``links`` all links that do
    (for iptables, which cannot tell a bridge).  ``closed`` are links that forward IPv4
    because of a transit bridge alone; ``closed6`` tells that the host forwards
    IPv6 because of networks alone, and then ``links`` are those that it came to.
    """

    outward: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    closed6: bool = False


@dataclass(frozen=True, slots=True)
class HostPolicy:
    """What the host must let through, for all networks that are up.

    ``bridge_nf`` is whether net.bridge.bridge-nf-call-iptables is 1, ``bridge_nf6``
    the same of bridge-nf-call-ip6tables; what is in ``private`` and ``provider``
    matters with the one of its family only.  ``public`` are subnets behind a transit
    bridge that pass untranslated: what of them gets in, their namespaces decide.  ``dhcp`` are
    bridges on which networks ask a DHCP server, who have no address then.  Without
    ``ways`` a transit bridge may lead anywhere.
    """

    transits: tuple[Transit, ...] = ()
    private: tuple[Private, ...] = ()
    provider: tuple[Provider, ...] = ()
    bridge_nf: bool = False
    forwards: tuple[HostForward, ...] = ()
    dhcp: tuple[str, ...] = ()
    bridge_nf6: bool = False
    public: tuple[Provider, ...] = ()
    ways: Ways | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the host needs no rules at all."""
        routed = any(each.routed for each in self.provider)
        return not (self.transits or self.bridge_nf or self.bridge_nf6 or routed)

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
            raise FirewallError("a port is forwarded to a bridge that is no transit")


def rules(policy: HostPolicy, backend_name: str = host_nftables.name) -> tuple[Rule, ...]:
    """The host's own rules: what is translated, and what goes in and out of a transit."""
    bridges: dict[str, list[Transit]] = {}
    for transit in policy.transits:
        bridges.setdefault(transit.bridge, []).append(transit)
    kinds = backend_name == host_nftables.name
    shared = [
        rule
        for bridge, transits in bridges.items()
        for rule in _transit(policy, bridge, transits, kinds=kinds)
    ]
    if policy.ways is not None and policy.ways.closed6:
        shared += [rule for each in policy.provider if each.routed for rule in _passing(each)]
    shared += boundary.closed(policy.ways, kinds=kinds)
    return (*_dnats(policy), *shared, *_zoned(policy))


def _published(policy: HostPolicy, bridge: str) -> set[int]:
    """The families that some port is published in, on a transit bridge."""
    return {each.target.version for each in policy.forwards if each.bridge == bridge}


def own_rules(policy: HostPolicy) -> tuple[Rule, ...]:
    """Those of the rules that are a single network's."""
    return (*_dnats(policy), *_zoned(policy))


def public_rules(policy: HostPolicy) -> list[Rule]:
    """What lets a single network's subnets pass untranslated."""
    routed = (each for each in policy.provider if each.routed)
    return [rule for each in (*policy.public, *routed) for rule in _passing(each)]


def _passing(public: Provider) -> list[Rule]:
    """What lets a subnet behind a bridge pass untranslated."""
    bridge, subnet = public.bridge, single(public.address)
    return [
        Rule(chain="forward", iif=bridge, sources=subnet, action="accept"),
        Rule(chain="forward", oif=bridge, destinations=subnet, action="accept"),
    ]


def _dnats(policy: HostPolicy) -> list[Rule]:
    return [rule for forward in policy.forwards for rule in _dnat(forward)]


def _zoned(policy: HostPolicy) -> list[Rule]:
    # One for both families, which is one element: what is not bridged never comes from there.
    return [
        rule
        for private in policy.private
        if policy.bridge_nf or _filtered6(policy, private)
        for rule in _apart(private.bridge, private.zone or zones.preferred(private.bridge))
    ]


def _apart(bridge: str, zone: int) -> Iterator[Rule]:
    """Connections of a bridge's own, which no NAT of the host's changes."""
    yield Rule(chain="raw", iif=bridge, action="zone", zone=zone, unique=True)
    yield Rule(chain="bridged_in", iif=bridge, action="keep", unique=True)
    yield Rule(chain="bridged_out", oif=bridge, action="keep", unique=True)


def _filtered6(policy: HostPolicy, private: Private) -> bool:
    """Whether frames of IPv6 on a private bridge meet the host's rules."""
    return policy.bridge_nf6 and any(subnet.version == 6 for subnet in private.subnets)


def _dnat(forward: HostForward) -> Iterator[Rule]:
    lo = LOOPBACK6 if forward.address is None and forward.target.version == 6 else ()
    # One source a rule, since nft lists several in its own order, and merged.
    for source in limited(forward.sources) or (None,):
        yield Rule(
            chain="dstnat",
            sources=(source,) if source else (),
            destinations=single(forward.address) if forward.address else lo,
            not_destinations=bool(lo),
            local=forward.address is None,
            protocol=forward.proto,
            span=(forward.first, forward.last),
            action="dnat",
            to=forward.target,
            unique=True,
        )


def _transit(
    policy: HostPolicy, bridge: str, transits: list[Transit], *, kinds: bool
) -> Iterator[Rule]:
    published = _published(policy, bridge)
    yield from _loopback(bridge)
    for transit in transits:
        yield from _sources(transit, transit.subnet.version in published)
    behind: list[boundary.Subnets] = [(transit.subnet,) for transit in transits]
    public = [each for each in policy.public if each.bridge == bridge]
    behind += [single(each.address) for each in public]
    yield from boundary.outward(bridge, behind, policy.ways, kinds=kinds)
    for each in public:
        yield Rule(chain="forward", oif=bridge, destinations=single(each.address), action="accept")
    yield Rule(chain="forward", oif=bridge, states=("established", "related"), action="accept")
    if published:
        yield Rule(chain="forward", oif=bridge, translated=True, states=("new",), action="accept")
    yield Rule(chain="forward", oif=bridge, action="drop")
    yield from boundary.from_host(bridge, [(transit.subnet,) for transit in transits])


def _loopback(bridge: str) -> Iterator[Rule]:
    # From anywhere: the kernel drops them, too, but only after they were translated.
    yield Rule(chain="raw", iif="lo", not_iif=True, destinations=LOOPBACK, action="drop")
    yield Rule(chain="raw", iif=bridge, sources=LOOPBACK, action="drop")


def _sources(transit: Transit, published: bool) -> Iterator[Rule]:
    """Whom a service sees, and whom the outside sees."""
    bridge, subnet = transit.bridge, (transit.subnet,)
    seen = (subnet, LOOPBACK) if transit.subnet.version == 4 else (subnet,)
    for sources in seen if published else ():
        yield Rule(
            chain="srcnat", oif=bridge, sources=sources, translated=True, action="masquerade"
        )
    yield Rule(chain="srcnat", oif=bridge, not_oif=True, sources=subnet, action="masquerade")


def accepts(policy: HostPolicy) -> tuple[Rule, ...]:
    """What a foreign chain must not drop; one address a rule, as iptables lists them."""
    found = [rule for transit in policy.transits for rule in _transit_accepts(transit)]
    asked = (Provider(bridge, each) for bridge in policy.dhcp for each in DHCP)
    found += [rule for each in asked for rule in _provider_accepts(each)]
    found += [rule for bridge in links6(policy) for rule in _neighbours(bridge)]
    return (*found, *own_accepts(policy))


def links6(policy: HostPolicy) -> list[str]:
    """The bridges to the outside on which neighbours of IPv6 meet the host's rules."""
    outside = policy.provider if policy.bridge_nf6 else ()
    return sorted({each.bridge for each in outside if each.address.version == 6})


def _neighbours(bridge: str) -> Iterator[Rule]:
    yield _bridged(bridge, sources=(LINK_LOCAL,))
    for destination in (LINK_LOCAL, MULTICAST):
        yield _bridged(bridge, destinations=(destination,))


def own_accepts(policy: HostPolicy) -> list[Rule]:
    """Those of the accepts that are a single network's."""
    found = [rule for private in policy.private for rule in _private(policy, private)]
    for provider in policy.provider:
        filtered = policy.bridge_nf6 if provider.address.version == 6 else policy.bridge_nf
        if provider.routed or filtered:
            found += _provider_accepts(provider)
    found += [rule for public in policy.public for rule in _transit_accepts(public)]
    return list(dict.fromkeys(found))


def _private(policy: HostPolicy, private: Private) -> Iterator[Rule]:
    if policy.bridge_nf:
        yield _bridged(private.bridge)
    if _filtered6(policy, private):
        yield _bridged(private.bridge, only=6)


def _transit_accepts(behind: Transit | Provider) -> Iterator[Rule]:
    bridge = behind.bridge
    subnet = (behind.subnet,) if isinstance(behind, Transit) else single(behind.address)
    yield Rule(chain="foreign", iif=bridge, sources=subnet, action="accept", comment=COMMENT)
    yield Rule(chain="foreign", oif=bridge, destinations=subnet, action="accept", comment=COMMENT)


def _provider_accepts(provider: Provider) -> Iterator[Rule]:
    bridge, address = provider.bridge, single(provider.address)
    yield _bridged(bridge, sources=address)
    yield _bridged(bridge, destinations=address)


def _bridged(
    bridge: str,
    sources: tuple[IPNetwork, ...] = (),
    destinations: tuple[IPNetwork, ...] = (),
    only: Family | None = None,
) -> Rule:
    return Rule(
        chain="foreign",
        iif=bridge,
        oif=bridge,
        sources=sources,
        destinations=destinations,
        only=only,
        action="accept",
        comment=COMMENT,
    )


def ensure(
    policy: HostPolicy, backend_name: str, announce: Announce = lambda: None
) -> tuple[str, ...]:
    """Bring the host's rules to ``policy``; where they are, nothing is written.

    Returns what differed, one line each; ``announce`` is called ahead of each
    change.  Atomic in each framework.  Raises FirewallError.
    """
    # Ours first: a foreign chain that lets something in relies on them.
    return tuple(
        line
        for framework in _frameworks(backend_name)
        for line in framework.ensure(
            _own(policy, framework, backend_name), accepts(policy), announce
        )
    )


def differences(policy: HostPolicy, backend_name: str) -> tuple[str, ...]:
    """What ``ensure`` would mend, one line each; () when all is well."""
    return tuple(
        line
        for framework in _frameworks(backend_name)
        for line in framework.differences(_own(policy, framework, backend_name), accepts(policy))
    )


def obstacles(policy: HostPolicy) -> tuple[str, ...]:
    """Others' chains that stop the networks' packets and are not ours to change, one line each."""
    return host_nftables.obstacles(accepts(policy))


def remove() -> None:
    """Take out everything of ours in both frameworks; nothing there is success."""
    host_nftables.remove()
    host_iptables.remove()


class Framework(Protocol):
    """One of the kernel's two rule frameworks, as the host's rules need it.

    ``own`` are the host's own rules, empty where the other framework has them;
    ``accepts`` what foreign chains of this framework must let through.
    """

    @property
    def name(self) -> str:
        """The name of the backend that uses it."""

    def ensure(
        self, own: tuple[Rule, ...], accepts: tuple[Rule, ...], announce: Announce, /
    ) -> tuple[str, ...]:
        """Bring everything of ours to these rules; returns what differed."""

    def differences(self, own: tuple[Rule, ...], accepts: tuple[Rule, ...], /) -> tuple[str, ...]:
        """What ``ensure`` would change."""


def _frameworks(backend_name: str) -> list[Framework]:
    both: list[Framework] = [host_nftables, host_iptables]
    return sorted(both, key=lambda framework: framework.name != backend_name)


def _own(policy: HostPolicy, framework: Framework, backend_name: str) -> tuple[Rule, ...]:
    if framework.name == backend_name:
        return rules(policy, backend_name)
    if framework.name == host_nftables.name:
        # NAT of iptables-nft comes ahead of legacy NAT where its chain is the younger one.
        return tuple(rule for rule in _zoned(policy) if rule.action == "keep")
    return ()
