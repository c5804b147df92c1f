# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scopes in which claims must be unique, and forwards that the host itself cannot serve."""

from collections.abc import Callable, Collection, Iterable

from libvirt_natns.addresses import Address
from libvirt_natns.engine.publication.allocation import Allocation
from libvirt_natns.engine.publication.resolve import of_network
from libvirt_natns.errors import ConflictError, DocumentError
from libvirt_natns.firewall.foreign_translations import ForeignTranslations
from libvirt_natns.kernel import listening_ports
from libvirt_natns.model.network import Network
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import Outside
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import routers

HostAddresses = Callable[[], Collection[Address]]
"""Returns the addresses of the host."""


def scopes(store: Store, networks: Iterable[str]) -> dict[str, ClaimScope]:
    """Return the scope in which each network's claims must be unique, by uuid."""
    return scopes_of(record for uuid in networks if (record := store.networks.get(uuid)))


def scopes_of(records: Iterable[NetworkRecord]) -> dict[str, ClaimScope]:
    """Return the scope in which the claims of each recorded network must be unique, by uuid."""
    return {record.uuid: ClaimScope.of(record.upstream, record.kind) for record in records}


def check_host(claims: Claims, where: dict[str, ClaimScope], addresses: HostAddresses) -> None:
    """Refuse new forwards that the host itself cannot serve.

    The host cannot serve a port that belongs to a program of the host, or that a rule of another
    program leads elsewhere.  A forward on an address that is not among the ``addresses`` of the
    host waits for the address: the rules ask for that.  Raises DocumentError or ConflictError.
    """
    sharing = {uuid: scope.upstream for uuid, scope in where.items() if scope.shared}
    routers.check_claims(claims.forwards, {uuid: name for uuid, name in sharing.items() if name})
    shared = [
        forward
        for forward in claims.forwards
        if sharing.get(forward.network) == "" and not forward.own
    ]
    for forward in shared:
        listens = forward.address
        if listens.is_loopback and listens.version == 6:
            raise DocumentError(
                f"{forward.owner_name}: <natns:portForward address='{listens}'> cannot be"
                " published, as the kernel routes it nowhere",
                "use 127.0.0.1, or another address of the host",
            )
    listening_ports.check_free(shared)
    _check_untranslated(shared, addresses)


def _check_untranslated(forwards: Iterable[Forward], addresses: HostAddresses) -> None:
    """Refuse forwards of ports that rules of others lead elsewhere.  Raises ConflictError."""
    translations = ForeignTranslations(addresses)
    for forward in forwards:
        found = translations.taken(forward.proto, forward.address, forward.first, forward.last)
        if found is not None:
            port, place = found
            raise ConflictError(
                f"{forward.owner_name}: a rule of another program leads {forward.proto} port"
                f" {port} of the host elsewhere ({place})",
                "choose another port, or start='auto'",
            )


def waits(forward: Forward, kind: str, present: Collection[Address]) -> bool:
    """True if a forward waits for an address that the host does not have now.

    ``kind`` is that of its network's upstream, ``present`` are the addresses of the host.
    """
    listens = forward.address
    if kind != "host" or forward.own or listens.is_unspecified or listens.is_loopback:
        return False
    return listens not in present


def claim_for_network(
    choices: Allocation,
    network: Network,
    segment: Segment,
    outside: Outside,
    held: Collection[Forward] = (),
) -> None:
    """Claim the forwards of a network's own metadata; ``held`` are in force already.

    Raises DocumentError or ConflictError.
    """
    claims = of_network(network, segment, outside, choices)
    where = {network.uuid: ClaimScope.of(segment.name, segment.kind)}
    fresh = Claims(claims.owner, tuple(f for f in claims.forwards if f not in held))
    check_host(fresh, where, choices.kernel.host.addresses.beyond_link)
    choices.store.claims.put(claims, where, published=True)
