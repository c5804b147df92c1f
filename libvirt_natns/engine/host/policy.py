# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's firewall policy, from the networks' needs and the host's links."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from libvirt_natns.addresses import FAMILIES
from libvirt_natns.engine.host import ipv6_forwarding as host_ipv6
from libvirt_natns.engine.host.libvirt_status import active_networks
from libvirt_natns.engine.host.needs import Needs
from libvirt_natns.engine.host.record import HostRecord, words
from libvirt_natns.firewall import host_parts, host_policy, nftables
from libvirt_natns.firewall.host_parts import HostPart
from libvirt_natns.kernel import outward_links
from libvirt_natns.kernel.session import Kernel

BRIDGE_NF = "net/bridge/bridge-nf-call-iptables"
BRIDGE_NF6 = "net/bridge/bridge-nf-call-ip6tables"
GLOBAL_FORWARDING = "net/ipv4/conf/all/forwarding"


def policy_of(kernel: Kernel, needs: Needs, taken: Mapping[str, int]) -> host_policy.HostPolicy:
    """Return the policy as the needs alone decide it; ``taken`` are bridges' conntrack zones."""
    bridge_nf = kernel.host.sysctls.get(BRIDGE_NF) == "1"
    bridge_nf6 = kernel.host.sysctls.get(BRIDGE_NF6) == "1"
    six = [each for each in needs.private if any(net.version == 6 for net in each.subnets)]
    # Without bridge-nf, bridged frames never meet the host's rules.
    private = needs.private if bridge_nf else tuple(six) if bridge_nf6 else ()
    private = tuple(replace(each, zone=taken.get(each.bridge, 0)) for each in private)
    return host_policy.HostPolicy(
        transits=tuple(
            host_policy.Transit(segment.bridge, side.subnet)
            for segment in needs.transits
            for side in map(segment.side, FAMILIES)
            if side.subnet
        ),
        private=private,
        provider=tuple(
            each
            for each in needs.provider
            if each.routed or (bridge_nf6 if each.address.version == 6 else bridge_nf)
        ),
        bridge_nf=bridge_nf and bool(needs.private),
        forwards=needs.forwards,
        bridge_nf6=bridge_nf6 and bool(six),
        public=needs.public,
        followed=needs.followed,
        dhcp=needs.dhcp if bridge_nf else (),
    )


def facts(kernel: Kernel, needs: Needs, record: HostRecord) -> dict[str, object]:
    """Return the facts beside the networks that the rules depend on, at the least cost."""
    if not (record.bridges or record.settings):
        return {}
    # Each private bridge has a zone.  A look at each bridge would take too long.
    inner = {*record.bridges, *record.zones, *(each.bridge for each in needs.private)}
    alone = kernel.host.sysctls.get(GLOBAL_FORWARDING) == "0"
    return {
        "bridges": list(outward_links.bridges(kernel.host.routes.leading(), inner)),
        "closed": record.forwarding if alone else [],
        "sources": [asdict(each) for _, each in kernel.host.policy_rules.by_mark()],
        "closed6": record.settings.get(host_ipv6.FORWARDING) == "0",
    }


def complete_policy(
    kernel: Kernel, backend: Callable[[], str], needs: Needs, record: HostRecord
) -> host_policy.HostPolicy:
    """Return the whole policy: the needs, and the links that lead out of the host.

    ``backend`` names the firewall's backend, and may raise FirewallError.
    """
    policy = policy_of(kernel, needs, record.zones)
    seen = facts(kernel, needs, record)
    if not seen:
        return policy
    active = list(active_networks())
    inner = {*record.bridges, *(each.bridge for each in needs.private)}
    # A bridge that libvirt itself made has a MAC address in its network's XML.
    inner |= {each.bridge for each in active if each.mac}
    by_name = backend() != nftables.name
    routed = kernel.host.routes.leading()
    ways = host_policy.Ways(
        outward=outward_links.bridges(routed, inner),
        links=outward_links.links(routed, inner) if by_name else (),
        closed=tuple(record.forwarding) if seen["closed"] else (),
        marks=tuple((each.network, mark) for mark, each in kernel.host.policy_rules.by_mark()),
        closed6=bool(seen["closed6"]) and not any(each.forwards6 for each in active),
    )
    return replace(policy, ways=ways)


def part_of(kernel: Kernel, needs: Needs, record: HostRecord) -> HostPart:
    """Return one network's part of the host, as the database keeps it."""
    part = host_parts.make(policy_of(kernel, needs, record.zones))
    routes = [words(route) for route in needs.routes]
    return replace(part, routes=routes, routes6=needs.routes6)
