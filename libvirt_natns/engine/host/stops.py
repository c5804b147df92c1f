# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks that firewall rules of others stop, and the chains that do so."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from libvirt_natns.addresses import FAMILIES, Family
from libvirt_natns.engine.host.needs import Needs, together
from libvirt_natns.engine.host.policy import policy_of
from libvirt_natns.firewall import stopping_chains
from libvirt_natns.firewall.host_accepts import accepts
from libvirt_natns.firewall.host_policy import HostPolicy
from libvirt_natns.firewall.sample_packets import OUTSIDE, WaysOut, member
from libvirt_natns.firewall.stopping_chains import StoppingChain
from libvirt_natns.kernel.route_lookup import link_towards
from libvirt_natns.kernel.session import Kernel


@dataclass(frozen=True, slots=True)
class StoppedNetwork:
    """A network that a chain stops, in words.  Unless ``sure``, a rule cannot be judged."""

    said: str
    sure: bool


@dataclass(frozen=True, slots=True)
class HostStops:
    """Chains of others that stop packets of networks.

    ``lines`` name each chain, and the lines that let the packets pass.  ``by_network`` has the
    networks that are stopped, by uuid.
    """

    lines: tuple[str, ...] = ()
    by_network: Mapping[str, StoppedNetwork] = field(default_factory=dict)


def look(kernel: Kernel, needs: Mapping[str, Needs]) -> HostStops:
    """Look for chains that stop networks, by the networks' needs.  Raises FirewallError."""
    whole = policy_of(kernel, together(needs.values()), {})
    must_pass = accepts(whole)
    if not must_pass:
        return HostStops()
    present = stopping_chains.find(must_pass, whole.forwards, _ways_out(whole))
    if not present:
        return HostStops()
    by_network = {
        uuid: stopped
        for uuid, own in needs.items()
        if (stopped := _stopped(present, policy_of(kernel, own, {})))
    }
    return HostStops(tuple(map(str, present)), by_network)


def _stopped(present: Iterable[StoppingChain], policy: HostPolicy) -> StoppedNetwork | None:
    """Return what stops the network of a policy; None if nothing does."""
    needs = {*accepts(policy), *policy.forwards}
    for chain in sorted(present, key=lambda each: not each.sure):
        if chain.needs & needs:
            verb = "stopped" if chain.sure else "may be stopped"
            return StoppedNetwork(f"{verb} by {chain.place} ({chain.how})", chain.sure)
    return None


def _ways_out(policy: HostPolicy) -> WaysOut:
    """Return the link by which the kernel leads guests' packets out, by family."""
    return {family: _way_out(policy, family) for family in FAMILIES}


def _way_out(policy: HostPolicy, family: Family) -> str | None:
    for transit in policy.transits:
        if transit.subnet.version == family:
            # Rules of routing may lead forwarded packets elsewhere.
            way = link_towards(OUTSIDE[family], member((transit.subnet,), family), transit.bridge)
            if way is not None:
                return way
    return link_towards(OUTSIDE[family])
