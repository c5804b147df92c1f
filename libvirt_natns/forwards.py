# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a guest's metadata to forwards with nothing left to look up: pure.

What has to be looked up or chosen (a reservation, a free port, an address of
one's own) comes through ``Choices``.
"""

from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Protocol

from libvirt_natns import model
from libvirt_natns.errors import ConflictError, DocumentError
from libvirt_natns.model import (
    AddressRequest,
    Domain,
    Forward,
    Network,
    Nic,
    PortForward,
    PortRange,
    StaticNat,
    Upstream,
)
from libvirt_natns.records import dataclass
from libvirt_natns.registry import Claims

Span = tuple[int, int, int, int]
"""First and last port, and the first and last port that they lead to."""

ANY = IPv4Address(0)
"""Stands for all addresses of the host, where an upstream of kind "host" listens."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A guest's NIC in a network of ours; ``address`` is the network's upstream address."""

    nic: Nic
    network: Network
    upstream: Upstream
    address: IPv4Address


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a forward is; ``name`` says in messages what it is, too."""

    uuid: str
    name: str


class Choices(Protocol):
    """What is decided once and kept."""

    def target(self, owner: str, attachment: Attachment) -> IPv4Address:
        """The NIC's DHCP address, reserved for it if it has none yet."""

    def port(
        self, owner: str, attachment: Attachment, proto: model.Protocol, target_port: int
    ) -> int:
        """A free port for start="auto", always the same for one owner and target."""

    def address(
        self, request: AddressRequest, domain: Domain, attachment: Attachment
    ) -> IPv4Address:
        """The upstream address of a guest's own."""


def resolve(domain: Domain, attachments: list[Attachment], choices: Choices) -> Claims:
    """All that a guest publishes.

    ``attachments`` are its NICs in networks of ours, in the domain's order; with
    none, nothing in its metadata counts.  Raises DocumentError for what can
    never hold.
    """
    if domain.nat is None or not attachments:
        return Claims(domain.uuid)
    statics = tuple(
        _static(domain, request, attachments, choices) for request in domain.nat.addresses
    )
    forwards = tuple(
        forward
        for wanted in domain.nat.forwards
        for forward in _forwards(domain, wanted, attachments, statics, choices)
    )
    return Claims(domain.uuid, forwards, statics)


def of_network(
    network: Network, upstream: Upstream, address: IPv4Address, choices: Choices
) -> Claims:
    """What a network's own metadata publishes."""
    at = Attachment(Nic(""), network, upstream, address)
    owner = Owner(network.uuid, f"network {network.name}")
    found = []
    for wanted in network.nat.forwards if network.nat else ():
        listen = _listen(owner.name, wanted.address, upstream, {address})
        # The document is refused without one.
        target = wanted.guest_address or address
        found += list(_made(owner, wanted, at, listen, target, choices))
    return Claims(network.uuid, tuple(found))


def _select(
    domain: Domain, element: str, network: str | None, mac: str | None, among: list[Attachment]
) -> Attachment:
    """The NIC that an element's ``network`` or ``mac`` names; without either, the first."""
    for attachment in among:
        if network in (None, attachment.network.name) and mac in (None, attachment.nic.mac):
            return attachment
    named = f"network='{network}'" if network else f"mac='{mac}'"
    raise DocumentError(
        f"guest {domain.name}: <natns:{element} {named}> names no NIC of it in a network"
        " that libvirt-natns handles",
        "correct it with virsh edit",
    )


def _forwards(
    domain: Domain,
    wanted: PortForward,
    attachments: list[Attachment],
    statics: tuple[StaticNat, ...],
    choices: Choices,
) -> Iterator[Forward]:
    at = _select(domain, "portForward", wanted.network, wanted.mac, attachments)
    own = {static.address for static in statics if static.network == at.network.uuid}
    who = f"guest {domain.name}"
    listen = _listen(who, wanted.address, at.upstream, {at.address, *own})
    target = _target(domain, wanted, at, choices)
    return _made(Owner(domain.uuid, who), wanted, at, listen, target, choices)


def _made(
    owner: Owner,
    wanted: PortForward,
    at: Attachment,
    listen: IPv4Address | None,
    target: IPv4Address,
    choices: Choices,
) -> Iterator[Forward]:
    chosen = []
    for span in wanted.ranges:
        if span.auto:
            port = choices.port(owner.uuid, at, wanted.proto, span.to)
            chosen.append((port, port, span.to, span.to))
    for first, last, to, to_last in [*spans(wanted), *chosen]:
        yield Forward(
            owner.uuid,
            owner.name,
            at.network.uuid,
            wanted.proto,
            listen if listen is not None else at.address,
            first,
            last,
            target,
            to,
            to_last,
            wanted.sources,
        )


def _listen(
    who: str, wanted: IPv4Address | None, upstream: Upstream, own: set[IPv4Address]
) -> IPv4Address | None:
    """Where to listen; None for the network's upstream address."""
    if upstream.kind == "host":
        # Any address of the host's, 127.0.0.1 too; whether it has it only the host knows.
        return wanted or ANY
    if wanted is None or wanted in own:
        return wanted
    raise DocumentError(
        f"{who}: <natns:portForward address='{wanted}'> is not an address of its network",
        f"use one of {', '.join(map(str, sorted(own)))}, or leave it out",
    )


def _target(domain: Domain, wanted: PortForward, at: Attachment, choices: Choices) -> IPv4Address:
    if wanted.guest_address is None:
        return choices.target(domain.uuid, at)
    reachable = [subnet.network for subnet in at.network.subnets]
    reachable += [route.destination for route in at.network.routes]
    gateways = {subnet.gateway for subnet in at.network.subnets}
    inside = any(wanted.guest_address in subnet for subnet in reachable)
    if not inside or wanted.guest_address in gateways:
        raise DocumentError(
            f"guest {domain.name}: <natns:portForward guestAddress='{wanted.guest_address}'>"
            f" is no guest's address in network {at.network.name}",
            f"use one of {', '.join(map(str, reachable))}",
        )
    return wanted.guest_address


def spans(forward: PortForward) -> list[Span]:
    """Its ports without the excluded ones."""
    excluded = sorted(
        (span.start, span.end) for span in forward.ranges if span.exclude and not span.auto
    )
    found = []
    for span in forward.ranges:
        if not span.exclude and not span.auto:
            found += _without(span, excluded)
    return found


def _without(span: PortRange, excluded: list[tuple[int, int]]) -> list[Span]:
    found = []
    start = span.start
    for first, last in [*excluded, (span.end + 1, span.end + 1)]:
        if first > start and start <= span.end:
            end = min(first - 1, span.end)
            to = span.to if span.onto_one else span.to + start - span.start
            found.append((start, end, to, to if span.onto_one else to + end - start))
        start = max(start, last + 1)
    return found


def _static(
    domain: Domain, request: AddressRequest, attachments: list[Attachment], choices: Choices
) -> StaticNat:
    at = _select(domain, "address", request.network, request.mac, attachments)
    if at.upstream.kind == "host":
        raise ConflictError(
            f"guest {domain.name}: upstream {at.upstream.name} of network {at.network.name}"
            " has no addresses to give away",
            "use an upstream of kind 'bridge' for <natns:address>",
        )
    return StaticNat(
        domain.uuid,
        f"guest {domain.name}",
        at.network.uuid,
        choices.address(request, domain, at),
        choices.target(domain.uuid, at),
        request.ports,
    )


# -- in words ------------------------------------------------------------------


def ports(first: int, last: int) -> str:
    """A range of ports: one alone, or "8000-8010"."""
    return str(first) if first == last else f"{first}-{last}"


def listening(address: IPv4Address) -> str:
    """Where a forward listens: its address, or "*" for all of the host's."""
    return str(address) if int(address) else "*"


def said(claim: Forward | StaticNat) -> str:
    """A forward or an address of a guest's own, in words."""
    if isinstance(claim, StaticNat):
        allowed = ", ".join(f"{each.proto} {ports(each.first, each.last)}" for each in claim.ports)
        return f"address {claim.address} -> {claim.target}" + (f" ({allowed})" if allowed else "")
    sources = f" from {', '.join(map(str, claim.sources))}" if claim.sources else ""
    return (
        f"{claim.proto} {listening(claim.address)}:{ports(claim.first, claim.last)}"
        f" -> {claim.target}:{ports(claim.to, claim.to_last)}{sources}"
    )
