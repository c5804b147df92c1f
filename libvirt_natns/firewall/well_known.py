# SPDX-License-Identifier: LGPL-2.1-or-later
"""Well-known addresses, and types of ICMP, that rules of namespaces and of the host name."""

from ipaddress import IPv4Network, IPv6Network

from libvirt_natns.firewall.rule import IcmpType

LINK_LOCAL = IPv6Network("fe80::/10")
MULTICAST = IPv6Network("ff02::/16")
"""Groups of one link: routers and neighbours are asked by them."""
UNSPECIFIED = IPv6Network("::")
"""The source of a station that has no address yet."""

LINK_LOCAL4 = IPv4Network("169.254.0.0/16")
METADATA6 = (IPv6Network("fd00:ec2::254"), IPv6Network("fd20:ce::254"))
"""Metadata services of clouds (AWS, Google), outside the link-local prefix.

The kernel itself forwards nothing to ``LINK_LOCAL``."""

BROADCAST = IPv4Network("255.255.255.255/32")

HOP_LIMIT = 255
"""Of Neighbour Discovery: a router would have lowered the hop limit."""

NEIGHBOURS: tuple[IcmpType, ...] = ("nd-neighbor-solicit", "nd-neighbor-advert")
LISTENERS: tuple[IcmpType, ...] = (
    "mld-listener-query",
    "mld-listener-report",
    "mld-listener-done",
    "mld2-listener-report",
)
