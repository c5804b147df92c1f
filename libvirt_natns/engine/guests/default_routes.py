# SPDX-License-Identifier: LGPL-2.1-or-later
"""Default routes of guests with several NICs: the networks in which they may change.

``facts/routed_nics`` decides which NICs get a default route.
"""

from collections.abc import Collection, Iterable

from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.facts.routed_nics import matters
from libvirt_natns.engine.guests.effects import apply_to
from libvirt_natns.engine.guests.guest_context import GuestContext
from libvirt_natns.engine.guests.nics import in_ours, may_name
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.network import Network
from libvirt_natns.state.networks import NetworkRecord


def apply_routes(
    guests: GuestContext, documents: Iterable[bytes], but: Collection[str]
) -> list[str]:
    """Bring a guest's networks to its default routes, and return what was changed.

    ``documents`` are the guest's XML, now and before; ``but`` are networks that have been
    brought to them.  An error of one network stops no other work: it is told, and the network
    is repaired later.
    """
    changed = []
    for uuid in sorted(_networks_with_choice(guests, documents) - set(but)):
        try:
            changed += apply_to(guests, {uuid})
        except (NatnsError, OSError) as error:
            guests.engine.observer.failed("choosing a guest's way out", error)
    return changed


def reroute(guests: GuestContext, network: Network | NetworkRecord) -> list[str]:
    """Give the guests of a network another way out after the network's start, end or change.

    Only other networks of these guests are changed, and the changes returned.
    """
    documents = [
        record.document
        for record in guests.store.guests.running()
        if matters(record.document) and may_name(record.document, network)
    ]
    return apply_routes(guests, documents, {network.uuid})


def _networks_with_choice(guests: GuestContext, documents: Iterable[bytes]) -> set[str]:
    """Return the networks of ours, by uuid, of guests that choose among their NICs."""
    return {
        record.uuid
        for document in documents
        if matters(document)
        for _, record in in_ours(guests.store, libvirt_xml.parse_domain_nics(document))
    }
