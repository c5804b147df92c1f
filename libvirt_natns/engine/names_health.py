# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether guests' names can be resolved: which servers a network's dnsmasq asks, and what they do.

A reason is no difference from the plan: no repair of ours gives the host a resolver.  A
resolver outside of the host that does not answer is not reported: guests have then
the names that the host has.
"""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

from libvirt_natns.addresses import Address, Family
from libvirt_natns.daemons import dns_probe, dns_relay, dnsmasq_config, dnsmasq_files, resolv_conf
from libvirt_natns.daemons.resolv_conf import DNS_PORT
from libvirt_natns.daemons.text_files import text_if_any
from libvirt_natns.engine import relay_check
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.facts.services import resolvers_of
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.transit_segment import RELAY_PORT, HostSegment
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.values import quoted

LIMIT = 0.3
"""Seconds in which a resolver of the host's own shows that it listens."""

NO_NAMES = "guests have no names"


def findings(context: Context) -> Mapping[str, str]:
    """Return why guests have no names, by the uuid of each network that is up."""
    reason_of_host = cache(_host)
    unheard = relay_check.unheard(context)
    found = {}
    segment_of = cache(partial(relay_check.segment_of, context))
    for record in context.store.networks.all("up"):
        segment = segment_of(record.upstream)
        if segment is None or not record.this_boot:
            continue
        configuration = text_if_any(dnsmasq_files.paths(record.uuid).configuration)
        if not configuration:
            continue
        if f"#{RELAY_PORT}\n" in configuration and isinstance(segment, HostSegment):
            reason = unheard.get(segment.bridge) or reason_of_host()
        else:
            reason = _without_relay(context, record, segment, configuration)
        if reason:
            found[record.uuid] = f"{NO_NAMES}: {reason}"
    return found


def notes() -> list[str]:
    """Return a line for each DNS relay that does not serve."""
    return [
        f"the DNS relay on {bridge} does not serve, so networks ask the host's resolvers"
        f" themselves: {why}"
        for bridge in dns_relay.present()
        if (why := dns_relay.complaint(bridge))
    ]


def _host() -> str:
    """Return why the host itself has no resolver; "" if it may have one."""
    file = dns_relay.RESOLV_CONF
    servers = resolv_conf.nameservers(text_if_any(file))
    if not servers:
        return f"{file} names no server"
    if all(server.is_loopback and _is_closed(server) for server in servers):
        return f"no program of the host serves DNS at {servers[0]}, which {file} names"
    return ""


def _is_closed(server: Address) -> bool:
    return dns_probe.ask(server, DNS_PORT, "", LIMIT) == "refuses"


def _without_relay(
    context: Context, record: NetworkRecord, segment: Segment, configuration: str
) -> str:
    """Return why a network that asks no relay has no server to ask; "" if it has."""
    if dnsmasq_config.default_servers(configuration):
        return ""
    leased = context.store.leases.of(record.upstream, record.uuid)
    families: tuple[Family, ...] = tuple(address.version for address in leased.addresses)
    families += (6,) if leased.prefix else ()
    # A network that waits for its lease is to have IPv4.
    families = families or (4,)
    file = dnsmasq_config.resolv_file(configuration)
    resolvers = resolvers_of(segment, families)
    if file is not None:
        named = resolv_conf.nameservers(text_if_any(Path(file)))
        usable = any(resolv_conf.is_outside(server) for server in named)
    else:
        # The network's XML may say that no server is asked.
        usable = bool(resolvers.servers)
    if usable or not any(segment.side(family).gateway for family in families):
        # A lab without a gateway has the stations on its link, and no names by intent.
        return ""
    if isinstance(segment, HostSegment) and (why := dns_relay.complaint(segment.bridge)):
        return f"the DNS relay does not serve: {why}"
    return (
        f"{dns_relay.RESOLV_CONF} names no server that network {quoted(record.name)} can ask:"
        f" set 'dns' in [upstreams.{segment.name}]"
    )
