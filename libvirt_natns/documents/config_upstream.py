# SPDX-License-Identifier: LGPL-2.1-or-later
"""A table [upstreams.NAME] of the configuration file as an ``Upstream``.

``KEYS`` declares each key with the reader of its value.  An upstream may have the keys that
are fields of its type, and their defaults.
"""

from __future__ import annotations

from dataclasses import fields
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any, get_args

from libvirt_natns.addresses import Address
from libvirt_natns.documents import config_spans
from libvirt_natns.documents.config_spans import NamedSpan
from libvirt_natns.documents.config_table import (
    Reader,
    TomlTable,
    choice,
    number,
    one,
    seconds,
    several,
    text,
)
from libvirt_natns.documents.config_values import (
    address6,
    client_id,
    gateway4,
    helper,
    pool,
    port_set,
    prefixes6,
    range6,
    resolver,
    subnet,
    with_dhcp,
)
from libvirt_natns.model.upstream import (
    HOST_UPSTREAM,
    AnyUpstream,
    Attach,
    BridgeUpstream,
    DhcpMode,
    DhcpUpstream,
    HostUpstream,
    LinkLocal,
    RouterUpstream,
    Upstream,
    UpstreamKind,
)
from libvirt_natns.values import INTERFACE, INTERFACE_EXPECTED, alternatives

MAX_PROBE = 5.0
"""Longest time that an address is asked for, in seconds."""

MAX_FLOWS = range(64, (1 << 20) + 1)
"""Numbers of flows that a network may have at one time; the kernel's own limit is 262144
on most machines."""

MAX_DHCP_TIMEOUT = 30.0
"""Longest time that a start waits for a lease, in seconds: libvirt waits, too, and
after that time the start counts as dead."""

DHCP_TIMEOUTS: dict[DhcpMode, float] = {"required": 10.0, "background": 1.0}
"""Time that a start waits for a lease by default, in seconds."""


def parse(name: str, table: TomlTable) -> Upstream:
    """Return the upstream that a table describes; ConfigError if something is wrong in it."""
    if "kind" not in table.data and name != HOST_UPSTREAM.name:
        expected = alternatives([f'"{kind}"' for kind in get_args(UpstreamKind)])
        raise table.error("kind", "missing", expected)
    kind: UpstreamKind = KIND(table, "kind") if "kind" in table.data else "host"
    table.only(KEYS_OF_KIND[kind], f' of an upstream of kind "{kind}"')
    values = {
        key: read(table, key) for key, read in KEYS.items() if key in table.data and key != "kind"
    }
    _check_required(table, kind)
    upstream = _upstream(name, kind, values)
    if isinstance(upstream, BridgeUpstream):
        _check_ipv4(table, upstream)
        _check_ipv6(table, upstream)
    else:
        _check_transit(table, upstream)
        _check_prefixes6(table, upstream)
    return upstream


def _upstream(name: str, kind: UpstreamKind, values: dict[str, Any]) -> Upstream:
    if kind == "host":
        return HostUpstream(name=name, **values)
    if kind == "router":
        return RouterUpstream(name=name, **values)
    if values.get("pool") != "dhcp":
        return BridgeUpstream(name=name, **values)
    leased = {key: value for key, value in values.items() if key != "pool"}
    leased.setdefault("dhcp_timeout", DHCP_TIMEOUTS[values.get("dhcp", "required")])
    return DhcpUpstream(name=name, **leased)


# Keys

KIND = choice(get_args(UpstreamKind))
INTERFACE_NAME = text(INTERFACE, INTERFACE_EXPECTED)

KEYS: dict[str, Reader] = {
    "kind": KIND,
    "bridge": INTERFACE_NAME,
    "nic": INTERFACE_NAME,
    "subnet": subnet(IPv4Network, 32, "an IPv4 subnet such as 192.168.0.0/24"),
    "gateway": one(gateway4, "an IPv4 address such as 192.168.0.1"),
    "pool": pool('a range such as "192.168.0.100-192.168.0.199", an address or a subnet'),
    "dns": several(resolver, "the address of a resolver outside this host, such as 192.168.0.1"),
    "probe": seconds(MAX_PROBE),
    "subnet6": subnet(IPv6Network, 128, "an IPv6 subnet such as 2001:db8:77::/64"),
    "gateway6": one(address6, "an IPv6 address such as 2001:db8:77::1"),
    "pool6": several(
        range6, 'a range such as "2001:db8:77::100-2001:db8:77::1ff", an address or a subnet'
    ),
    "prefixes6": prefixes6("an IPv6 prefix of /64 or shorter, such as 2001:db8:100::/56"),
    "attach": choice(get_args(Attach)),
    "dhcp": with_dhcp(choice(get_args(DhcpMode))),
    "dhcp_timeout": with_dhcp(seconds(MAX_DHCP_TIMEOUT)),
    "link_local": choice(get_args(LinkLocal)),
    "max_flows": number(MAX_FLOWS),
    "helpers": several(helper, '"ftp" or "tftp"'),
    "host_subnet": subnet(IPv4Network, 30, "an IPv4 subnet such as 192.168.158.0/24"),
    "host_ports": several(
        port_set, 'a protocol with a port or a range, such as "tcp/22" or "udp/60000-61000"'
    ),
    "host_address6": one(address6, "an IPv6 address of the host, such as 2001:db8:77::2"),
    "host_addresses": several(IPv4Address, "an IPv4 address of the NIC, such as 198.51.100.10"),
    "client_id": one(
        client_id, 'octets such as "01:52:54:00:00:00:05", or "ff:" with an IAID and a DUID'
    ),
}
"""Each key, with the reader of its value.

Values are read in this order, so the first wrong key of a table is reported.
"""

TYPES: dict[UpstreamKind, type[AnyUpstream]] = {
    # With our own pool, readers refuse the keys that only DHCP has.
    "bridge": DhcpUpstream,
    "host": HostUpstream,
    "router": RouterUpstream,
}
"""The type with all keys of a kind."""

KEYS_OF_KIND: dict[UpstreamKind, tuple[str, ...]] = {
    kind: tuple(key for key in KEYS if key in ("kind", *(field.name for field in fields(made))))
    for kind, made in TYPES.items()
}
"""Keys of an upstream of each kind.  Any other key would be ignored, so it is refused."""

REQUIRED: dict[UpstreamKind, dict[str, str]] = {
    "bridge": {
        "bridge": 'the bridge to the upstream network, such as "br0"',
        "pool": 'the addresses to use, such as ["192.168.0.100-192.168.0.199"], or "dhcp"',
        "subnet": 'the upstream\'s subnet, such as "192.168.0.0/24"',
    },
    "host": {},
    "router": {"nic": 'the NIC to the upstream network, such as "ens3"'},
}

IPV4_KEYS = {"subnet", "gateway", "pool"}
OUTSIDE6 = {"pool6", "prefixes6"}
"""Keys of which an upstream with IPv6 alone needs at least one."""


# Keys that must fit each other


def _check_required(table: TomlTable, kind: UpstreamKind) -> None:
    only6 = not IPV4_KEYS & table.data.keys() and bool(OUTSIDE6 & table.data.keys())
    for key, expected in REQUIRED[kind].items():
        # Without a subnet, each address of the pool stands alone beside its gateway.
        told = table.data.get("pool") == "dhcp" or "gateway" in table.data
        spared = (told and key == "subnet") or (only6 and key in IPV4_KEYS)
        if key not in table.data and not spared:
            raise table.error(key, "missing", expected)


def _check_ipv4(table: TomlTable, upstream: BridgeUpstream) -> None:
    whole, gateway, ranges = upstream.subnet, upstream.gateway, upstream.pool
    ends = _edges(whole)
    if gateway in ends:
        raise table.wrong("gateway", str(gateway), f"a host address in {whole}, or one outside")
    if table.data.get("pool", "dhcp") == "dhcp":
        return
    spans = config_spans.of_ranges(ranges)
    _check_spans(table, "pool", spans, whole)
    lost = sum(any(address in span for span in ranges) for address in {*ends, gateway})
    if config_spans.size(spans) <= lost:
        expected = "at least one address besides the gateway and the ends of the subnet"
        raise table.error("pool", "has no usable address", expected)


def _check_ipv6(table: TomlTable, upstream: BridgeUpstream) -> None:
    whole, gateway = upstream.subnet6, upstream.gateway6
    if upstream.prefixes6 and upstream.is_macvlan:
        # The host, which has the route to each network's, does not reach it by that link.
        raise table.error("prefixes6", 'does not work with attach = "macvlan"', 'attach = "bridge"')
    _check_prefixes6(table, upstream)
    if not upstream.pool6:
        return
    if whole is None and gateway is None:
        raise table.error("subnet6", "missing", "the subnet that pool6 is part of, or gateway6")
    spans = config_spans.of_ranges(upstream.pool6)
    _check_spans(table, "pool6", spans, whole)
    unusable = {*_edges(whole)[:1], gateway}
    lost = sum(any(address in span for span in upstream.pool6) for address in unusable)
    if config_spans.size(spans) <= lost:
        expected = "at least one address besides the gateway and the all-routers address"
        raise table.error("pool6", "has no usable address", expected)


def _check_transit(table: TomlTable, upstream: Upstream) -> None:
    """Refuse subnets without room for a gateway and a network."""
    whole: IPv4Network | IPv6Network | None
    for key, whole in (("subnet", upstream.subnet), ("subnet6", upstream.subnet6)):
        if whole is not None and whole.prefixlen > whole.max_prefixlen - 2:
            raise table.wrong(key, str(whole), f"a prefix length up to {whole.max_prefixlen - 2}")


def _edges(whole: IPv4Network | IPv6Network | None) -> tuple[Address, ...]:
    """Return the first and last address of a subnet; RFC 3021 has stations there in a /31."""
    if whole is None or whole.prefixlen >= whole.max_prefixlen - 1:
        return ()
    return (whole.network_address, whole.broadcast_address)


def _check_prefixes6(table: TomlTable, upstream: Upstream) -> None:
    for prefix in upstream.prefixes6:
        if upstream.subnet6 is not None and prefix.overlaps(upstream.subnet6):
            expected = "prefixes outside the subnet, which are routed to it"
            raise table.error("prefixes6", f"{prefix} overlaps subnet6", expected)


def _check_spans(
    table: TomlTable, key: str, spans: list[NamedSpan], whole: IPv4Network | IPv6Network | None
) -> None:
    """Refuse ranges that lie outside the subnet, if there is one, or overlap."""
    for position, span in enumerate(spans):
        if whole and not int(whole[0]) <= span.first <= span.last <= int(whole[-1]):
            raise table.wrong(f"{key}[{position}]", span.text, f"addresses in {whole}")
    overlap = config_spans.overlap(spans)
    if overlap:
        raise table.error(key, f"has {overlap.text} twice", "ranges that do not overlap")
