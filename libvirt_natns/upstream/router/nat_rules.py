# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firewall rules of a router namespace, for both backends.

* Packets from the host and from networks' namespaces to the outside get an address of the
  router, as routes and rules of the host said (``nic_sources``).  Replies come in.
* The host's ports and the networks' published ports answer on each IPv4 address of the
  router.  Clients outside, the host and guests can use them.  Behind the router, packets
  of the host and of guests have the router's address.
* No other packet passes in IPv4.  In IPv6, packets to the host's own addresses pass, as they
  did before the router: the host filters them.  Packets of prefixes that the outside knows
  pass both ways: the networks' namespaces filter them.

No program listens in the namespace, so it needs no rules for packets to itself.

Limits: where networks get no IPv6, legacy iptables has no IPv6 rules.  Then the kernel asks
for an unused target address on the NIC's link, and drops the packet later.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from libvirt_natns import names
from libvirt_natns.addresses import default_route
from libvirt_natns.firewall.helpers import following
from libvirt_natns.firewall.host_policy import HostForward
from libvirt_natns.firewall.host_rules import dnat
from libvirt_natns.firewall.rule import Rule, limited, single
from libvirt_natns.operations.firewall_operations import Firewall
from libvirt_natns.upstream.router.downstream import RouterNeeds
from libvirt_natns.upstream.router.target import Target

NOTHING = RouterNeeds()


def rules(target: Target, needs: RouterNeeds = NOTHING) -> tuple[Rule, ...]:
    """Return all rules of a router with the needs of its networks."""
    return (
        *_followed(needs),
        *_translated(target, needs.forwards),
        Rule(chain="clamp", protocol="tcp", syn=True, action="clamp-mss"),
        *_masqueraded(target),
        *(_masqueraded6(target) if target.transit6 else ()),
        *_passing(target, _passing6(target, needs) if target.transit6 else ()),
    )


def _insides(target: Target) -> tuple[tuple[str, tuple[IPv4Network, ...]], ...]:
    """Return the links towards the host and the networks, with their subnets."""
    return (
        (names.ROUTER_HOST_LINK, (IPv4Network(target.host_subnet),)),
        (names.ROUTER_TRANSIT, (IPv4Network(target.transit),)),
    )


def _followed(needs: RouterNeeds) -> Iterator[Rule]:
    for each in needs.followed:
        yield from following(each.bridge, each.helpers, single(each.address))


def _translated(target: Target, forwards: Iterable[HostForward]) -> Iterator[Rule]:
    for address in target.addresses4:
        for protocol, first, last in target.ports:
            # Translated to itself: routing leads the packet to the host.
            yield Rule(
                chain="dstnat",
                destinations=single(IPv4Address(address)),
                protocol=protocol,
                span=(first, last),
                action="dnat",
                to=IPv4Address(address),
                unique=True,
            )
    for protocol, first, last in target.ports:
        yield Rule(
            chain="dstnat",
            local=True,
            protocol=protocol,
            span=(first, last),
            action="dnat",
            to=target.host.ip,
            unique=True,
        )
    for forward in forwards:
        yield from dnat(forward)


def _masqueraded(target: Target) -> Iterator[Rule]:
    for link, _ in _insides(target):
        for _, subnets in _insides(target):
            # Otherwise the reply would take another way: to itself, or past the router.
            yield Rule(
                chain="srcnat", oif=link, sources=subnets, translated=True, action="masquerade"
            )
    for to, source in target.sources:
        destination = IPv4Network(to)
        for _, subnets in _insides(target):
            yield Rule(
                chain="srcnat",
                oif=target.nic,
                sources=subnets,
                destinations=limited((destination,)),
                action="snat" if source else "masquerade",
                to=IPv4Address(source) if source else None,
            )
    for _, subnets in _insides(target):
        yield Rule(chain="srcnat", oif=target.nic, sources=subnets, action="masquerade")


def _masqueraded6(target: Target) -> Iterator[Rule]:
    """Yield the rules by which packets from the transit bridge get the router's own address."""
    sources = (IPv6Network(target.transit6),)
    # Also on the bridge: otherwise the reply would go directly, past the router.
    for link in (target.nic, names.ROUTER_HOST_LINK, names.ROUTER_TRANSIT):
        yield Rule(chain="srcnat", oif=link, sources=sources, action="masquerade")


def _passing(target: Target, six: Iterable[Rule]) -> Iterator[Rule]:
    yield Rule(chain="forward", states=("established", "related"), action="accept")
    for link, subnets in _insides(target):
        yield Rule(chain="forward", iif=link, oif=target.nic, sources=subnets, action="accept")
        yield Rule(
            chain="forward",
            oif=link,
            destinations=subnets,
            translated=True,
            states=("new",),
            action="accept",
            comment="published",
        )
    yield from _passing_kept(target)
    yield from six
    # In IPv6, too: the NIC's neighbours must not use this router.
    yield Rule(chain="forward", iif=target.nic, oif=target.nic, action="drop")
    yield Rule(chain="forward", destinations=(default_route(4),), action="drop")


def _passing_kept(target: Target) -> Iterator[Rule]:
    """Yield the rules for the IPv4 addresses that the host keeps."""
    if not target.addresses4:
        return
    kept = tuple(IPv4Network(address) for address in target.addresses4)
    link = names.ROUTER_HOST_LINK
    yield Rule(chain="forward", iif=link, oif=target.nic, sources=kept, action="accept")
    yield Rule(chain="forward", oif=link, destinations=kept, protocol="icmp", action="accept")
    for protocol, first, last in target.ports:
        yield Rule(
            chain="forward",
            oif=link,
            destinations=kept,
            protocol=protocol,
            span=(first, last),
            action="accept",
        )


def _passing6(target: Target, needs: RouterNeeds) -> Iterator[Rule]:
    """Yield the rules that let networks' addresses pass the transit bridge, and no others."""
    bridge, own = names.ROUTER_TRANSIT, (IPv6Network(target.transit6),)
    yield Rule(chain="forward", iif=bridge, sources=own, action="accept")
    for prefix, gateway in needs.prefixes:
        # The comment has the gateway, so that ``was_loaded_last`` sees changed routes, too.
        public, by = (IPv6Network(prefix),), f"by {gateway}"
        yield Rule(chain="forward", iif=bridge, sources=public, action="accept", comment=by)
        yield Rule(chain="forward", oif=bridge, destinations=public, action="accept", comment=by)
    yield Rule(
        chain="forward",
        oif=bridge,
        destinations=own,
        translated=True,
        states=("new",),
        action="accept",
        comment="published",
    )
    yield Rule(chain="forward", iif=bridge, only=6, action="drop")
    yield Rule(chain="forward", oif=bridge, only=6, action="drop")


def firewall(target: Target, wanted: tuple[Rule, ...]) -> Firewall:
    """Return the rule set of a router as an operation."""
    return Firewall(target.namespace, target.name, target.backend, wanted, layout="router")
