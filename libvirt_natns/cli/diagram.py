# SPDX-License-Identifier: LGPL-2.1-or-later
"""A picture of the networks that are up, from recorded state; nothing is measured.

One box a namespace, with its network above and its upstream's bridge below.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES, is_placeholder
from libvirt_natns.cli import forward_list
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.forwards import ports
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.network import Network
from libvirt_natns.records import dataclass
from libvirt_natns.state.leases import Leased
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import routers, transit

NONE = "no network is up: start one (virsh net-start)\n"
GAP = "   "
MOST_FORWARDS = 4


@dataclass(frozen=True, slots=True)
class Router:
    """One network's namespace; ``gateways`` with their prefixes, ``addresses`` outside."""

    network: str
    bridge: str
    namespace: str
    gateways: tuple[str, ...]
    addresses: tuple[str, ...]
    upstream: str
    forwards: tuple[str, ...] = ()

    @property
    def content(self) -> tuple[str, ...]:
        """What stands in its box."""
        return (self.namespace, *self.gateways, *self.addresses, *self.forwards)

    @property
    def width(self) -> int:
        return max(len(text) for text in (*self.content, self.network, self.bridge)) + 4


@dataclass(frozen=True, slots=True)
class Picture:
    """All routers; ``upstreams`` tells for each name of one its bridge and what it is."""

    routers: tuple[Router, ...]
    upstreams: dict[str, tuple[str, str]]


def collect(engine: Engine) -> Picture:
    """What is up, as it was recorded."""
    records = [record for record in engine.store.networks.all("up") if record.this_boot]
    return Picture(
        tuple(_router(engine, record) for record in records),
        {record.upstream: _upstream(engine, record.upstream) for record in records},
    )


def _router(engine: Engine, record: NetworkRecord) -> Router:
    network = libvirt_xml.parse_network(record.document)
    leased = engine.store.leases.of(record.upstream, record.uuid)
    return Router(
        record.name,
        record.bridge,
        record.namespace,
        (*(str(subnet.interface) for subnet in network.subnets), *_prefix(network, leased)),
        tuple(str(each) for each in leased.addresses if not is_placeholder(each))
        or ("no address",),
        record.upstream,
        _forwards(engine, record),
    )


def _prefix(network: Network, leased: Leased) -> list[str]:
    """The gateway in the prefix that a network leases, unless its own XML has it."""
    prefix = leased.prefix
    if prefix is None or any(prefix.overlaps(subnet.network) for subnet in network.subnets):
        return []
    return [f"{prefix[1]}/{prefix.prefixlen}"]


def _forwards(engine: Engine, record: NetworkRecord) -> tuple[str, ...]:
    """What a network publishes, the first of it where that is a lot."""
    told = [
        f"{row.address or '*'}:{row.proto} {ports(row.first, row.last or row.first)}"
        f" -> {row.guest or row.target}"
        if row.first
        else f"{row.address} -> {row.guest}"
        for row in forward_list.collect(engine.store, record.uuid, published=True)
    ]
    more = len(told) - MOST_FORWARDS
    return (*told[:MOST_FORWARDS], f"and {more} more") if more > 0 else tuple(told)


def _upstream(engine: Engine, name: str) -> tuple[str, str]:
    """An upstream's bridge, and what it is in words."""
    upstream = engine.config.upstreams.get(name)
    if upstream is None:
        return "?", f"upstream {name}, which is not configured any more"
    said = f"upstream {name}"
    if upstream.kind == "host":
        subnet = upstream.subnet or engine.store.transit.subnet(name)
        upstream = (
            transit.complete(upstream, subnet, engine.store.transit.prefix(name))
            if subnet
            else upstream
        )
        said += ", routed by the host"
    elif upstream.kind == "router":
        with suppress(NatnsError):
            upstream = routers.complete(upstream)
        said += f", routed by {names.router_namespace(name)} with {upstream.nic}"
    said += ", by macvlan" if upstream.attach == "macvlan" else ""
    for side in map(upstream.side, FAMILIES):
        said += f", {side.subnet}" if side.subnet else ""
        said += f", gateway {side.gateway}" if side.gateway else ""
    said += f", prefixes {', '.join(map(str, upstream.prefixes6))}" if upstream.prefixes6 else ""
    return upstream.bridge or "?", said


def draw(picture: Picture, width: int = 80) -> str:
    """The picture as text; rows are broken where they would be wider than ``width``."""
    if not picture.routers:
        return NONE
    parts = []
    ordered = sorted(picture.routers, key=lambda router: (router.upstream, router.network))
    for name, group in groupby(ordered, key=lambda router: router.upstream):
        bridge, said = picture.upstreams[name]
        rows = ["\n".join(_row(row, bridge)) for row in _rows(list(group), width)]
        parts.append("\n\n".join(rows) + f"\n{GAP}({said})\n")
    return "\n".join(parts)


def _rows(routers: Sequence[Router], width: int) -> Iterator[list[Router]]:
    row: list[Router] = []
    used = 0
    for router in routers:
        if row and used + router.width > width:
            yield row
            row, used = [], 0
        row.append(router)
        used += router.width + len(GAP)
    yield row


def _row(routers: Sequence[Router], bridge: str) -> Iterator[str]:
    yield _line(router.network.center(router.width) for router in routers)
    yield _line("|".center(router.width) for router in routers)
    yield _line(router.bridge.center(router.width) for router in routers)
    yield _line("|".center(router.width) for router in routers)
    yield _line(_edge(router) for router in routers)
    height = max(len(router.content) for router in routers)
    for number in range(height):
        yield _line(_content(router, number) for router in routers)
    yield _line(_edge(router) for router in routers)
    yield _line("|".center(router.width) for router in routers)
    joined = "-" * len(GAP)
    yield joined.join("+".center(router.width, "-") for router in routers) + f" {bridge}"


def _line(cells: Iterable[str]) -> str:
    return GAP.join(cells).rstrip()


def _edge(router: Router) -> str:
    return "+" + "+".center(router.width, "-")[1:-1] + "+"


def _content(router: Router, number: int) -> str:
    text = router.content[number] if number < len(router.content) else ""
    return f"| {text.ljust(router.width - 4)} |"
