# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leases from an upstream's pool: sticky, unique, and probed for before they are given.

A network keeps its address for good.  When a pool has no free address left, networks
that do not run lose theirs, the longest unused first.  Otherwise a host that starts a
new transient network for each job would run out after a day.

The database decides between several applicants, after the probe; the loser tries the
next address.  Prefixes are not probed for: no other machine leases them.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from ipaddress import IPv6Network
from itertools import chain, islice, repeat

from libvirt_natns.addresses import Address, AddressRange
from libvirt_natns.errors import LeaseError
from libvirt_natns.model.segment import Segment
from libvirt_natns.state.applicants import Applicant, check_wanted, reserved_addresses
from libvirt_natns.state.leases import Leasable, kept
from libvirt_natns.state.store import Store
from libvirt_natns.values import quoted

FIRST_BATCHES = (1, 16)
BATCH = 128
"""How many addresses are probed for at once: a few first, since most often the
first is free, and then as many as answer without overflowing the socket."""

MOST_ANSWERED = 10
"""Batches in a row, with each address answered for, after which a search ends.

A station that answers for every address would keep a search going through all of a pool."""

SEARCH_LIMIT = 10.0
"""Seconds after which a search probes no more: a hook, and libvirt behind it, waits."""

PREFIX_LENGTH = 64
"""Length of a network's own prefix: guests make addresses of their own in no other (SLAAC)."""

Probe = Callable[[Collection[Address]], set[Address]]
"""Returns the addresses that answer on the upstream's segment."""


def reserve(
    store: Store,
    applicant: Applicant,
    segment: Segment,
    probe: Probe,
    excluded: Collection[Address] = (),
) -> Address:
    """Lease an address to a network or guest: wanted, kept from last time, or new.

    ``excluded`` are further addresses in use, the host's own among them.
    Raises LeaseError where the wanted address cannot be had or the pool is used up.
    """
    if applicant.wanted is not None:
        return _reserve_wanted(store, applicant, segment, probe, excluded, applicant.wanted)
    last = leased(store, applicant, segment)
    again = last is not None and _usable(applicant, segment, last, excluded)
    if last is not None and again and not probe([last]) and _take(store, applicant, segment, last):
        return last
    return _reserve_new(store, applicant, segment, probe, excluded)


def leased(store: Store, applicant: Applicant, segment: Segment) -> Address | None:
    """Return the address of its family that an applicant leases already."""
    return store.leases.of(segment.name, applicant.key).of(applicant.family)


def _take(store: Store, applicant: Applicant, segment: Segment, address: Leasable) -> bool:
    """Lease an address; False where another network was faster."""
    return store.leases.reserve(segment.name, segment.bridge, applicant.key, address)


def _reserve_wanted(
    store: Store,
    applicant: Applicant,
    segment: Segment,
    probe: Probe,
    excluded: Collection[Address],
    wanted: Address,
) -> Address:
    check_wanted(applicant, segment, wanted)
    asked = f"{applicant.who}: the wanted address {wanted} of upstream {segment.name}"
    if wanted in excluded:
        raise LeaseError(f"{asked} is an address of the host", "choose another address")
    _check_free(store, applicant, segment, wanted, asked)
    guest = store.leases.guest_holder(segment.name, segment.bridge, applicant.key, wanted)
    if guest is not None:
        # The guest's network answers for it, so a probe would blame another machine.
        raise LeaseError(
            f"{asked} belongs to {guest}", "choose another address, or stop that guest"
        )
    if probe([wanted]):
        raise LeaseError(
            f"{asked} is in use by another machine", "choose another address, or free it"
        )
    if not _take(store, applicant, segment, wanted):
        raise LeaseError(f"{asked} was just leased elsewhere", "choose another address")
    return wanted


def _check_free(
    store: Store, applicant: Applicant, segment: Segment, wanted: Leasable, asked: str
) -> None:
    """Refuse an address or prefix that another network uses now."""
    holder = store.leases.holder(segment.bridge, wanted)
    if holder is not None and holder.uuid != applicant.key:
        raise LeaseError(
            f"{asked} is leased to network {quoted(holder.name)}",
            "choose another, or stop that network",
        )


def _usable(
    applicant: Applicant, segment: Segment, address: Address, excluded: Collection[Address]
) -> bool:
    return (
        any(address in span for span in segment.side(applicant.family).ranges)
        and address not in reserved_addresses(segment, applicant.family)
        and address not in excluded
    )


def _reserve_new(
    store: Store,
    applicant: Applicant,
    segment: Segment,
    probe: Probe,
    excluded: Collection[Address],
) -> Address:
    occupied: set[Address] = set()
    deadline = time.monotonic() + SEARCH_LIMIT
    in_a_row = 0
    free = _candidates(store, applicant, segment, excluded)
    for count in chain(FIRST_BATCHES, repeat(BATCH)):
        batch = list(islice(free, count))
        if not batch:
            raise _exhausted(applicant, segment, occupied)
        answered = probe(batch)
        occupied |= answered
        for address in batch:
            if address not in answered and _take(store, applicant, segment, address):
                return address
        in_a_row = in_a_row + 1 if len(answered) == BATCH else 0
        if in_a_row == MOST_ANSWERED or time.monotonic() > deadline:
            break
    raise _all_answered(applicant, segment, len(occupied))


def next_address(
    store: Store, applicant: Applicant, segment: Segment, excluded: Collection[Address]
) -> Address:
    """Return the address that ``reserve`` would try first; leases nothing.

    Raises LeaseError.
    """
    if applicant.wanted is not None:
        check_wanted(applicant, segment, applicant.wanted)
        return applicant.wanted
    for address in _candidates(store, applicant, segment, excluded):
        return address
    raise _exhausted(applicant, segment, ())


def _candidates(
    store: Store, applicant: Applicant, segment: Segment, excluded: Collection[Address]
) -> Iterator[Address]:
    """Yield addresses never leased, in the pool's order; then leases of networks at rest.

    A pool may have millions of addresses.
    """
    taken = store.leases.in_segment(segment.bridge)
    unusable = {*excluded, *reserved_addresses(segment, applicant.family)}
    for address in listed(segment.side(applicant.family).ranges):
        if address not in unusable and kept(address) not in taken:
            yield address
    for address in store.leases.reclaimable(segment.bridge, applicant.family):
        if _usable(applicant, segment, address, excluded):
            yield address


def listed(ranges: Iterable[AddressRange]) -> Iterator[Address]:
    """Yield all addresses of some ranges, in their order."""
    for span in ranges:
        address_class = type(span.first)
        for number in range(int(span.first), int(span.last) + 1):
            yield address_class(number)


def _exhausted(applicant: Applicant, segment: Segment, occupied: Collection[Address]) -> LeaseError:
    others = f", {len(occupied)} of them by other machines" if occupied else ""
    ranges = segment.side(applicant.family).ranges
    return LeaseError(
        f"{applicant.who}: no address of upstream {segment.name} is free, all are in use{others}",
        f"enlarge its pool ({', '.join(map(str, ranges))}) or stop a network",
    )


def _all_answered(applicant: Applicant, segment: Segment, count: int) -> LeaseError:
    return LeaseError(
        f"{applicant.who}: a station on {segment.in_words} answered the probes"
        f" for all {count} addresses of upstream {segment.name}",
        f"find that station (arping, ndisc6), or move the pool in [upstreams.{segment.name}]",
    )


# -- prefixes ------------------------------------------------------------------


def reserve_prefix(
    store: Store,
    applicant: Applicant,
    segment: Segment,
    wanted: IPv6Network | None,
    excluded: Collection[Address] = (),
) -> IPv6Network:
    """Lease a prefix to a network: wanted, kept from last time, or new from ``prefixes6``.

    No prefix is leased that has an ``excluded`` address in it, which is the host's own.
    Raises LeaseError where the wanted prefix cannot be had or all are used up.
    """
    if wanted is not None:
        asked = f"{applicant.who}: the prefix {wanted} of upstream {segment.name}"
        _check_free(store, applicant, segment, wanted, asked)
        if not _take(store, applicant, segment, wanted):
            raise LeaseError(f"{asked} was just leased elsewhere", "choose another prefix")
        return wanted
    last = store.leases.of(segment.name, applicant.key).prefix
    fits = last is not None and _fits(segment, last, excluded)
    if last is not None and fits and _take(store, applicant, segment, last):
        return last
    for prefix in _prefixes(store, segment, excluded):
        if _take(store, applicant, segment, prefix):
            return prefix
    raise _no_prefix(applicant, segment)


def next_prefix(
    store: Store, applicant: Applicant, segment: Segment, excluded: Collection[Address]
) -> IPv6Network:
    """Return the prefix that ``reserve_prefix`` would try first; leases nothing.

    Raises LeaseError.
    """
    for prefix in _prefixes(store, segment, excluded):
        return prefix
    raise _no_prefix(applicant, segment)


def _fits(segment: Segment, prefix: IPv6Network, excluded: Collection[Address]) -> bool:
    inside = any(prefix.subnet_of(each) for each in segment.prefixes6)
    return inside and not any(address in prefix for address in excluded)


def _prefixes(
    store: Store, segment: Segment, excluded: Collection[Address]
) -> Iterator[IPv6Network]:
    """Yield prefixes never leased, in their order; then leases of networks at rest."""
    taken = store.leases.in_segment(segment.bridge)
    for whole in segment.prefixes6:
        for prefix in whole.subnets(new_prefix=PREFIX_LENGTH):
            if str(prefix) not in taken and _fits(segment, prefix, excluded):
                yield prefix
    for prefix in store.leases.reclaimable_prefixes(segment.bridge):
        if _fits(segment, prefix, excluded):
            yield prefix


def _no_prefix(applicant: Applicant, segment: Segment) -> LeaseError:
    return LeaseError(
        f"{applicant.who}: no prefix of upstream {segment.name} is free, all are in use",
        f"enlarge its prefixes6 ({', '.join(map(str, segment.prefixes6))}) or stop a network",
    )
