# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reasons to refuse a network's start, as far as they can be seen before the start."""

import os

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq_process, dnsmasq_trial, ndppd, udhcpc
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.facts.mtu import ETHERNET_MTU
from libvirt_natns.engine.facts.proxies import check_proxied
from libvirt_natns.engine.facts.services import resolvers_of
from libvirt_natns.engine.plan.network_plan import make
from libvirt_natns.engine.plan.surroundings import Surroundings
from libvirt_natns.engine.plan.upstream_side import has_ipv6
from libvirt_natns.errors import StoreError, UpstreamError
from libvirt_natns.firewall import helper_trial
from libvirt_natns.kernel import queues
from libvirt_natns.model.configuration import FirewallChoice
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import DhcpSegment, Segment
from libvirt_natns.model.upstream import Outside
from libvirt_natns.upstream import attach_checks, selection
from libvirt_natns.values import quoted

ROOM = 64 << 10
"""Octets that a network's run-time files may take: most are those of its dnsmasq."""


def check(context: Context, network: Network, segment: Segment) -> None:
    """Refuse a network that could not come up.  Raises a NatnsError."""
    backend = context.planner.backend(ipv6=has_ipv6(network))
    if network.needs_dnsmasq:
        dnsmasq_trial.check(network)
    _check_helpers(network, segment, backend)
    _check_plan(network, segment, backend)
    check_proxied(context.config, context.store, network, segment)
    if selection.proxied(network, segment):
        ndppd.program()
    if segment.known:
        families = selection.families(network, segment)
        selection.check_resolvers(network, segment, resolvers_of(segment, families).servers)
    if isinstance(segment, DhcpSegment):
        udhcpc.program()
    if network.bandwidth:
        queues.check()
    check_upstream(context, network, segment)


def check_document(network: Network, segment: Segment, firewall: FirewallChoice) -> None:
    """Refuse a network that could come up on no machine with this configuration.

    Only the documents count.  dnsmasq is asked where it is installed.  Raises a NatnsError.
    """
    _check_plan(network, segment, "nftables" if firewall == "auto" else firewall)
    if segment.dns:
        selection.check_resolvers(network, segment, segment.dns)
    if network.writes_dnsmasq and dnsmasq_process.is_installed():
        dnsmasq_trial.check_text(network)


def _check_plan(network: Network, segment: Segment, backend: str) -> None:
    """Refuse addresses that can never work, and a plan that no rule can express."""
    selection.check_addresses(network, segment)
    # A plan that no rule can express is refused here, not when the rules are loaded.
    make(network, segment, Outside(), Surroundings(ETHERNET_MTU, ETHERNET_MTU, backend, None))


def _check_helpers(network: Network, segment: Segment, backend: str) -> None:
    own = network.nat is not None and network.nat.helpers is not None
    place = "its metadata" if own else f"[upstreams.{segment.name}] of {names.CONFIG_FILE}"
    helper_trial.check(
        selection.helpers(network, segment.upstream),
        backend,
        f"network {quoted(network.name)}",
        f"remove the name from helpers in {place}",
    )


def check_upstream(context: Context, network: Network, segment: Segment) -> None:
    """Refuse an upstream's bridge or NIC that could not take another network."""
    problem = attach_checks.problem(context.kernel, segment)
    if problem:
        raise UpstreamError(
            f"network {quoted(network.name)}: {segment.in_words} of upstream {segment.name}"
            f" {problem[0]}",
            problem[1],
        )


def check_room(network: Network) -> None:
    """Refuse a start without room for its run-time files: `started` is too late for that.

    Raises StoreError.
    """
    probe = names.network_directory(network.uuid) / "room"
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, ROOM)
    except OSError as error:
        raise StoreError(
            f"network {quoted(network.name)}: {probe.parent} has no room for {ROOM >> 10} KiB"
            f" ({error.strerror})",
            f"free some space (df {names.RUN_DIRECTORY}; df -i {names.RUN_DIRECTORY})",
        ) from error
    finally:
        probe.unlink(missing_ok=True)
