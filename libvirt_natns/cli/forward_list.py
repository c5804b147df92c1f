# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is published, or held for a guest that is about to start, as rows."""

import json
from collections.abc import Sequence
from typing import Literal

from libvirt_natns.addresses import bracketed
from libvirt_natns.engine.forwards import listening, ports
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.records import asdict, dataclass
from libvirt_natns.state.store import Store

HEADINGS = ("GUEST", "NETWORK", "PROTO", "LISTEN", "TARGET", "SOURCES", "STATE")
NONE = "nothing is published: see virt-natns forward add"

State = Literal["published", "reserved"]


@dataclass(frozen=True, slots=True)
class Row:
    """A forward; ``proto`` is "address" for an upstream address of a guest's own.

    ``guest`` and ``guest_uuid`` are None where it is the network's own.  An
    address None means all of the host's.  An address of a guest's own has no
    ports, but maybe those that it is limited to in ``allowed``.
    """

    guest: str | None
    guest_uuid: str | None
    network: str
    proto: str
    address: str | None
    first: int | None
    last: int | None
    target: str
    target_first: int | None
    target_last: int | None
    sources: tuple[str, ...]
    allowed: tuple[str, ...]
    state: State

    @property
    def cells(self) -> tuple[str, ...]:
        """What the table shows."""
        listen, target = self.address or "*", self.target
        if self.first is not None and self.last is not None:
            listen = f"{bracketed(listen)}:{ports(self.first, self.last)}"
        if self.target_first is not None and self.target_last is not None:
            target = f"{bracketed(target)}:{ports(self.target_first, self.target_last)}"
        if self.allowed:
            listen += f" ({', '.join(self.allowed)})"
        sources = ", ".join(self.sources) or "any"
        return (self.guest or "-", self.network, self.proto, listen, target, sources, self.state)


def collect(store: Store, network: str | None = None, *, published: bool = False) -> list[Row]:
    """All forwards and addresses, or those of the network with that uuid.

    ``published`` leaves out what is held for a guest that is about to start.
    """
    in_force = {*store.claims.forwards(network), *store.claims.static_nats(network)}
    claims: list[Forward | StaticNat] = [*store.claims.static_nats(network, published=published)]
    claims += store.claims.forwards(network, published=published)
    guests = {record.uuid: record.name for record in store.guests.all()}
    networks = {record.uuid: record.name for record in store.networks.all()}
    rows = [
        _row(each, guests, networks, "published" if each in in_force else "reserved")
        for each in claims
    ]
    return sorted(rows, key=lambda row: (row.guest or "", row.network))


def _row(
    claim: Forward | StaticNat, guests: dict[str, str], networks: dict[str, str], state: State
) -> Row:
    own = claim.owner == claim.network
    forward = claim if isinstance(claim, Forward) else None
    static = claim if isinstance(claim, StaticNat) else None
    limits = static.ports if static else ()
    address = listening(claim.address)
    return Row(
        guest=None if own else guests.get(claim.owner, claim.owner),
        guest_uuid=None if own else claim.owner,
        network=networks.get(claim.network, claim.network),
        proto=forward.proto if forward else "address",
        address=None if address == "*" else address,
        first=forward.first if forward else None,
        last=forward.last if forward else None,
        target=str(claim.target),
        target_first=forward.to if forward else None,
        target_last=forward.to_last if forward else None,
        sources=tuple(map(str, forward.sources)) if forward else (),
        allowed=tuple(f"{each.proto} {ports(each.first, each.last)}" for each in limits),
        state=state,
    )


def text(rows: Sequence[Row]) -> str:
    """The rows as aligned columns."""
    if not rows:
        return NONE
    cells = [HEADINGS, *(row.cells for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def as_json(rows: Sequence[Row]) -> str:
    """The same for programs: an object with "forwards"."""
    return json.dumps({"forwards": [asdict(row) for row in rows]}, indent=2)


def compact(rows: Sequence[Row]) -> list[str]:
    """A line for each guest: what it publishes, and where that leads."""
    found: dict[str, list[str]] = {}
    for row in rows:
        _, _, proto, listen, target, _, _ = row.cells
        found.setdefault(row.guest or "network", []).append(f"{proto} {listen} -> {target}")
    return [f"{guest}: {', '.join(told)}" for guest, told in found.items()]
