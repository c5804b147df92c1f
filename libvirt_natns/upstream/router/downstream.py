# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a router has towards its networks: the transit bridge, and the ways to their prefixes.

In IPv6 a network's namespace has a private address (RFC 4193) on the transit bridge.  What
bears it leaves by an address of the router's (NAT66); a prefix that the outside knows is
routed by it, untranslated.
"""

from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from libvirt_natns import names
from libvirt_natns.firewall.host_policy import HostForward
from libvirt_natns.kernel import netns
from libvirt_natns.records import dataclass
from libvirt_natns.upstream.router import nic, nic_objects
from libvirt_natns.upstream.router.journal import Target
from libvirt_natns.upstream.router.link_config import Side
from libvirt_natns.upstream.router.nic import Capture

OFF6 = (("ipv6/conf/disable_ipv6", "1"),)
ON6 = (
    # Nobody else is on the bridge, and no packet passes it before its own address is usable.
    ("ipv6/conf/accept_dad", "0"),
    ("ipv6/conf/accept_ra", "0"),
    ("ipv6/conf/accept_redirects", "0"),
    ("ipv6/conf/disable_ipv6", "0"),
)


@dataclass(frozen=True, slots=True)
class Needs:
    """What the networks that run on a router need of it.

    ``forwards`` are what they publish on its addresses, ``prefixes`` what is routed to them
    untranslated, each with the address of the namespace that it is behind.
    """

    forwards: tuple[HostForward, ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()


def prefixes(
    target: Target, subnets: tuple[IPv6Network, ...], leased: IPv6Network | None, gateway: str
) -> tuple[tuple[str, str], ...]:
    """What of a network's ``subnets``, and the prefix that it leases, is known outside."""
    parts = [leased] if leased else []
    whole = IPv6Network(target.subnet6) if target.subnet6 else None
    for subnet in subnets if whole else ():
        assert whole is not None
        if subnet.subnet_of(whole):
            # Ahead of the NIC's own route is only something longer.
            parts += subnet.subnets() if subnet == whole else [subnet]
    return tuple((str(part), gateway) for part in parts)


def transit(target: Target, needs: Needs) -> Side:
    """The transit bridge, with the routes to networks."""
    subnet = IPv4Network(target.transit)
    addresses = [f"{target.transit_gateway}/{subnet.prefixlen}"]
    if target.transit6:
        subnet6 = IPv6Network(target.transit6)
        addresses.append(f"{subnet6[1]}/{subnet6.prefixlen}")
    return Side(
        target.namespace,
        names.ROUTER_TRANSIT,
        tuple(addresses),
        needs.prefixes if target.transit6 else (),
        ON6 if target.transit6 else OFF6,
        alone=bool(target.transit6),
    )


def gateways(target: Target, before: Capture) -> Side | None:
    """Ways to the provider's own routers, where a network may have the subnet they are in."""
    inside = ip_network(target.subnet6) if target.transit6 and target.subnet6 else ()
    found = {
        each.gateway
        for each in before.routes
        if each.family == nic_objects.AF_INET6
        and each.gateway
        and ip_address(each.gateway) in inside
    }
    routes = tuple((f"{each}/128", None) for each in sorted(found))
    return Side(target.namespace, target.nic, (), routes, ()) if routes else None


def attached(target: Target) -> list[str]:
    """The links of networks on the transit bridge.  Raises KernelError."""
    if not netns.exists(target.namespace):
        return []
    with nic.session(target.namespace) as opened:
        bridge = nic.find(opened, names.ROUTER_TRANSIT)
        listed = nic.links(opened) if bridge else ()
        return [e.name for e in listed if bridge and e.number(nic.IFLA_MASTER) == bridge.index]
