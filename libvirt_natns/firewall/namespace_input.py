# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packets for the namespace itself: DHCP, DNS, TFTP and pings of guests, and neighbours."""

from collections.abc import Iterator

from libvirt_natns.addresses import IPNetwork
from libvirt_natns.firewall.namespace_edge import refused_lease
from libvirt_natns.firewall.namespace_limits import counted, senders
from libvirt_natns.firewall.namespace_policy import FamilyPolicy
from libvirt_natns.firewall.rule import IcmpType, Rule, Transport
from libvirt_natns.firewall.well_known import HOP_LIMIT, LINK_LOCAL, LISTENERS, NEIGHBOURS


def addressed(halves: tuple[FamilyPolicy, ...]) -> Iterator[Rule]:
    """Yield rules for packets that the namespace itself receives; the chain drops all others."""
    yield Rule(chain="input", iif="lo", action="accept")
    yield Rule(chain="input", states=("established", "related"), action="accept")
    for half in halves:
        yield from _neighbours_in(half) if half.family == 6 else ()
        yield from senders(half, "input")
    if halves:
        yield counted(halves[0].policy, "input")
    for half in halves:
        yield from _inside(half) if half.subnets else ()
        # The namespace's own addresses that the outside may know.
        yield from _ping(half, half.policy.upstream, (*half.own, *half.public_gateways))
        yield from refused_lease(half, "input")


def _neighbours_in(half: FamilyPolicy) -> Iterator[Rule]:
    inner, upstream = half.policy.inner, half.policy.upstream
    types: dict[str, tuple[IcmpType, ...]] = {
        inner: (*NEIGHBOURS, "nd-router-solicit"),
        upstream: (*NEIGHBOURS, "nd-router-advert"),
    }
    # Each solicitation makes an entry of its sender before any answer.
    yield Rule(
        chain="input",
        protocol="icmpv6",
        icmp=("nd-neighbor-solicit",),
        fresh="source",
        action="drop",
    )
    # The kernel makes entries of their targets where it accepts untracked advertisements.
    yield Rule(
        chain="input",
        iif=inner,
        protocol="icmpv6",
        icmp=("nd-neighbor-advert",),
        paced=True,
        action="drop",
    )
    for link in (inner, upstream) if half.outside else (inner,):
        yield Rule(
            chain="input",
            iif=link,
            protocol="icmpv6",
            icmp=types[link],
            hop_limit=HOP_LIMIT,
            action="accept",
        )
    yield Rule(
        chain="input", sources=(LINK_LOCAL,), protocol="icmpv6", icmp=LISTENERS, action="accept"
    )


def _inside(half: FamilyPolicy) -> Iterator[Rule]:
    inner = half.policy.inner
    yield _dhcp(half)
    if half.gateways:
        yield _service(half, "udp", 53, 69, *_served(half, "udp"))
        yield _service(half, "tcp", 53, *_served(half, "tcp"))
    gateways = half.gateways if half.family == 4 else (*half.gateways, LINK_LOCAL)
    yield from _ping(half, inner, gateways)
    # Refused at once, or a guest that tries another port waits for a time-out.
    for protocol in ("tcp", "udp"):
        yield Rule(
            chain="input", iif=inner, sources=half.subnets, protocol=protocol, action="reject"
        )


def _served(half: FamilyPolicy, protocol: Transport) -> tuple[int, ...]:
    return tuple(port for proto, port in half.policy.served if proto == protocol)


def _dhcp(half: FamilyPolicy) -> Rule:
    # A client without an address asks from 0.0.0.0, by broadcast; in IPv6 from its
    # address on the link, by multicast, and relays from one of their own.
    return Rule(
        chain="input",
        iif=half.policy.inner,
        only=half.only if half.family == 4 else None,
        sources=() if half.family == 4 else (LINK_LOCAL, *half.subnets),
        protocol="udp",
        ports=(67,) if half.family == 4 else (547,),
        action="accept",
        comment="DHCP",
    )


def _service(half: FamilyPolicy, protocol: Transport, *ports: int) -> Rule:
    """Return the rule for DNS or TFTP, for the private subnets only."""
    return Rule(
        chain="input",
        iif=half.policy.inner,
        sources=half.subnets,
        destinations=half.gateways,
        protocol=protocol,
        ports=ports,
        action="accept",
    )


def _ping(half: FamilyPolicy, interface: str, targets: tuple[IPNetwork, ...]) -> Iterator[Rule]:
    if targets:
        yield Rule(
            chain="input",
            iif=interface,
            destinations=targets,
            protocol="icmp" if half.family == 4 else "icmpv6",
            icmp=("echo-request",),
            action="accept",
        )
