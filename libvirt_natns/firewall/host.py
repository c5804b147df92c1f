# SPDX-License-Identifier: LGPL-2.1-or-later
"""The few rules that the host's own namespace needs.

* Transit bridges (upstreams of kind "host"): routed and masqueraded, replies in,
  and what is addressed to a published port of the host's; nothing else.
* Published ports answer on the host's addresses, to whoever asks: clients
  outside, the host itself, and guests, whose namespaces it takes for clients.
  Ports stay what they are; the namespace knows whose they are.
* Where bridged frames pass through iptables (bridge-nf-call-iptables, which is
  never written here): private frames stay out of the host's conntrack, which
  would take twins with one address for one flow.
* A way past foreign chains that drop what they do not know, Docker's above all:
  an accept of ours does not undo another chain's drop, so such a chain gets one
  jump at its top to a chain of ours.

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
where the program nft is.  The check that a foreign chain begins with our jump
holds for the moment: whoever reloads it later drops the jump.  With legacy
iptables, fragments of twins' packets are put together before ``notrack``, so
two that bear the same addresses and identification can mix.
"""

from collections.abc import Callable, Iterator
from ipaddress import IPv4Network, IPv6Network
from typing import Protocol

from libvirt_natns.addresses import Address, Family, IPNetwork
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import host_iptables, host_nftables
from libvirt_natns.firewall.rules import (
    LINK_LOCAL,
    MULTICAST,
    Rule,
    checked_interface,
    limited,
    single,
)
from libvirt_natns.model import Protocol as TransportProtocol
from libvirt_natns.records import dataclass

COMMENT = "libvirt-natns"

Announce = Callable[[], None]

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
    """The private bridge of a network that is up, with its subnets."""

    bridge: str
    subnets: tuple[IPNetwork, ...] = ()


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
class HostPolicy:
    """What the host must let through, for all networks that are up.

    ``bridge_nf`` is whether net.bridge.bridge-nf-call-iptables is 1, ``bridge_nf6``
    the same of bridge-nf-call-ip6tables; what is in ``private`` and ``provider``
    matters with the one of its family only.  ``public`` are subnets behind a transit
    bridge that pass untranslated: what of them gets in, their namespaces decide.
    """

    transits: tuple[Transit, ...] = ()
    private: tuple[Private, ...] = ()
    provider: tuple[Provider, ...] = ()
    bridge_nf: bool = False
    forwards: tuple[HostForward, ...] = ()
    bridge_nf6: bool = False
    public: tuple[Provider, ...] = ()

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
        for end in attached:
            checked_interface(end.bridge)
        if not {forward.bridge for forward in self.forwards} <= {t.bridge for t in self.transits}:
            raise FirewallError("a port is forwarded to a bridge that is no transit")


def rules(policy: HostPolicy) -> tuple[Rule, ...]:
    """The host's own rules: what is translated, and what goes in and out of a transit."""
    bridges: dict[str, list[Transit]] = {}
    for transit in policy.transits:
        bridges.setdefault(transit.bridge, []).append(transit)
    shared = [
        rule for bridge, transits in bridges.items() for rule in _transit(policy, bridge, transits)
    ]
    translated, untracked = _dnats(policy), _notracks(policy)
    return (*translated, *shared, *untracked)


def _published(policy: HostPolicy, bridge: str) -> set[int]:
    """The families that some port is published in, on a transit bridge."""
    return {each.target.version for each in policy.forwards if each.bridge == bridge}


def own_rules(policy: HostPolicy) -> tuple[Rule, ...]:
    """Those of the rules that are a single network's."""
    return (*_dnats(policy), *_notracks(policy))


def public_rules(policy: HostPolicy) -> list[Rule]:
    """What lets subnets behind transit bridges pass untranslated, also a single network's."""
    return [rule for each in policy.public for rule in _passing(each)]


def _passing(public: Provider) -> list[Rule]:
    """What lets a subnet behind a transit bridge pass untranslated."""
    bridge, subnet = public.bridge, single(public.address)
    return [
        Rule(chain="forward", iif=bridge, sources=subnet, action="accept"),
        Rule(chain="forward", oif=bridge, destinations=subnet, action="accept"),
    ]


def _dnats(policy: HostPolicy) -> list[Rule]:
    return [rule for forward in policy.forwards for rule in _dnat(forward)]


def _notracks(policy: HostPolicy) -> list[Rule]:
    # One for both families, which is one element: what is not bridged never comes from there.
    return [
        Rule(chain="raw", iif=private.bridge, action="notrack", unique=True)
        for private in policy.private
        if policy.bridge_nf or _filtered6(policy, private)
    ]


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


def _transit(policy: HostPolicy, bridge: str, transits: list[Transit]) -> Iterator[Rule]:
    published = _published(policy, bridge)
    yield from _loopback(bridge)
    for transit in transits:
        yield from _sources(transit, transit.subnet.version in published)
    for transit in transits:
        yield Rule(chain="forward", iif=bridge, sources=(transit.subnet,), action="accept")
    for public in policy.public:
        if public.bridge == bridge:
            yield from _passing(public)
    yield Rule(chain="forward", iif=bridge, action="drop")
    yield Rule(chain="forward", oif=bridge, states=("established", "related"), action="accept")
    if published:
        yield Rule(chain="forward", oif=bridge, translated=True, states=("new",), action="accept")
    yield Rule(chain="forward", oif=bridge, action="drop")


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
    yield Rule(chain="forward", iif=bridge, sources=subnet, action="accept", comment=COMMENT)
    yield Rule(chain="forward", oif=bridge, destinations=subnet, action="accept", comment=COMMENT)


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
        chain="forward",
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
    return rules(policy) if framework.name == backend_name else ()
