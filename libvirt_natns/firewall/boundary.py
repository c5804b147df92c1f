# SPDX-License-Identifier: LGPL-2.1-or-later
"""How far a transit bridge reaches, and what the host forwards besides.

These rules are in a chain of our own, where an accept ends that chain alone and a drop
is final: no accept of others undoes the drop.

A flow that begins on a transit bridge leaves by links that lead out of the host.  A bridge
does so only if it is listed; nftables tells a bridge by its kind, so that the bridges of
networks and containers that start later are closed, too.  iptables knows names alone:
there the links that lead out are listed, and all other links are closed.  A published port of
the host's passes wherever it leads, if the rules of others let it.

A link that forwards because of us forwards for the transit bridge alone.
"""

from collections.abc import Iterable, Iterator

from libvirt_natns.addresses import Family, IPNetwork
from libvirt_natns.firewall.host_policy import Ways
from libvirt_natns.firewall.rule import Rule, Transport

BRIDGE = "bridge"
"""The kernel's name for that kind of link."""

TRANSPORTS: tuple[Transport, ...] = ("tcp", "udp", "sctp")

Subnets = tuple[IPNetwork, ...]


def outward(
    bridge: str, behind: Iterable[Subnets], ways: Ways | None, *, kinds: bool
) -> Iterator[Rule]:
    """Yield the flows that may begin on a transit bridge; without ``ways``, to anywhere.

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
    """Yield the flows that the host may begin towards a transit bridge: published ports, pings.

    By a namespace's own address, a flow of the host would bypass the addresses and clients
    that a port is published for.
    """
    yield Rule(chain="output", oif=bridge, translated=True, action="accept")
    yield Rule(chain="output", oif=bridge, states=("established", "related"), action="accept")
    for subnet in subnets:
        for protocol in TRANSPORTS:
            yield Rule(
                chain="output", oif=bridge, destinations=subnet, protocol=protocol, action="drop"
            )


def closed(ways: Ways | None, *, kinds: bool) -> Iterator[Rule]:
    """Close links that forward because of us to all packets that are not ours.

    The rules are for packets that concern no transit bridge.  Replies and published ports of
    others pass: their links may have begun to forward, too, since we looked.
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
            # Other bridges are for guests and containers of others, which forward for them.
            yield Rule(chain="forward", iif_kind=BRIDGE, only=6, action="accept")
            yield Rule(chain="forward", only=6, action="drop")


def _crossing(link: str, family: Family) -> Rule:
    """Drop what leaves by another link: with bridge-nf, bridged frames leave by the same."""
    return Rule(chain="forward", iif=link, oif=link, not_oif=True, only=family, action="drop")


def _begun(family: Family) -> Iterator[Rule]:
    yield Rule(chain="forward", only=family, states=("established", "related"), action="accept")
    yield Rule(chain="forward", only=family, translated=True, action="accept")
