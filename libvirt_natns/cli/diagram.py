# SPDX-License-Identifier: LGPL-2.1-or-later
"""A picture of the networks that are up, from recorded state; the kernel is not read.

Each namespace is a box, with its network above and its upstream's bridge below.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Network
from itertools import groupby

from libvirt_natns.addresses import FAMILIES, is_placeholder
from libvirt_natns.cli import forward_list
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.engine import Engine
from libvirt_natns.model.network import Network
from libvirt_natns.spans import span_text
from libvirt_natns.state.leases import Leased
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import segments

NONE = "no network is up: start a network (virsh net-start)\n"
GAP = "   "
MOST_FORWARDS = 4


@dataclass(frozen=True, slots=True)
class Box:
    """The box of a network's namespace; ``gateways`` have prefixes, ``addresses`` are outside."""

    network: str
    bridge: str
    namespace: str
    gateways: tuple[str, ...]
    addresses: tuple[str, ...]
    upstream: str
    forwards: tuple[str, ...] = ()

    @property
    def content(self) -> tuple[str, ...]:
        """The lines in the box."""
        return (self.namespace, *self.gateways, *self.addresses, *self.forwards)

    @property
    def width(self) -> int:
        return max(len(text) for text in (*self.content, self.network, self.bridge)) + 4


@dataclass(frozen=True, slots=True)
class Picture:
    """All boxes; ``upstreams`` has the bridge and the description of each upstream by its name."""

    boxes: tuple[Box, ...]
    upstreams: dict[str, tuple[str, str]]


def collect(engine: Engine) -> Picture:
    """Return the recorded networks that are up."""
    records = [record for record in engine.store.networks.all("up") if record.this_boot]
    return Picture(
        tuple(_box(engine, record) for record in records),
        {record.upstream: _upstream(engine, record.upstream) for record in records},
    )


def _box(engine: Engine, record: NetworkRecord) -> Box:
    network = libvirt_xml.parse_network(record.document)
    leased = engine.store.leases.of(record.upstream, record.uuid)
    return Box(
        record.name,
        record.bridge,
        record.namespace,
        (*(str(subnet.interface) for subnet in network.subnets), *_prefix(network, leased)),
        tuple(str(a) for a in leased.addresses if not is_placeholder(a)) or ("no address",),
        record.upstream,
        _forwards(engine, record),
    )


def _prefix(network: Network, leased: Leased) -> list[str]:
    """Return the gateway in the prefix that a network leases, unless its own XML has it."""
    prefix = leased.prefix
    if prefix is None or any(prefix.overlaps(subnet.network) for subnet in network.subnets):
        return []
    return [f"{prefix[1]}/{prefix.prefixlen}"]


def _forwards(engine: Engine, record: NetworkRecord) -> tuple[str, ...]:
    """Return the first forwards of a network, and the number of the others."""
    forwards = [
        f"{row.address or '*'}:{row.proto} {span_text(row.first, row.last or row.first)}"
        f" -> {row.guest or row.target}"
        if row.first
        else f"{row.address} -> {row.guest}"
        for row in forward_list.collect(engine, record.uuid, published=True)
    ]
    more = len(forwards) - MOST_FORWARDS
    return (*forwards[:MOST_FORWARDS], f"and {more} more") if more > 0 else tuple(forwards)


def _upstream(engine: Engine, name: str) -> tuple[str, str]:
    """Return an upstream's bridge, and its description."""
    upstream = engine.config.upstreams.get(name)
    if upstream is None:
        return "?", f"upstream {name}, which is no longer configured"
    said = f"upstream {name}" + (f", routed by {upstream.routed_by}" if upstream.routed_by else "")
    segment = segments.of_upstream(engine.store, upstream)
    if segment is None:
        said += "".join(f", {subnet}" for subnet in (upstream.subnet, upstream.subnet6) if subnet)
        return "?", said + _prefixes(upstream.prefixes6)
    said += ", by macvlan" if upstream.is_macvlan else ""
    for side in map(segment.side, FAMILIES):
        said += f", {side.subnet}" if side.subnet else ""
        said += f", gateway {side.gateway}" if side.gateway else ""
    return segment.bridge, said + _prefixes(segment.prefixes6)


def _prefixes(prefixes: tuple[IPv6Network, ...]) -> str:
    return f", prefixes {', '.join(map(str, prefixes))}" if prefixes else ""


def draw(picture: Picture, width: int = 80) -> str:
    """Return the picture as text; a row is broken where it would be wider than ``width``."""
    if not picture.boxes:
        return NONE
    parts = []
    ordered = sorted(picture.boxes, key=lambda box: (box.upstream, box.network))
    for name, group in groupby(ordered, key=lambda box: box.upstream):
        bridge, said = picture.upstreams[name]
        rows = ["\n".join(_row(row, bridge)) for row in _rows(list(group), width)]
        parts.append("\n\n".join(rows) + f"\n{GAP}({said})\n")
    return "\n".join(parts)


def _rows(boxes: Sequence[Box], width: int) -> Iterator[list[Box]]:
    row: list[Box] = []
    used = 0
    for box in boxes:
        if row and used + box.width > width:
            yield row
            row, used = [], 0
        row.append(box)
        used += box.width + len(GAP)
    yield row


def _row(boxes: Sequence[Box], bridge: str) -> Iterator[str]:
    yield _line(box.network.center(box.width) for box in boxes)
    yield _line("|".center(box.width) for box in boxes)
    yield _line(box.bridge.center(box.width) for box in boxes)
    yield _line("|".center(box.width) for box in boxes)
    yield _line(_edge(box) for box in boxes)
    height = max(len(box.content) for box in boxes)
    for number in range(height):
        yield _line(_content(box, number) for box in boxes)
    yield _line(_edge(box) for box in boxes)
    yield _line("|".center(box.width) for box in boxes)
    joined = "-" * len(GAP)
    yield joined.join("+".center(box.width, "-") for box in boxes) + f" {bridge}"


def _line(cells: Iterable[str]) -> str:
    return GAP.join(cells).rstrip()


def _edge(box: Box) -> str:
    return "+" + "+".center(box.width, "-")[1:-1] + "+"


def _content(box: Box, number: int) -> str:
    text = box.content[number] if number < len(box.content) else ""
    return f"| {text.ljust(box.width - 4)} |"
