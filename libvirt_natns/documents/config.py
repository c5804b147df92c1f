# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration file, /etc/libvirt-natns/config.toml, as a ``Config``.

Every key is optional, and so is the file; what stands there must be right.  A
wrong key, type or value is a ConfigError of one line: the file, the key, what
was found and what was expected.  Nothing is looked up here: whether a bridge
exists is found out when a network needs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

from libvirt_natns.addresses import AddressRange
from libvirt_natns.errors import ConfigError
from libvirt_natns.model.configuration import DEFAULT_AUTO_PORTS, Config, FirewallChoice, Scope
from libvirt_natns.model.publication import PortSet, Protocol
from libvirt_natns.model.upstream import (
    DEFAULT_HOST_PORTS,
    DEFAULT_HOST_SUBNET,
    HOST_UPSTREAM,
    Attach,
    DhcpMode,
    LinkLocal,
    Upstream,
    UpstreamKind,
)
from libvirt_natns.names import CONFIG_FILE
from libvirt_natns.records import dataclass
from libvirt_natns.values import INTERFACE, INTERFACE_EXPECTED, alternatives, shown

KEYS = ("scope", "firewall", "upstream", "auto_ports", "upstreams")

ADDRESS_KEYS = ("subnet", "gateway", "pool", "dns", "probe")
DHCP_KEYS = ("dhcp", "dhcp_timeout")
ROUTER_KEYS = ("host_subnet", "host_ports", "host_address6")
LIMIT_KEYS = ("link_local", "max_flows")
ADDRESS_KEYS6 = ("subnet6", "gateway6", "pool6", "prefixes6")

IPV4_KEYS = {"subnet", "gateway", "pool"}
OUTSIDE6 = {"pool6", "prefixes6"}
"""One of these is enough for an upstream that has IPv6 alone."""

UPSTREAM_KEYS: dict[UpstreamKind, tuple[str, ...]] = {
    "bridge": ("kind", "bridge", "attach", *ADDRESS_KEYS, *DHCP_KEYS, *ADDRESS_KEYS6, *LIMIT_KEYS),
    "host": ("kind", "subnet", "dns", "subnet6", "prefixes6", *LIMIT_KEYS),
    "router": ("kind", "nic", "subnet", "dns", *ROUTER_KEYS, "subnet6", "prefixes6", *LIMIT_KEYS),
}
"""What an upstream of each kind may say; anything else would be ignored."""

EXPECTED = {
    "subnet": "an IPv4 subnet such as 192.168.0.0/24",
    "gateway": "an IPv4 address such as 192.168.0.1",
    "pool": 'a range such as "192.168.0.100-192.168.0.199", an address or a subnet',
    "dns": "the address of a resolver outside this host, such as 192.168.0.1",
    "subnet6": "an IPv6 subnet such as 2001:db8:77::/64",
    "gateway6": "an IPv6 address such as 2001:db8:77::1",
    "pool6": 'a range such as "2001:db8:77::100-2001:db8:77::1ff", an address or a subnet',
    "host_subnet": "an IPv4 subnet such as 192.168.158.0/24",
    "host_ports": 'a protocol with a port or a range, such as "tcp/22" or "udp/60000-61000"',
    "host_address6": "one of the host's IPv6 addresses, such as 2001:db8:77::2",
    "prefixes6": "an IPv6 prefix of /64 or shorter, such as 2001:db8:100::/56",
}

MAX_PROBE = 5.0
"""Longest time that an address is asked for, in seconds."""

MAX_FLOWS = range(64, (1 << 20) + 1)
"""Numbers of flows that a network may have at one time; the kernel's own limit is 262144
on most machines."""

MAX_DHCP_TIMEOUT = 30.0
"""Longest time that a start waits for a lease, in seconds: libvirt waits, too, and
after that time a start counts as dead."""

DHCP_TIMEOUTS: dict[DhcpMode, float] = {"required": 10.0, "background": 1.0}
"""How long it waits by default."""

AUTO_PORTS = re.compile(r"[0-9]{1,5}-[0-9]{1,5}")
AUTO_PORTS_EXPECTED = 'a range of ports such as "20000-29999"'

PORT_SET = re.compile(r"(tcp|udp|sctp)/([0-9]{1,5})(?:-([0-9]{1,5}))?")

UPSTREAM_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Address = TypeVar("Address", IPv4Address, IPv6Address)
Network = TypeVar("Network", IPv4Network, IPv6Network)
Value = TypeVar("Value")


def load(path: Path = CONFIG_FILE) -> Config:
    """The configuration in ``path``; the defaults where there is no such file.

    ConfigError if it cannot be read or says something wrong.
    """
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "make it a readable file") from error
    except UnicodeDecodeError as error:
        fact = f"{path}: not UTF-8 at byte {error.start}"
        raise ConfigError(fact, "save it as UTF-8") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Config:
    """The configuration that ``text`` says; ``where`` is what messages call it.

    ConfigError if it says something wrong.
    """
    # Needless where there is no configuration: hooks are waited for.
    import tomllib

    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML", str(error)) from error
    except RecursionError:
        raise ConfigError(f"{where}: not valid TOML", "too deeply nested") from None
    except ValueError:
        # Python converts no decimal integer of more than 4300 digits.
        raise ConfigError(f"{where}: not valid TOML", "a number is too long") from None
    return _config(Table(where, "", data))


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the file, and its place there: "" or "upstreams.NAME."."""

    where: str
    prefix: str
    data: dict[str, Any]

    def error(self, key: str, found: str, expected: str) -> ConfigError:
        """One line about ``key``."""
        return ConfigError(f"{self.where}: {self.prefix}{key}: {found}", f"expected {expected}")

    def wrong(self, key: str, value: object, expected: str) -> ConfigError:
        """One line about the value of ``key``."""
        return self.error(key, f"is {shown(value)}", expected)

    def only(self, keys: Iterable[str], of: str = "") -> None:
        """Refuse other keys than these, which are all ``of`` something may have."""
        known = sorted(keys)
        for key in self.data:
            if key not in known:
                from difflib import get_close_matches

                close = get_close_matches(key, known, n=1)
                hint = f"{close[0]} (did you mean that?)" if close else alternatives(known)
                name = key if UPSTREAM_NAME.fullmatch(key) else shown(key)
                raise self.error(name, f"unknown key{of}", hint)

    def text(self, key: str, expected: str, pattern: re.Pattern[str]) -> str | None:
        """The string under ``key``, None without one."""
        value = self.data.get(key)
        if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
            raise self.wrong(key, value, expected)
        return value

    def choice(self, key: str, options: tuple[str, ...], default: str) -> str:
        """The string under ``key``, which is one of ``options``."""
        value = self.data.get(key, default)
        if value not in options:
            raise self.wrong(key, value, alternatives([f'"{option}"' for option in options]))
        return str(value)

    def one(self, key: str, make: Callable[[str], Value], expected: str) -> Value | None:
        """What ``make`` makes of the string under ``key``, None without one."""
        if key not in self.data:
            return None
        return self._made(key, self.data[key], make, expected)

    def several(self, key: str, make: Callable[[str], Value], expected: str) -> tuple[Value, ...]:
        """What ``make`` makes of each string in the array under ``key``."""
        values = self.data.get(key, [])
        if not isinstance(values, list):
            raise self.wrong(key, values, f"an array, each {expected}")
        return tuple(
            self._made(f"{key}[{number}]", value, make, expected)
            for number, value in enumerate(values)
        )

    def _made(self, key: str, value: object, make: Callable[[str], Value], expected: str) -> Value:
        try:
            # ipaddress takes anything for an IPv6 scope that follows a "%".
            if isinstance(value, str) and "%" not in value:
                return make(value)
        except ValueError:
            pass
        raise self.wrong(key, value, expected)


# The whole file


def _config(table: Table) -> Config:
    table.only(KEYS)
    upstreams = _upstreams(table)
    name = table.data.get("upstream", HOST_UPSTREAM.name)
    if not isinstance(name, str) or name not in upstreams:
        expected = alternatives([f'"{known}"' for known in sorted(upstreams)])
        raise table.wrong("upstream", name, f"{expected}, or a table [upstreams.NAME]")
    return Config(
        scope=cast("Scope", table.choice("scope", get_args(Scope), "isolated")),
        firewall=cast("FirewallChoice", table.choice("firewall", get_args(FirewallChoice), "auto")),
        upstream=name,
        upstreams=upstreams,
        auto_ports=_auto_ports(table),
    )


def _auto_ports(table: Table) -> tuple[int, int]:
    """The range that start="auto" chooses from."""
    text = table.text("auto_ports", AUTO_PORTS_EXPECTED, AUTO_PORTS)
    if text is None:
        return DEFAULT_AUTO_PORTS
    first, last = map(int, text.split("-"))
    if not 1 <= first <= last <= 65535:
        raise table.wrong("auto_ports", text, AUTO_PORTS_EXPECTED)
    return first, last


def _upstreams(table: Table) -> dict[str, Upstream]:
    tables = table.data.get("upstreams", {})
    if not isinstance(tables, dict):
        raise table.wrong("upstreams", tables, "a table [upstreams.NAME]")
    upstreams = {HOST_UPSTREAM.name: HOST_UPSTREAM}
    for name, data in tables.items():
        if not UPSTREAM_NAME.fullmatch(name):
            key = f"upstreams.{shown(name)}"
            raise table.error(key, "wrong name", "1 to 64 of A-Z a-z 0-9 _ . -")
        if not isinstance(data, dict):
            raise table.wrong(f"upstreams.{name}", data, f"a table [upstreams.{name}]")
        upstreams[name] = _upstream(name, Table(table.where, f"upstreams.{name}.", data))
    _check_shared(table, upstreams)
    return upstreams


def _check_shared(table: Table, upstreams: dict[str, Upstream]) -> None:
    """No address in two upstreams of one bridge: both would hand it out."""
    for first, second in combinations(upstreams.values(), 2):
        hosts = first.kind == second.kind == "host"
        if not hosts and (not first.bridge or first.bridge != second.bridge):
            continue
        for key, spans in (("pool", _pool_spans), ("pool6", _pool6_spans), ("prefixes6", _parts6)):
            shared = _overlap(spans(first) + spans(second))
            if shared:
                found = f"shares {shared.text} with upstreams.{first.name}.{key}"
                where = "the host's" if hosts else f"on {first.bridge}"
                expected = f"addresses of its own, as both are {where}"
                raise table.error(f"upstreams.{second.name}.{key}", found, expected)


def _pool_spans(upstream: Upstream) -> list[Span]:
    return _spans(upstream.ranges)


def _pool6_spans(upstream: Upstream) -> list[Span]:
    return _spans(upstream.pool6)


def _parts6(upstream: Upstream) -> list[Span]:
    return [
        Span(int(each.network_address), int(each.broadcast_address), str(each))
        for each in upstream.prefixes6
    ]


# One upstream


def _upstream(name: str, table: Table) -> Upstream:
    kind = _kind(name, table)
    table.only(UPSTREAM_KEYS[kind], f' of an upstream of kind "{kind}"')
    upstream = Upstream(
        name=name,
        kind=kind,
        bridge=table.text("bridge", INTERFACE_EXPECTED, INTERFACE),
        nic=table.text("nic", INTERFACE_EXPECTED, INTERFACE),
        subnet=_subnet(table, "subnet", IPv4Network, 30),
        gateway=table.one("gateway", IPv4Address, EXPECTED["gateway"]),
        pool=_pool(table),
        dns=table.several("dns", _resolver, EXPECTED["dns"]),
        probe=_probe(table),
        subnet6=_subnet(table, "subnet6", IPv6Network, 126),
        gateway6=table.one("gateway6", _address6, EXPECTED["gateway6"]),
        pool6=_pool6(table),
        prefixes6=_prefixes6(table),
        attach=cast("Attach", table.choice("attach", get_args(Attach), "bridge")),
        dhcp=_dhcp_mode(table),
        dhcp_timeout=_dhcp_timeout(table),
        link_local=cast("LinkLocal", table.choice("link_local", get_args(LinkLocal), "reject")),
        max_flows=_max_flows(table),
        host_subnet=_subnet(table, "host_subnet", IPv4Network, 30) or DEFAULT_HOST_SUBNET,
        host_ports=_host_ports(table),
        host_address6=table.one("host_address6", _address6, EXPECTED["host_address6"]),
    )
    _check_required(table, upstream)
    _check_ipv4(table, upstream)
    _check_ipv6(table, upstream)
    return upstream


def _kind(name: str, table: Table) -> UpstreamKind:
    kinds = get_args(UpstreamKind)
    if "kind" not in table.data and name != HOST_UPSTREAM.name:
        raise table.error("kind", "missing", alternatives([f'"{kind}"' for kind in kinds]))
    return cast("UpstreamKind", table.choice("kind", kinds, "host"))


def _check_required(table: Table, upstream: Upstream) -> None:
    required: dict[UpstreamKind, dict[str, str]] = {
        "bridge": {
            "bridge": 'the bridge to the upstream network, such as "br0"',
            "pool": 'the addresses to use, such as ["192.168.0.100-192.168.0.199"], or "dhcp"',
            "subnet": 'the upstream\'s subnet, such as "192.168.0.0/24"',
        },
        "host": {},
        "router": {"nic": 'the NIC to the upstream network, such as "ens3"'},
    }
    only6 = not IPV4_KEYS & table.data.keys() and bool(OUTSIDE6 & table.data.keys())
    for key, expected in required[upstream.kind].items():
        by_dhcp = key == "subnet" and upstream.pool == "dhcp"
        spared = by_dhcp or (only6 and key in IPV4_KEYS)
        if key not in table.data and not spared:
            raise table.error(key, "missing", expected)


def _host_ports(table: Table) -> tuple[PortSet, ...]:
    if "host_ports" not in table.data:
        return DEFAULT_HOST_PORTS
    return table.several("host_ports", _port_set, EXPECTED["host_ports"])


def _port_set(text: str) -> PortSet:
    found = PORT_SET.fullmatch(text)
    if found is None:
        raise ValueError(text)
    first, last = int(found[2]), int(found[3] or found[2])
    if not 1 <= first <= last <= 65535:
        raise ValueError(text)
    return PortSet(cast("Protocol", found[1]), first, last)


def _probe(table: Table) -> float:
    return _seconds(table, "probe", HOST_UPSTREAM.probe, MAX_PROBE)


def _seconds(table: Table, key: str, default: float, most: float) -> float:
    value = table.data.get(key, default)
    # A bool is an int to Python, and nan is in no range.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise table.wrong(key, value, f"seconds from 0 to {most:g}")
    return float(value)


def _max_flows(table: Table) -> int:
    value = table.data.get("max_flows", HOST_UPSTREAM.max_flows)
    if isinstance(value, bool) or not isinstance(value, int) or value not in MAX_FLOWS:
        expected = f"a number from {MAX_FLOWS[0]} to {MAX_FLOWS[-1]}"
        raise table.wrong("max_flows", value, expected)
    return value


def _dhcp_mode(table: Table) -> DhcpMode:
    _check_by_dhcp(table, "dhcp")
    return cast("DhcpMode", table.choice("dhcp", get_args(DhcpMode), "required"))


def _dhcp_timeout(table: Table) -> float:
    _check_by_dhcp(table, "dhcp_timeout")
    default = DHCP_TIMEOUTS[_dhcp_mode(table)]
    return _seconds(table, "dhcp_timeout", default, MAX_DHCP_TIMEOUT)


def _check_by_dhcp(table: Table, key: str) -> None:
    """Refuse a key that means something where addresses come by DHCP, and only there."""
    if key in table.data and table.data.get("pool") != "dhcp":
        raise table.error(key, "means nothing here", 'pool = "dhcp" with it')


def _resolver(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text)
    # A namespace has a loopback of its own.
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        raise ValueError(text)
    return address


def _subnet(
    table: Table, key: str, make: Callable[[str, bool], Network], longest: int
) -> Network | None:
    """The subnet under ``key``, of a prefix length up to ``longest``."""
    subnet = table.one(key, lambda text: make(text, False), EXPECTED[key])
    if subnet is None:
        return None
    try:
        make(table.data[key], True)
    except ValueError:
        raise table.wrong(key, table.data[key], f"{subnet}, the whole subnet") from None
    if subnet.prefixlen > longest:
        raise table.wrong(key, str(subnet), f"a prefix length up to {longest}")
    return subnet


# IPv4


def _pool(table: Table) -> tuple[AddressRange, ...] | Literal["dhcp"]:
    value = table.data.get("pool", [])
    if value == "dhcp":
        return "dhcp"
    if not isinstance(value, list):
        raise table.wrong("pool", value, f'an array, each {EXPECTED["pool"]}, or "dhcp"')
    return table.several("pool", _range4, EXPECTED["pool"])


def _range4(text: str) -> AddressRange:
    if "/" in text:
        network = IPv4Network(text)
        return AddressRange(network.network_address, network.broadcast_address)
    return AddressRange(*_ends(text, IPv4Address))


def _ends(text: str, make: Callable[[str], Address]) -> tuple[Address, Address]:
    first, dash, last = text.partition("-")
    start = make(first.strip())
    end = make(last.strip()) if dash else start
    if int(end) < int(start):
        raise ValueError(text)
    return start, end


def _check_ipv4(table: Table, upstream: Upstream) -> None:
    subnet, gateway, pool = upstream.subnet, upstream.gateway, upstream.pool
    if gateway and subnet and not _is_host_in(gateway, subnet):
        raise table.wrong("gateway", str(gateway), f"a host's address in {subnet}")
    if pool == "dhcp" or "pool" not in table.data:
        return
    if subnet is None:
        raise table.error("subnet", "missing", "the subnet that the pool is part of")
    _check_spans(table, "pool", _spans(pool), subnet)
    unusable = {subnet.network_address, subnet.broadcast_address, gateway}
    lost = sum(any(address in span for span in pool) for address in unusable)
    if sum(span.last - span.first + 1 for span in _spans(pool)) <= lost:
        expected = "at least one that is neither the gateway's nor an end of the subnet"
        raise table.error("pool", "has no usable address", expected)


def _is_host_in(address: IPv4Address, subnet: IPv4Network) -> bool:
    ends = (subnet.network_address, subnet.broadcast_address)
    return address in subnet and address not in ends


# IPv6


def _address6(text: str) -> IPv6Address:
    address = IPv6Address(text)
    if address.is_unspecified or address.is_multicast:
        raise ValueError(text)
    return address


def _pool6(table: Table) -> tuple[AddressRange, ...]:
    return table.several("pool6", _range6, EXPECTED["pool6"])


def _range6(text: str) -> AddressRange:
    if "/" in text:
        network = IPv6Network(text)
        return AddressRange(network.network_address, network.broadcast_address)
    return AddressRange(*_ends(text, _address6))


def _prefixes6(table: Table) -> tuple[IPv6Network, ...]:
    prefixes = table.several("prefixes6", _prefix6, EXPECTED["prefixes6"])
    for first, second in combinations(prefixes, 2):
        if first.overlaps(second):
            raise table.error("prefixes6", f"{first} and {second} overlap", "separate prefixes")
    return prefixes


def _prefix6(text: str) -> IPv6Network:
    prefix = IPv6Network(text)
    if prefix.prefixlen > 64:
        raise ValueError(text)
    return prefix


def _check_ipv6(table: Table, upstream: Upstream) -> None:
    subnet, gateway = upstream.subnet6, upstream.gateway6
    # Many a provider's router has a link-local address only.
    if gateway and subnet and gateway not in subnet and not gateway.is_link_local:
        raise table.wrong("gateway6", str(gateway), f"an address in {subnet}, or link-local")
    if upstream.prefixes6 and upstream.attach == "macvlan":
        # The host, which has the route to each network's, does not reach it by that link.
        raise table.error("prefixes6", "is of no use to a macvlan", 'attach = "bridge", or none')
    for prefix in upstream.prefixes6:
        if subnet is not None and prefix.overlaps(subnet):
            expected = "what is routed to the subnet, and no part of it"
            raise table.error("prefixes6", f"{prefix} overlaps subnet6", expected)
    if not upstream.pool6:
        return
    if subnet is None:
        raise table.error("subnet6", "missing", "the subnet that pool6 is part of")
    _check_spans(table, "pool6", _spans(upstream.pool6), subnet)
    unusable = {subnet.network_address, gateway}
    lost = sum(any(address in span for span in upstream.pool6) for address in unusable)
    if sum(span.last - span.first + 1 for span in _spans(upstream.pool6)) <= lost:
        expected = "at least one that is neither the gateway's nor all routers'"
        raise table.error("pool6", "has no usable address", expected)


# Ranges as plain numbers: a pool may have 2**64 addresses


class Span(NamedTuple):
    """A range of addresses as integers, and how messages call it."""

    first: int
    last: int
    text: str


def _spans(ranges: Iterable[AddressRange]) -> list[Span]:
    return [Span(int(each.first), int(each.last), f"{each.first}-{each.last}") for each in ranges]


def _check_spans(
    table: Table, key: str, spans: list[Span], subnet: IPv4Network | IPv6Network
) -> None:
    """Ranges lie in the subnet, and apart."""
    first, last = int(subnet.network_address), int(subnet.broadcast_address)
    for number, span in enumerate(spans):
        if span.first < first or span.last > last:
            raise table.wrong(f"{key}[{number}]", span.text, f"addresses in {subnet}")
    overlap = _overlap(spans)
    if overlap:
        raise table.error(key, f"has {overlap.text} twice", "ranges that do not overlap")


def _overlap(spans: list[Span]) -> Span | None:
    """The first span, by address, that begins within another."""
    return next((two for one, two in pairwise(sorted(spans)) if two.first <= one.last), None)


__all__ = ["Config", "load", "parse"]
