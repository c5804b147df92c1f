# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a guest's metadata to forwards with nothing left to look up: pure.

What has to be looked up or chosen (a reservation, a free port, an address of
one's own) comes through ``Choices``.
"""

from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Protocol

from libvirt_natns import model
from libvirt_natns.addresses import Address
from libvirt_natns.errors import ConflictError, DocumentError
from libvirt_natns.model import (
    AddressRequest,
    Domain,
    Forward,
    NatMetadata,
    Network,
    Nic,
    PortForward,
    PortRange,
    StaticNat,
    Upstream,
)
from libvirt_natns.records import dataclass
from libvirt_natns.registry import Claims, PortKey

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
    address: Address


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a forward is; ``name`` says in messages what it is, too."""

    uuid: str
    name: str
    forwards: tuple[PortForward, ...]

    def fixed(self, proto: model.Protocol) -> tuple[tuple[int, int], ...]:
        """The ports that it wants by number."""
        mine = (each for each in self.forwards if each.proto == proto)
        return tuple((first, last) for each in mine for first, last, _, _ in spans(each))


@dataclass(frozen=True, slots=True)
class Selector:
    """What tells one forward from another of the same owner, as its metadata has it."""

    network: str | None
    mac: str | None
    address: str | None
    guest_address: str | None

    def __str__(self) -> str:
        given = (
            ("network", self.network),
            ("mac", self.mac),
            ("address", self.address),
            ("guestAddress", self.guest_address),
        )
        return " ".join(f"{name}={value}" for name, value in given if value is not None)


def selector(wanted: PortForward) -> Selector:
    """The selector of a forward."""
    address, guest = wanted.address, wanted.guest_address
    return Selector(
        wanted.network,
        wanted.mac,
        None if address is None else str(address),
        None if guest is None else str(guest),
    )


@dataclass(frozen=True, slots=True)
class Wish:
    """A range with start="auto".

    ``listen`` is where; ``avoided`` are the owner's own fixed ports of that protocol.
    """

    key: PortKey
    owner_name: str
    attachment: Attachment
    listen: Address
    avoided: tuple[tuple[int, int], ...]


class Choices(Protocol):
    """What is decided once and kept."""

    def target(self, owner: str, attachment: Attachment) -> Address:
        """The NIC's DHCP address, reserved for it if it has none yet."""

    def port(self, wish: Wish) -> int:
        """A free port for start="auto", the same for one key unless somebody else has it."""

    def address(self, request: AddressRequest, domain: Domain, attachment: Attachment) -> Address:
        """The upstream address of a guest's own."""


def resolve(domain: Domain, attachments: list[Attachment], choices: Choices) -> Claims:
    """All that a guest publishes.

    ``attachments`` are its NICs in networks of ours, in the domain's order; with
    none, nothing in its metadata counts.  Raises DocumentError for what can
    never hold.
    """
    if domain.nat is None or not attachments:
        return Claims(domain.uuid)
    _check_requests(domain, attachments)
    statics = tuple(
        _static(domain, request, attachments, choices) for request in domain.nat.addresses
    )
    forwards = tuple(
        forward
        for wanted in domain.nat.forwards
        for forward in _forwards(domain, domain.nat, wanted, attachments, statics, choices)
    )
    return Claims(domain.uuid, forwards, statics)


def of_network(network: Network, upstream: Upstream, address: Address, choices: Choices) -> Claims:
    """What a network's own metadata publishes."""
    at = Attachment(Nic(""), network, upstream, address)
    wishes = network.nat.forwards if network.nat else ()
    owner = Owner(network.uuid, f"network {network.name}", wishes)
    found = []
    for wanted in wishes:
        listen = _listen(owner.name, wanted.address, upstream, {address})
        # The document is refused without one.
        target = wanted.guest_address or address
        found += list(_made(owner, wanted, at, listen or address, target, choices))
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
    nat: NatMetadata,
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
    owner = Owner(domain.uuid, who, nat.forwards)
    return _made(owner, wanted, at, listen or at.address, target, choices)


def _made(
    owner: Owner,
    wanted: PortForward,
    at: Attachment,
    listen: Address,
    target: Address,
    choices: Choices,
) -> Iterator[Forward]:
    chosen = []
    for span in wanted.ranges:
        if span.auto:
            which = str(selector(wanted))
            key = PortKey(owner.uuid, at.network.uuid, wanted.proto, which, span.to)
            port = choices.port(Wish(key, owner.name, at, listen, owner.fixed(wanted.proto)))
            chosen.append((port, port, span.to, span.to))
    for first, last, to, to_last in [*spans(wanted), *chosen]:
        yield Forward(
            owner.uuid,
            owner.name,
            at.network.uuid,
            wanted.proto,
            listen,
            first,
            last,
            target,
            to,
            to_last,
            wanted.sources,
        )


def _listen(
    who: str, wanted: Address | None, upstream: Upstream, own: set[Address]
) -> Address | None:
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


def _target(domain: Domain, wanted: PortForward, at: Attachment, choices: Choices) -> Address:
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


def _check_requests(domain: Domain, attachments: list[Attachment]) -> None:
    """Refuse two addresses for one NIC, and one for two, which the metadata alone does not show."""
    nics, addresses = set(), set()
    for request in domain.nat.addresses if domain.nat else ():
        at = _select(domain, "address", request.network, request.mac, attachments)
        nic, address = (at.network.uuid, at.nic.mac), (at.upstream.name, request.address)
        if nic in nics:
            raise DocumentError(
                f"guest {domain.name}: two <natns:address> are for the NIC {at.nic.mac} in network"
                f" {at.network.name}",
                "remove one of them",
            )
        if request.address is not None and address in addresses:
            raise DocumentError(
                f"guest {domain.name}: two <natns:address> ask for {request.address}",
                "choose another for one of them, or address='auto'",
            )
        nics.add(nic)
        addresses.add(address)


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


def listening(address: Address) -> str:
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
