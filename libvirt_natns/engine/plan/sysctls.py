# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sysctls of a namespace and of its two links."""

from collections.abc import Iterable

from libvirt_natns import names
from libvirt_natns.engine.plan.upstream_side import answered_stations, has_ipv6, leaves_by_ipv6
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import Outside
from libvirt_natns.operations.namespaces import Settings

# A namespace starts with a copy of the host's settings, so each is set.  ip_forward
# comes first: writing it resets the others.  Values of "all" reach links that are there,
# and most of them hold for any link.  Values of "default" reach links to come.
SYSCTLS = (
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/icmp_echo_ignore_broadcasts", "1"),
    *(
        (f"net/ipv4/conf/{which}/{key}", value)
        for key, value in (
            ("rp_filter", "1"),
            # On the upstream's side the namespace must answer neither for the gateway's
            # address nor for any private one.
            ("arp_ignore", "1"),
            ("arp_announce", "2"),
            ("arp_filter", "0"),
            ("proxy_arp", "0"),
            ("proxy_arp_pvlan", "0"),
            # Unsolicited ARP makes no neighbour entry.
            ("arp_accept", "0"),
            ("accept_local", "0"),
            ("route_localnet", "0"),
            ("bc_forwarding", "0"),
            # A router that serves one bridge knows no better router for its guests, and
            # believes no redirect.
            ("accept_redirects", "0"),
            ("secure_redirects", "0"),
            ("send_redirects", "0"),
            ("accept_source_route", "0"),
            # The kernel's log is the host's.
            ("log_martians", "0"),
        )
        for which in ("all", "default")
    ),
)


# Without an IPv6 subnet, IPv6 stays inside the bridge, as on libvirt's isolated networks.
SYSCTLS_WITHOUT_IPV6 = (
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
)


# Values of "all" reach links that are there; values of "default", links to come.
SYSCTLS_WITH_IPV6 = (
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    *(
        (f"net/ipv6/conf/{which}/{key}", "0")
        for key in ("accept_redirects", "accept_source_route", "proxy_ndp")
        for which in ("all", "default")
    ),
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
)


# Order: values that count when a link begins to speak IPv6 come before that.
LINK_SYSCTLS = (
    # The link's own address follows from its MAC, which is unique.  Without duplicate
    # address detection the address is usable at once, not after two seconds.
    ("addr_gen_mode", "0"),
    ("accept_dad", "0"),
    ("autoconf", "0"),
    ("accept_redirects", "0"),
)


# A router's advertisements give the default route alone.
ADVERTISED = (
    ("accept_ra", "2"),
    ("accept_ra_defrtr", "1"),
    ("accept_ra_pinfo", "0"),
    # The first solicitation may come before the bridge forwards it.
    ("router_solicitation_interval", "1"),
)


def namespace_settings(network: Network) -> Settings:
    """Return the settings of a namespace as a whole."""
    more = SYSCTLS_WITH_IPV6 if has_ipv6(network) else SYSCTLS_WITHOUT_IPV6
    return Settings(names.namespace(network.name), SYSCTLS + more)


def link_settings(network: Network, segment: Segment, outside: Outside) -> Settings:
    """Return the IPv6 settings of both links of a namespace."""
    advertised = segment.gateway6 is None
    more = ADVERTISED if advertised else (("accept_ra", "0"),)
    off = "0" if leaves_by_ipv6(network, outside) else "1"
    inner, out = network.bridge, names.UPSTREAM_LINK
    proxy = "1" if any(answered_stations(network, segment, outside)) else "0"
    # The kernel learns guests' addresses from their unsolicited advertisements, for ndppd.
    heard = "1" if outside.proxied else "0"
    return Settings(
        names.namespace(network.name),
        (
            *_of_link(inner, (*LINK_SYSCTLS, ("accept_ra", "0"), ("proxy_ndp", proxy))),
            (f"net/ipv6/conf/{inner}/accept_untracked_na", heard),
            (f"net/ipv6/neigh/{inner}/proxy_delay", "0"),
            *_of_link(inner, (("disable_ipv6", "0"),)),
            *_of_link(out, (*LINK_SYSCTLS, *more, ("disable_ipv6", off))),
        ),
    )


def _of_link(link: str, values: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    return ((f"net/ipv6/conf/{link}/{key}", value) for key, value in values)
