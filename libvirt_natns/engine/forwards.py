# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a guest's metadata to forwards with nothing left to look up: pure.

What has to be looked up or chosen (a reservation, a free port, an address of
one's own) comes through ``Choices``.
"""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from libvirt_natns.addresses import FAMILIES, Address, Family, bracketed, by_family, is_placeholder
from libvirt_natns.errors import ConflictError, DocumentError
from libvirt_natns.model.metadata import AddressRequest, NatMetadata, PortForward, PortRange
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.model.publication import Protocol as PortProtocol
from libvirt_natns.model.upstream import Outside, Upstream
from libvirt_natns.records import dataclass
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.state.claims import Claims

Span = tuple[int, int, int, int]
"""First and last port, and the first and last port that they lead to."""

ANY = IPv4Address(0)
ANY6 = IPv6Address(0)
"""Stand for all addresses of the host, where an upstream of kind "host" listens."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A guest's NIC in a network of ours, and what that has on its upstream."""

    nic: Nic
    network: Network
    upstream: Upstream
    outside: Outside

    def is_public(self, address: Address) -> bool:
        """Whether the outside knows an address in the network as it is."""
        return any(address in subnet for subnet in self.outside.public)

    def reached_by(self, family: Family) -> bool:
        """Whether anybody outside gets to the network by that family."""
        public = family == 6 and bool(self.outside.public)
        return public or self.outside.of(family) is not None


@dataclass(frozen=True, slots=True)
class Way:
    """Where a forward listens (None: nowhere), and where it leads to.

    ``direct``: clients may use the target's own address, on ports that stay as they are.
    """

    listen: Address | None
    target: Address
    direct: bool = False

    def address(self, span: Span) -> Address | None:
        """Where these ports listen."""
        first, last, to, to_last = span
        unchanged = (first, last) == (to, to_last)
        return self.target if self.direct and unchanged else self.listen


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a forward is; ``name`` says in messages what it is, too."""

    uuid: str
    name: str
    forwards: tuple[PortForward, ...]

    def fixed(self, proto: PortProtocol) -> tuple[tuple[int, int], ...]:
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

    ``listens`` is where, ``targets`` where it leads to; ``avoided`` are the owner's own
    fixed ports of that protocol.
    """

    key: PortKey
    owner_name: str
    attachment: Attachment
    listens: tuple[Address, ...]
    avoided: tuple[tuple[int, int], ...]
    targets: tuple[Address, ...] = ()


class Choices(Protocol):
    """What is decided once and kept."""

    def knows(self, domain: Domain, attachment: Attachment, family: Family) -> bool:
        """Whether the NIC's address of a family can be known."""

    def target(self, domain: Domain, attachment: Attachment, family: Family) -> Address:
        """The NIC's DHCP address, reserved for it if it has none yet."""

    def port(self, wish: Wish) -> int:
        """A free port for start="auto", the same for one key unless somebody else has it."""

    def address(
        self, request: AddressRequest, domain: Domain, attachment: Attachment, family: Family
    ) -> Address:
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


def of_network(network: Network, upstream: Upstream, outside: Outside, choices: Choices) -> Claims:
    """What a network's own metadata publishes."""
    at = Attachment(Nic(""), network, upstream, outside)
    wishes = network.nat.forwards if network.nat else ()
    owner = Owner(network.uuid, f"network {network.name}", wishes)
    found: list[Forward] = []
    for wanted in wishes:
        # The document is refused without one.
        if wanted.guest_address is not None:
            way = _way(owner.name, wanted, at, wanted.guest_address, set())
            found += _made(owner, wanted, at, [way], choices)
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
    ways = [
        _way(who, wanted, at, _target(domain, wanted, at, choices, family), own)
        for family in _families(domain, wanted, at, choices)
    ]
    owner = Owner(domain.uuid, who, nat.forwards)
    return _made(owner, wanted, at, ways, choices)


def _families(
    domain: Domain, wanted: PortForward, at: Attachment, choices: Choices
) -> list[Family]:
    """The families in which something is published.

    The one that it names; else all in which the network is reached and the guest's
    address can be known.  Raises ConflictError where there is none.
    """
    asked = (wanted.family,) if wanted.family else FAMILIES
    reached = [family for family in asked if at.reached_by(family)]
    if not reached:
        raise ConflictError(
            f"guest {domain.name}: network {at.network.name} has no"
            f" {' or '.join(f'IPv{family}' for family in asked)} on upstream {at.upstream.name}",
            "publish nothing there, or give the upstream addresses of that family",
        )
    known = [family for family in reached if choices.knows(domain, at, family)]
    return reached if wanted.guest_address else known or reached[:1]


def _made(
    owner: Owner, wanted: PortForward, at: Attachment, ways: list[Way], choices: Choices
) -> Iterator[Forward]:
    chosen: list[Span] = []
    for span in wanted.ranges:
        if span.auto:
            which = str(selector(wanted))
            key = PortKey(owner.uuid, at.network.uuid, wanted.proto, which, span.to)
            listens = tuple(way.listen or way.target for way in ways)
            fixed, targets = owner.fixed(wanted.proto), tuple(way.target for way in ways)
            port = choices.port(Wish(key, owner.name, at, listens, fixed, targets))
            chosen.append((port, port, span.to, span.to))
    for way in ways:
        for each in [*spans(wanted), *chosen]:
            yield _forward(owner, wanted, at, way, each)


def _forward(owner: Owner, wanted: PortForward, at: Attachment, way: Way, span: Span) -> Forward:
    address = way.address(span)
    first, last, to, to_last = span
    if address is None:
        raise DocumentError(
            f"{owner.name}: {wanted.proto} port {ports(first, last)} of {way.target} cannot lead"
            f" to {ports(to, to_last)}, as the network has no address of its own to listen on",
            f"leave the port as it is, or give upstream {at.upstream.name} a pool6",
        )
    return Forward(
        owner.uuid,
        owner.name,
        at.network.uuid,
        wanted.proto,
        address,
        first,
        last,
        way.target,
        to,
        to_last,
        wanted.sources,
    )


def _way(who: str, wanted: PortForward, at: Attachment, target: Address, own: set[Address]) -> Way:
    """How a guest's address is reached: by one of the network's, or of its ``own``."""
    family: Family = 4 if target.version == 4 else 6
    public = at.is_public(target)
    if wanted.address is None:
        everywhere = at.upstream.is_transit and at.outside.of(family) is not None
        listen = (ANY if family == 4 else ANY6) if everywhere else at.outside.of(family)
        return Way(listen, target, public)
    if public and wanted.address == target:
        return Way(None, target, True)
    # Any address of the host's, 127.0.0.1 too, or of the router's: who has it, checks it.
    if not at.upstream.is_transit:
        _check_listen(who, wanted.address, {*at.outside.addresses, *own})
    return Way(wanted.address, target)


def _check_listen(who: str, wanted: Address, own: set[Address]) -> None:
    if wanted not in own:
        known = [each for each in own if not is_placeholder(each)]
        listed = ", ".join(map(str, sorted(known, key=by_family))) or "those that it will have"
        raise DocumentError(
            f"{who}: <natns:portForward address='{wanted}'> is not an address of its network",
            f"use one of {listed}, or leave it out",
        )


def _target(
    domain: Domain, wanted: PortForward, at: Attachment, choices: Choices, family: Family
) -> Address:
    if wanted.guest_address is None:
        return choices.target(domain, at, family)
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
        nic = (at.network.uuid, at.nic.mac, _family_of(request, at))
        address = (at.upstream.name, request.address)
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
    if at.upstream.is_transit:
        raise ConflictError(
            f"guest {domain.name}: upstream {at.upstream.name} of network {at.network.name}"
            " has no addresses to give away",
            "use an upstream of kind 'bridge' for <natns:address>",
        )
    family = _family_of(request, at)
    return StaticNat(
        domain.uuid,
        f"guest {domain.name}",
        at.network.uuid,
        choices.address(request, domain, at, family),
        choices.target(domain, at, family),
        request.ports,
    )


def _family_of(request: AddressRequest, at: Attachment) -> Family:
    """The family of an address of a guest's own: "auto" is IPv4, where there is any."""
    if request.address is not None:
        return 4 if request.address.version == 4 else 6
    return 4 if at.outside.address is not None or at.outside.address6 is None else 6


# -- in words ------------------------------------------------------------------


def ports(first: int, last: int) -> str:
    """A range of ports: one alone, or "8000-8010"."""
    return str(first) if first == last else f"{first}-{last}"


def listening(address: Address) -> str:
    """Where a forward listens: its address, or "*" for all of the host's."""
    if is_placeholder(address):
        return "(no lease)"
    return str(address) if int(address) else "*"


def said(claim: Forward | StaticNat) -> str:
    """A forward or an address of a guest's own, in words."""
    if isinstance(claim, StaticNat):
        allowed = ", ".join(f"{each.proto} {ports(each.first, each.last)}" for each in claim.ports)
        return f"address {claim.address} -> {claim.target}" + (f" ({allowed})" if allowed else "")
    sources = f" from {', '.join(map(str, claim.sources))}" if claim.sources else ""
    listen = at_port(claim.address, ports(claim.first, claim.last))
    target = at_port(claim.target, ports(claim.to, claim.to_last))
    return f"{claim.proto} {listen} -> {target}{sources}"


def at_port(address: Address, port: str) -> str:
    """An address with ports, as in a URL: "192.0.2.1:80", "[2001:db8::1]:80", "*:80"."""
    return f"{bracketed(listening(address))}:{port}"
