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

Limits: IPv4 only.  A client of a published port whose address lies in the private
subnet behind it is not answered.  A legacy table that this module was the first to use stays,
empty, for the kernel cannot drop one.  Foreign chains in nft are seen only
where the program nft is.  The check that a foreign chain begins with our jump
holds for the moment: whoever reloads it later drops the jump.  With legacy
iptables, fragments of twins' packets are put together before ``notrack``, so
two that bear the same addresses and identification can mix.
"""

from collections.abc import Callable, Iterator
from ipaddress import IPv4Network
from typing import Protocol

from libvirt_natns.addresses import Address, IPNetwork
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import host_iptables, host_nftables
from libvirt_natns.firewall.rules import Rule, checked_interface, limited, single
from libvirt_natns.model import Protocol as TransportProtocol
from libvirt_natns.records import dataclass

COMMENT = "libvirt-natns"

Announce = Callable[[], None]

LOOPBACK = (IPv4Network("127.0.0.0/8"),)


@dataclass(frozen=True, slots=True)
class Transit:
    """A private transit bridge and the subnet of its namespaces' upstream addresses."""

    bridge: str
    subnet: IPNetwork


@dataclass(frozen=True, slots=True)
class Private:
    """The private bridge of a network that is up, with its subnets."""

    bridge: str
    subnets: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class Provider:
    """A network's upstream address on an existing bridge to the outside."""

    bridge: str
    address: Address


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

    ``bridge_nf`` is whether net.bridge.bridge-nf-call-iptables is 1.
    """

    transits: tuple[Transit, ...] = ()
    private: tuple[Private, ...] = ()
    provider: tuple[Provider, ...] = ()
    bridge_nf: bool = False
    forwards: tuple[HostForward, ...] = ()

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
    published = {forward.bridge for forward in policy.forwards}
    shared = [
        rule
        for transit in policy.transits
        for rule in _transit(transit, transit.bridge in published)
    ]
    translated, untracked = _dnats(policy), _notracks(policy)
    return (*translated, *shared, *untracked)


def own_rules(policy: HostPolicy) -> tuple[Rule, ...]:
    """Those of the rules that are a single network's."""
    return (*_dnats(policy), *_notracks(policy))


def _dnats(policy: HostPolicy) -> list[Rule]:
    return [rule for forward in policy.forwards for rule in _dnat(forward)]


def _notracks(policy: HostPolicy) -> list[Rule]:
    return [
        Rule(chain="raw", iif=private.bridge, action="notrack", unique=True)
        for private in (policy.private if policy.bridge_nf else ())
    ]


def _dnat(forward: HostForward) -> Iterator[Rule]:
    # One source a rule, since nft lists several in its own order, and merged.
    for source in limited(forward.sources) or (None,):
        yield Rule(
            chain="dstnat",
            sources=(source,) if source else (),
            destinations=single(forward.address) if forward.address else (),
            local=forward.address is None,
            protocol=forward.proto,
            span=(forward.first, forward.last),
            action="dnat",
            to=forward.target,
            unique=True,
        )


def _transit(transit: Transit, published: bool) -> Iterator[Rule]:
    bridge, subnet = transit.bridge, (transit.subnet,)
    # From anywhere: the kernel drops them, too, but only after they were translated.
    yield Rule(chain="raw", iif="lo", not_iif=True, destinations=LOOPBACK, action="drop")
    yield Rule(chain="raw", iif=bridge, sources=LOOPBACK, action="drop")
    for sources in (subnet, LOOPBACK) if published else ():
        yield Rule(
            chain="srcnat", oif=bridge, sources=sources, translated=True, action="masquerade"
        )
    yield Rule(chain="srcnat", oif=bridge, not_oif=True, sources=subnet, action="masquerade")
    yield Rule(chain="forward", iif=bridge, sources=subnet, action="accept")
    yield Rule(chain="forward", iif=bridge, action="drop")
    yield Rule(chain="forward", oif=bridge, states=("established", "related"), action="accept")
    if published:
        yield Rule(chain="forward", oif=bridge, translated=True, states=("new",), action="accept")
    yield Rule(chain="forward", oif=bridge, action="drop")


def accepts(policy: HostPolicy) -> tuple[Rule, ...]:
    """What a foreign chain must not drop; one address a rule, as iptables lists them."""
    found = [rule for transit in policy.transits for rule in _transit_accepts(transit)]
    return (*found, *own_accepts(policy))


def own_accepts(policy: HostPolicy) -> list[Rule]:
    """Those of the accepts that are a single network's."""
    found: list[Rule] = []
    if policy.bridge_nf:
        found += [
            Rule(chain="forward", iif=bridge, oif=bridge, action="accept", comment=COMMENT)
            for bridge in dict.fromkeys(private.bridge for private in policy.private)
        ]
        found += [rule for provider in policy.provider for rule in _provider_accepts(provider)]
    return found


def _transit_accepts(transit: Transit) -> Iterator[Rule]:
    bridge, subnet = transit.bridge, (transit.subnet,)
    yield Rule(chain="forward", iif=bridge, sources=subnet, action="accept", comment=COMMENT)
    yield Rule(chain="forward", oif=bridge, destinations=subnet, action="accept", comment=COMMENT)


def _provider_accepts(provider: Provider) -> Iterator[Rule]:
    bridge, address = provider.bridge, single(provider.address)
    for sources, destinations in ((address, ()), ((), address)):
        yield Rule(
            chain="forward",
            iif=bridge,
            oif=bridge,
            sources=sources,
            destinations=destinations,
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
