# SPDX-License-Identifier: LGPL-2.1-or-later
"""From metadata to forwards and static NAT, with all addresses and ports: pure.

Reservations, free ports and upstream addresses come through ``Choices``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from libvirt_natns.addresses import FAMILIES, Family
from libvirt_natns.engine.publication.attachment import Attachment
from libvirt_natns.engine.publication.choices import AutoPortRequest, Choices, selector
from libvirt_natns.engine.publication.listen_target import ListenTarget, target_of, way_to
from libvirt_natns.engine.publication.port_spans import PortSpan, spans
from libvirt_natns.engine.publication.static_nat import check_requests, select_nic, static_nat
from libvirt_natns.errors import ConflictError, DocumentError
from libvirt_natns.model.metadata import NatMetadata, PortForward
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.model.publication import Forward, PortProtocol, StaticNat
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import Outside
from libvirt_natns.spans import span_text
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.state.claims import Claims
from libvirt_natns.values import quoted


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner of a forward, with its name in messages: "guest web"."""

    uuid: str
    name: str
    forwards: tuple[PortForward, ...]

    def fixed(self, proto: PortProtocol) -> tuple[tuple[int, int], ...]:
        """Return the ports that the owner wants by number."""
        mine = (each for each in self.forwards if each.proto == proto)
        return tuple((first, last) for each in mine for first, last, _, _ in spans(each))


def resolve(domain: Domain, attachments: list[Attachment], choices: Choices) -> Claims:
    """Return all claims of a guest.

    ``attachments`` are its NICs in networks of ours, in the domain's order.  Without any,
    the metadata does not count.  Raises DocumentError for metadata that can never hold.
    """
    if domain.nat is None or not attachments:
        return Claims(domain.uuid)
    check_requests(domain, attachments)
    statics = tuple(
        static_nat(domain, request, attachments, choices) for request in domain.nat.addresses
    )
    forwards = tuple(
        forward
        for wanted in domain.nat.forwards
        for forward in _forwards(domain, domain.nat, wanted, attachments, statics, choices)
    )
    return Claims(domain.uuid, forwards, statics)


def of_network(network: Network, segment: Segment, outside: Outside, choices: Choices) -> Claims:
    """Return all claims of a network's own metadata."""
    at = Attachment(Nic(""), network, segment, outside)
    port_forwards = network.nat.forwards if network.nat else ()
    owner = Owner(network.uuid, f"network {network.name}", port_forwards)
    forwards: list[Forward] = []
    for wanted in port_forwards:
        # A document without a guestAddress is refused.
        if wanted.guest_address is not None:
            way = way_to(owner.name, wanted, at, wanted.guest_address, set())
            forwards += _made(owner, wanted, at, [way], choices)
    return Claims(network.uuid, tuple(forwards))


def _forwards(
    domain: Domain,
    nat: NatMetadata,
    wanted: PortForward,
    attachments: list[Attachment],
    statics: tuple[StaticNat, ...],
    choices: Choices,
) -> Iterator[Forward]:
    at = select_nic(domain, "portForward", wanted.network, wanted.mac, attachments)
    own = {static.address for static in statics if static.network == at.network.uuid}
    who = f"guest {domain.name}"
    ways = [
        way_to(who, wanted, at, target_of(domain, wanted, at, choices, family), own)
        for family in _families(domain, wanted, at, choices)
    ]
    owner = Owner(domain.uuid, who, nat.forwards)
    return _made(owner, wanted, at, ways, choices)


def _families(
    domain: Domain, wanted: PortForward, at: Attachment, choices: Choices
) -> list[Family]:
    """Return the families in which a forward is published.

    A named family counts; else all families in which the network is reached and the
    guest's address can be known.  Raises ConflictError where there is none.
    """
    asked = (wanted.family,) if wanted.family else FAMILIES
    reached = [family for family in asked if at.reached_by(family)]
    if not reached:
        raise ConflictError(
            f"guest {quoted(domain.name)}: network {quoted(at.network.name)} has no"
            f" {' or '.join(f'IPv{family}' for family in asked)} on upstream {at.segment.name}",
            "publish nothing there, or give the upstream addresses of that family",
        )
    resolvable = [family for family in reached if choices.knows(domain, at, family)]
    return reached if wanted.guest_address else resolvable or reached[:1]


def _made(
    owner: Owner, wanted: PortForward, at: Attachment, ways: list[ListenTarget], choices: Choices
) -> Iterator[Forward]:
    chosen: list[PortSpan] = []
    for span in wanted.ranges:
        if span.auto:
            which = str(selector(wanted))
            key = PortKey(owner.uuid, at.network.uuid, wanted.proto, which, span.to)
            listens = tuple(way.listen or way.target for way in ways)
            fixed, targets = owner.fixed(wanted.proto), tuple(way.target for way in ways)
            port = choices.port(AutoPortRequest(key, owner.name, at, listens, fixed, targets))
            chosen.append((port, port, span.to, span.to))
    for way in ways:
        for each in [*spans(wanted), *chosen]:
            yield _forward(owner, wanted, at, way, each)


def _forward(
    owner: Owner, wanted: PortForward, at: Attachment, way: ListenTarget, span: PortSpan
) -> Forward:
    address = way.address(span)
    first, last, to, to_last = span
    if address is None:
        raise DocumentError(
            f"{owner.name}: {wanted.proto} port {span_text(first, last)} of {way.target}"
            f" cannot lead to {span_text(to, to_last)}, as the network has no address of its own"
            " to listen on",
            f"leave the port as it is, or give upstream {at.segment.name} a pool6",
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
