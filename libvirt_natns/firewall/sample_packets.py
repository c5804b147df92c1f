# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packets as the networks' guests send and get them, as values.

The host's own rules for such packets are known.  ``verdicts`` follows the samples through the
rules of others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Literal

from libvirt_natns.addresses import Address, Family, IPNetwork
from libvirt_natns.firewall.host_policy import HostForward
from libvirt_natns.firewall.rule import Rule

OUTSIDE: Mapping[Family, Address] = {
    4: ip_address("198.41.0.4"),
    6: ip_address("2001:503:ba3e::2:30"),
}
"""An address outside that no host has rules about: a root server of the DNS."""

HTTPS, DNS, CLIENT = 443, 53, 40000
"""Ports of a service that guests ask for, of the DNS, and of a client."""

ConnectionState = Literal["new", "established"]


@dataclass(frozen=True, slots=True)
class SamplePacket:
    """A packet of a connection as the host forwards it.

    ``iif`` and ``oif`` are the links by which the packet comes and goes; None for a link that is
    not known.  An address None is not known, either.  ``translated``: a published port has led
    the connection here.  ``local``: the destination is an address of the host.
    """

    family: Family
    iif: str | None
    oif: str | None
    source: Address | None
    destination: Address | None
    protocol: str = "tcp"
    sport: int = CLIENT
    dport: int = HTTPS
    state: ConnectionState = "new"
    translated: bool = False
    local: bool = False

    @property
    def is_reply(self) -> bool:
        """True for a packet that answers a guest."""
        return self.state == "established"

    def at(self, hook: str) -> "SamplePacket":
        """Return the packet as a chain of a hook sees it: with what is known there."""
        if hook == "prerouting":
            # The host's NAT has yet to give a reply the address of the network.
            kept = None if self.is_reply or self.translated else self.destination
            return replace(self, oif=None, destination=kept)
        return replace(self, iif=None, source=None) if hook == "postrouting" else self


WaysOut = Mapping[Family, str | None]
"""The link by which the host leads guests' packets out, by family; None without any."""


def of_accept(accept: Rule, ways: WaysOut) -> Iterator[SamplePacket]:
    """Yield packets that must pass for the sake of one rule of ``host_accepts``.

    A rule that names an address of guests as the source is about packets of guests.  A rule that
    names the address as the destination is about replies.
    """
    for family in _families(accept):
        if None in (accept.iif or ways.get(family), accept.oif or ways.get(family)):
            # Without a way out, nothing is forwarded that a chain could stop.
            continue
        outgoing = SamplePacket(
            family,
            accept.iif or ways[family],
            accept.oif or ways[family],
            member(accept.sources, family),
            member(accept.destinations, family),
        )
        # A rule that names no address is about frames between two guests, or guest and gateway.
        is_reply = bool(accept.destinations) and not accept.sources
        if is_reply:
            yield replace(outgoing, sport=HTTPS, dport=CLIENT, state="established")
            continue
        yield outgoing
        yield replace(outgoing, protocol="udp", dport=DNS)


def of_forward(forward: HostForward, ways: WaysOut) -> Iterator[SamplePacket]:
    """Yield the first packet from a client outside to a published port of the host."""
    family: Family = 4 if forward.target.version == 4 else 6
    way = ways.get(family)
    if way is not None:
        source = member(forward.sources, family)
        yield SamplePacket(
            family,
            way,
            forward.bridge,
            source,
            forward.target,
            protocol=forward.proto,
            dport=forward.first,
            translated=True,
        )


def _families(accept: Rule) -> tuple[Family, ...]:
    return (accept.family,) if accept.family else (4,)


def member(networks: Sequence[IPNetwork], family: Family) -> Address:
    """Return an address of a guest in the first network; without any, an address outside."""
    if not networks:
        return OUTSIDE[family]
    network = networks[0]
    # Not the first address, which is the router's own.
    return network[min(9, network.num_addresses - 1)]
