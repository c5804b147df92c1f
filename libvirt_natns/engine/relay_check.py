# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether networks get answers from the host's DNS relay; networks without ask by themselves."""

from contextlib import suppress
from dataclasses import replace
from functools import partial

from libvirt_natns.daemons import dns_relay
from libvirt_natns.daemons.dns_relay import Relay
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.facts.outside import families_of
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.engine.plan.transit_bridge import relay_of
from libvirt_natns.errors import DnsmasqError
from libvirt_natns.model.transit_segment import HostSegment
from libvirt_natns.upstream import segments


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
    """Forget complaints of relays that answer by now; with ``starts``, also of ended relays."""
    for relay, namespace in _complaining(context).values():
        dns_relay.recheck(relay, namespace, starts=starts)


def _complaining(context: Context) -> dict[str, tuple[Relay, str]]:
    """Return each relay with a complaint, and a namespace that may ask it, by bridge."""
    complaining = {bridge for bridge in dns_relay.present() if dns_relay.complaint(bridge)}
    found: dict[str, tuple[Relay, str]] = {}
    for record in context.store.networks.all("up") if complaining else ():
        upstream = context.config.upstreams.get(record.upstream)
        segment = segments.of_upstream(context.store, upstream) if upstream else None
        if isinstance(segment, HostSegment) and segment.bridge in complaining and record.this_boot:
            leased = context.store.leases.of(record.upstream, record.uuid)
            relay = relay_in(segment, tuple(address.version for address in leased.addresses))
            if relay is not None:
                found.setdefault(segment.bridge, (relay, record.namespace))
    return found
