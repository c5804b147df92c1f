# SPDX-License-Identifier: LGPL-2.1-or-later
"""How far a transit bridge reaches, and what the host forwards besides.

These rules are in a chain of our own, where an accept ends that chain alone and a drop
is final: no accept of anybody else's undoes it.

A flow that begins on a transit bridge leaves by links that lead out of the host.  A bridge
does so only if it is listed; nftables tells a bridge by its kind, so that the bridges of
networks and containers that start later are closed, too.  iptables knows names alone:
there the links that lead out are listed, and all others are closed.  A published port of
the host's passes wherever it leads, if the rules of others let it.

A link that forwards because of us forwards for the transit bridge alone.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

from libvirt_natns.addresses import Family, IPNetwork
from libvirt_natns.firewall.rule import Rule, Transport

BRIDGE = "bridge"
"""The kernel's name for that kind of link."""

TRANSPORTS: tuple[Transport, ...] = ("tcp", "udp", "sctp")

Subnets = tuple[IPNetwork, ...]


class Ways(Protocol):
    """Which links lead out of the host, and which of them forward because of us."""

    @property
    def outward(self) -> tuple[str, ...]:
        """Bridges that lead out of the host."""

    @property
    def links(self) -> tuple[str, ...]:
        """All links that lead out of the host."""

    @property
    def closed(self) -> tuple[str, ...]:
        """Links that forward IPv4 because of us alone."""

    @property
    def closed6(self) -> bool:
        """Return whether the host forwards IPv6 because of us alone."""


def outward(
    bridge: str, behind: Iterable[Subnets], ways: Ways | None, *, kinds: bool
) -> Iterator[Rule]:
    """What may begin on a transit bridge with these subnets; without ``ways``, to anywhere.

    ``kinds``: the backend can tell the kinds of links.
    """
    sources = list(behind)
    if ways is not None:
        for subnet in sources:
            for link in ways.outward if kinds else ways.links:
                yield Rule(chain="forward", iif=bridge, oif=link, sources=subnet, action="accept")
            yield Rule(
                chain="forward", iif=bridge, sources=subnet, translated=True, action="accept"
            )
            yield Rule(
                chain="forward",
                iif=bridge,
                sources=subnet,
                states=("established", "related"),
                action="accept",
            )
        if kinds:
            yield Rule(chain="forward", iif=bridge, oif_kind=BRIDGE, action="drop")
    if ways is None or kinds:
        for subnet in sources:
            yield Rule(chain="forward", iif=bridge, sources=subnet, action="accept")
    yield Rule(chain="forward", iif=bridge, action="drop")


def from_host(bridge: str, subnets: Iterable[Subnets]) -> Iterator[Rule]:
    """What the host itself may begin towards a transit bridge: published ports, and pings.

    By a namespace's own address it would pass by the addresses and clients that a port
    is published for.
    """
    yield Rule(chain="output", oif=bridge, translated=True, action="accept")
    yield Rule(chain="output", oif=bridge, states=("established", "related"), action="accept")
    for subnet in subnets:
        for protocol in TRANSPORTS:
            yield Rule(
                chain="output", oif=bridge, destinations=subnet, protocol=protocol, action="drop"
            )


def closed(ways: Ways | None, *, kinds: bool) -> Iterator[Rule]:
    """What is not forwarded by links that forward because of us: all that is not ours.

    For packets that concern no transit bridge.  Replies and published ports of others pass:
    those may have begun to forward, too, since we looked.
    """
    if ways is None:
        return
    if ways.closed:
        yield from _begun(4)
        for link in ways.closed:
            yield _crossing(link, 4)
    if ways.closed6:
        yield from _begun(6)
        for link in ways.outward if kinds else ways.links:
            yield _crossing(link, 6)
        if kinds:
            # Other bridges are for guests and containers of others, who forward for them.
            yield Rule(chain="forward", iif_kind=BRIDGE, only=6, action="accept")
            yield Rule(chain="forward", only=6, action="drop")


def _crossing(link: str, family: Family) -> Rule:
    """Drop what leaves by another link: with bridge-nf, bridged frames leave by the same."""
    return Rule(chain="forward", iif=link, oif=link, not_oif=True, only=family, action="drop")


def _begun(family: Family) -> Iterator[Rule]:
    yield Rule(chain="forward", only=family, states=("established", "related"), action="accept")
    yield Rule(chain="forward", only=family, translated=True, action="accept")
