# SPDX-License-Identifier: LGPL-2.1-or-later
"""Effects of claims: the networks' rules, and connections that end."""

from libvirt_natns.engine.guests.guest_context import GuestContext, networks_of
from libvirt_natns.engine.network_record import state_of
from libvirt_natns.engine.publication.attachment import ANY, ANY6
from libvirt_natns.kernel import conntrack
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.leases import StoredLease


def apply_to(guests: GuestContext, networks: set[str]) -> list[str]:
    """Bring these networks to today's claims, and return what was changed."""
    changed = []
    for uuid in sorted(networks):
        record = guests.engine.store.networks.get(uuid)
        # A network that starts holds its lock, and has today's claims once it is up.
        if state_of(record) == "up" and record is not None:
            changed += guests.engine.refresh_forwards(record)
    return changed


def restore(guests: GuestContext, claims: Claims, leases: list[StoredLease]) -> None:
    """Put earlier claims and leases back into force."""
    guests.engine.store.leases.restore(leases)
    guests.store.claims.put(claims, guests.scopes(claims), published=True)
    apply_to(guests, networks_of(claims))


def cut_since(guests: GuestContext, before: Claims) -> None:
    """Delete the conntrack entries of claims that their owner has no more."""
    cut(guests, before, guests.held(before.owner))


def cut(guests: GuestContext, before: Claims, after: Claims) -> None:
    """Delete the conntrack entries of claims in ``before`` that are not in ``after``."""
    gone: list[Forward | StaticNat] = [*(set(before.forwards) - set(after.forwards))]
    gone += set(before.addresses) - set(after.addresses)
    for uuid in {claim.network for claim in gone}:
        record = guests.engine.store.networks.get(uuid)
        if record is None or record.state != "up":
            continue
        leased = guests.engine.store.leases.of(record.upstream, uuid)
        here = [claim for claim in gone if claim.network == uuid]
        for family, address, any_address in (
            (4, leased.address, ANY),
            (6, leased.address6, ANY6),
        ):
            mine = [claim for claim in here if claim.target.version == family]
            if not mine:
                continue
            conntrack.cut(record.namespace, mine, address or any_address)
            if record.shares_addresses and address is not None:
                translated = [each for each in mine if each.address != each.target]
                conntrack.cut_on_host(translated, address, router=record.router)
