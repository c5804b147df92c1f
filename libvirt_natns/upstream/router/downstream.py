# SPDX-License-Identifier: LGPL-2.1-or-later
"""A router's side of its networks: the transit bridge, and routes to the networks' prefixes.

In IPv6 a network's namespace has a private address (RFC 4193) on the transit bridge.  Packets
from that address leave by an address of the router (NAT66).  A prefix that the outside knows
is routed to the namespace without translation.
"""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from socket import AF_INET6

from libvirt_natns import names
from libvirt_natns.addresses import inside
from libvirt_natns.firewall.host_policy import Followed, HostForward
from libvirt_natns.kernel import netns
from libvirt_natns.upstream.router import nic_link
from libvirt_natns.upstream.router.link_config import LinkConfig
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

OFF6 = (("ipv6/conf/disable_ipv6", "1"),)
ON6 = (
    # No other station is on the bridge, and no packet passes before its address is usable.
    ("ipv6/conf/accept_dad", "0"),
    ("ipv6/conf/accept_ra", "0"),
    ("ipv6/conf/accept_redirects", "0"),
    ("ipv6/conf/disable_ipv6", "0"),
)


@dataclass(frozen=True, slots=True)
class RouterNeeds:
    """The needs of the networks that run on a router.

    ``forwards`` are their published ports on the router's addresses.  ``prefixes`` are routed
    to them without translation, each with the address of its namespace.  ``followed`` are
    networks with conntrack's helpers.
    """

    forwards: tuple[HostForward, ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()
    followed: tuple[Followed, ...] = ()


def prefixes(
    target: Target, subnets: tuple[IPv6Network, ...], leased: IPv6Network | None, gateway: str
) -> tuple[tuple[str, str], ...]:
    """Return the prefixes of a network that the outside knows, with their gateway.

    They are its leased prefix, and its ``subnets`` that are parts of the NIC's own subnet.
    """
    parts = [leased] if leased else []
    if target.subnet6:
        parts += inside(subnets, IPv6Network(target.subnet6))
    return tuple((str(part), gateway) for part in parts)


def transit(target: Target, needs: RouterNeeds) -> LinkConfig:
    """Return the transit bridge, with the routes to networks."""
    subnet = IPv4Network(target.transit)
    addresses = [f"{target.transit_gateway}/{subnet.prefixlen}"]
    if target.transit6:
        subnet6 = IPv6Network(target.transit6)
        addresses.append(f"{subnet6[1]}/{subnet6.prefixlen}")
    return LinkConfig(
        target.namespace,
        names.ROUTER_TRANSIT,
        tuple(addresses),
        needs.prefixes if target.transit6 else (),
        ON6 if target.transit6 else OFF6,
        alone=bool(target.transit6),
    )


def gateways(target: Target, before: Capture) -> LinkConfig | None:
    """Return routes to provider's routers in a subnet that a network may have; None without any."""
    inside = ip_network(target.subnet6) if target.transit6 and target.subnet6 else ()
    inner_gateways = {
        route.gateway
        for route in before.routes
        if route.family == AF_INET6 and route.gateway and ip_address(route.gateway) in inside
    }
    routes = tuple((f"{gateway}/128", None) for gateway in sorted(inner_gateways))
    return LinkConfig(target.namespace, target.nic, (), routes, ()) if routes else None


def attached(target: Target) -> list[str]:
    """Return the links of networks on the transit bridge.  Raises KernelError."""
    if not netns.exists(target.namespace):
        return []
    with nic_link.session(target.namespace) as sock:
        bridge = nic_link.find(sock, names.ROUTER_TRANSIT)
        listed = nic_link.links(sock) if bridge else ()
        return [e.name for e in listed if bridge and e.master == bridge.index]
