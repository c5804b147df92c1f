# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leasing upstream addresses: sticky, unique, and asked for before they are used.

A network keeps its address for good.  Only when a pool has nothing else left
is the address of a network that does not run given away, the longest unused
first: else a host that starts a new transient network for each job would run
out after a day.

Which of several networks gets an address is decided in the database, after the
probe: one that comes too late tries the next.
"""

from collections.abc import Callable, Collection, Iterator
from ipaddress import IPv4Address
from itertools import chain, islice, repeat

from libvirt_natns.addresses import Address
from libvirt_natns.errors import LeaseError
from libvirt_natns.model import Upstream
from libvirt_natns.selection import Applicant, check_wanted, reserved_addresses
from libvirt_natns.store import Store

FIRST_BATCHES = (1, 16)
BATCH = 128
"""How many addresses are probed for at once: a few first, since most often the
first one is free, and then as many as answer without overflowing the socket."""

Probe = Callable[[Collection[Address]], set[Address]]
"""Tells which of some addresses answer on the upstream's segment."""


def reserve(
    store: Store,
    applicant: Applicant,
    upstream: Upstream,
    probe: Probe,
    excluded: Collection[Address] = (),
) -> Address:
    """The address of a network or guest: wanted, kept from last time, or new from the pool.

    ``excluded`` are further addresses in use, the host's own among them.
    Raises LeaseError where the wanted one cannot be had or the pool is used up.
    """
    if applicant.wanted is not None:
        return _reserve_wanted(store, applicant, upstream, probe, excluded, applicant.wanted)
    kept = store.lease(upstream.name, applicant.key)
    again = kept is not None and _usable(upstream, kept, excluded) and not probe([kept])
    if kept is not None and again and _take(store, applicant, upstream, kept):
        return kept
    return _reserve_new(store, applicant, upstream, probe, excluded)


def _segment(upstream: Upstream) -> str:
    return upstream.bridge or upstream.name


def _take(store: Store, applicant: Applicant, upstream: Upstream, address: Address) -> bool:
    """Lease an address, unless another network was faster."""
    return store.reserve(upstream.name, _segment(upstream), applicant.key, address)


def _reserve_wanted(
    store: Store,
    applicant: Applicant,
    upstream: Upstream,
    probe: Probe,
    excluded: Collection[Address],
    wanted: Address,
) -> Address:
    check_wanted(applicant, upstream, wanted)
    asked = f"{applicant.who}: the wanted address {wanted} of upstream {upstream.name}"
    if wanted in excluded:
        raise LeaseError(f"{asked} is the host's own", "choose another")
    holder = store.holder(_segment(upstream), wanted)
    if holder is not None and holder.uuid != applicant.key:
        raise LeaseError(
            f"{asked} is leased to network {holder.name}",
            "choose another, or stop that network",
        )
    guest = store.guest_holder(upstream.name, _segment(upstream), applicant.key, wanted)
    if guest is not None:
        # Its network answers for it, so that a probe would find but another machine.
        raise LeaseError(f"{asked} belongs to {guest}", "choose another, or stop that guest")
    if probe([wanted]):
        raise LeaseError(f"{asked} is in use by another machine", "choose another, or free it")
    if not _take(store, applicant, upstream, wanted):
        raise LeaseError(f"{asked} was leased to another meanwhile", "choose another")
    return wanted


def _usable(upstream: Upstream, address: Address, excluded: Collection[Address]) -> bool:
    return (
        any(address in span for span in upstream.ranges)
        and address not in reserved_addresses(upstream)
        and address not in excluded
    )


def _reserve_new(
    store: Store,
    applicant: Applicant,
    upstream: Upstream,
    probe: Probe,
    excluded: Collection[Address],
) -> Address:
    occupied: set[Address] = set()
    for count in chain(FIRST_BATCHES, repeat(BATCH)):
        batch = list(islice(_candidates(store, upstream, {*excluded, *occupied}), count))
        if not batch:
            break
        answered = probe(batch)
        occupied |= answered
        for address in batch:
            if address not in answered and _take(store, applicant, upstream, address):
                return address
    raise _exhausted(applicant, upstream, occupied)


def next_address(
    store: Store, applicant: Applicant, upstream: Upstream, excluded: Collection[Address]
) -> Address:
    """The address that ``reserve`` would try first; leases nothing.

    Raises LeaseError.
    """
    if applicant.wanted is not None:
        check_wanted(applicant, upstream, applicant.wanted)
        return applicant.wanted
    for address in _candidates(store, upstream, excluded):
        return address
    raise _exhausted(applicant, upstream, ())


def _candidates(
    store: Store, upstream: Upstream, excluded: Collection[Address]
) -> Iterator[Address]:
    """Addresses never leased, in the pool's order; then those of networks at rest.

    Lazy: a pool may have millions.
    """
    leased = store.leased(_segment(upstream))
    unusable = {*excluded, *reserved_addresses(upstream)}
    for span in upstream.ranges:
        for number in range(int(span.first), int(span.last) + 1):
            if number not in leased and (address := IPv4Address(number)) not in unusable:
                yield address
    for kept in store.reclaimable(_segment(upstream)):
        if _usable(upstream, kept, excluded):
            yield kept


def _exhausted(
    applicant: Applicant, upstream: Upstream, occupied: Collection[Address]
) -> LeaseError:
    others = f", {len(occupied)} of them by other machines" if occupied else ""
    return LeaseError(
        f"{applicant.who}: no address of upstream {upstream.name} is free, all are in use{others}",
        f"enlarge its pool ({', '.join(map(str, upstream.ranges))}) or stop a network",
    )
