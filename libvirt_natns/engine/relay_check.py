# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether networks get answers from the host's DNS relay; networks without ask by themselves."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial

from libvirt_natns.daemons import dns_relay
from libvirt_natns.daemons.dns_relay import Relay
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.facts.outside import families_of
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.engine.plan.transit_bridge import relay_of
from libvirt_natns.errors import DnsmasqError, KernelError
from libvirt_natns.kernel import netns
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.transit_segment import HostSegment
from libvirt_natns.upstream import segments

TRIES = 3
"""Namespaces that ask a relay before it counts as not heard."""


def asked_by(run: NetworkRun) -> Relay | None:
    """Return the relay as a network asks it; None for a network that asks no relay."""
    segment = run.segment
    if not run.network.needs_dnsmasq or not isinstance(segment, HostSegment):
        return None
    return relay_in(segment, families_of(run.in_force)) if segment.has_relay else None


def relay_in(segment: HostSegment, families: tuple[int, ...]) -> Relay | None:
    """Return the relay on a transit bridge with its addresses of some families."""
    relay = relay_of(segment)
    addresses = tuple(each for each in relay.addresses if each.version in families)
    return replace(relay, addresses=addresses) if addresses else None


def confirm(context: Context, run: NetworkRun) -> bool:
    """Ask the relay from a network's namespace; true if the network must do without it now.

    A resident process asks later.  Its networks are compared with their plans after a complaint.
    """
    relay = asked_by(run)
    if relay is None or dns_relay.complaint(relay.bridge):
        return False
    with suppress(DnsmasqError):
        context.later(partial(dns_relay.confirm, relay, run.namespace))
    return bool(dns_relay.complaint(relay.bridge))


def recheck(context: Context, *, starts: bool = True) -> None:
    """Forget complaints of relays that answer by now; with ``starts``, also of ended relays.

    A relay that has ended is started anew then.
    """
    for bridge, questions in asking(context).items():
        if not dns_relay.complaint(bridge):
            continue
        if starts if dns_relay.running(bridge) is None else is_heard(questions):
            dns_relay.forgive(bridge)


def unheard(context: Context) -> dict[str, str]:
    """Return complaints about relays that run and that no network hears, by bridge.

    A damaged namespace hears no relay, so the caller looks twice before it notes a complaint.
    """
    return {
        bridge: dns_relay.unheard(questions[0].relay)
        for bridge, questions in asking(context).items()
        if dns_relay.running(bridge) is not None
        and not dns_relay.complaint(bridge)
        and not is_heard(questions)
    }


@dataclass(frozen=True, slots=True)
class Asking:
    """A namespace that may ask a relay, with the relay's addresses as that namespace has them."""

    relay: Relay
    namespace: str


def asking(context: Context) -> dict[str, list[Asking]]:
    """Return a few namespaces that may ask the relay on each bridge.

    A namespace may be damaged, so a single one does not tell that a relay is not heard.
    """
    found: defaultdict[str, list[Asking]] = defaultdict(list)
    present = dns_relay.present()
    known = cache(partial(segment_of, context))
    for record in context.store.networks.all("up") if present else ():
        segment = known(record.upstream)
        if not isinstance(segment, HostSegment) or segment.bridge not in present:
            continue
        if len(found[segment.bridge]) == TRIES or not netns.exists(record.namespace):
            continue
        leased = context.store.leases.of(record.upstream, record.uuid)
        relay = relay_in(segment, tuple(address.version for address in leased.addresses))
        if relay is not None:
            found[segment.bridge].append(Asking(relay, record.namespace))
    return {bridge: questions for bridge, questions in found.items() if questions}


def segment_of(context: Context, upstream: str) -> Segment | None:
    """Return the segment of an upstream by its name; None for an unknown upstream."""
    configured = context.config.upstreams.get(upstream)
    return segments.of_upstream(context.store, configured) if configured else None


def is_heard(questions: Iterable[Asking]) -> bool:
    """True if the relay answers any of these namespaces."""
    for each in questions:
        # The namespace may end at any time.
        with suppress(KernelError):
            if dns_relay.is_heard(each.relay, each.namespace, dns_relay.AGAIN_LIMIT):
                return True
    return False
