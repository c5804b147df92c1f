# SPDX-License-Identifier: LGPL-2.1-or-later
"""The list of forwards: in force, waiting for an address, reserved for a guest that starts.

``forward_pending`` finds the forwards that are configured and not in force.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from libvirt_natns.addresses import bracketed
from libvirt_natns.cli import columns, json_text
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.publication.scopes import waits
from libvirt_natns.engine.publication.words import listening
from libvirt_natns.model.publication import Forward, PortSet, StaticNat
from libvirt_natns.spans import span_text

HEADINGS = ("GUEST", "NETWORK", "PROTO", "LISTEN", "TARGET", "SOURCES", "STATE")
NONE = "nothing is published: see virt-natns forward add"

ForwardState = Literal["published", "waiting", "reserved", "off", "later", "missing", "impossible"]
"""The first three are claimed; the others are configured only.

"off": the guest or network is off.  "later": from the guest's next start on.  "missing": it should
be in force.  "impossible": the guest has no NIC for it.
"""

BY_DHCP = "(by DHCP)"
"""Stands for a target that DHCP has not given yet."""

AUTO = "auto"
"""Stands for a port that has not been chosen yet."""


@dataclass(frozen=True, slots=True)
class ForwardRow:
    """A forward; ``proto`` is "address" for static NAT.

    ``guest`` and ``guest_uuid`` are None for a forward of the network itself.  ``address`` None
    means all addresses of the host.  Static NAT has no ports, but ``allowed`` may list the ports
    to which it is limited.

    A forward that is not in force may lack its ``target`` and, with start="auto", its ports
    ``first`` and ``last``.  ``reason`` says why it is not published; None for a forward that is.
    """

    guest: str | None
    guest_uuid: str | None
    network: str
    proto: str
    address: str | None
    first: int | None
    last: int | None
    target: str | None
    target_first: int | None
    target_last: int | None
    sources: tuple[str, ...]
    allowed: tuple[str, ...]
    state: ForwardState
    reason: str | None = None

    @property
    def is_claimed(self) -> bool:
        """True if the forward is in force, or holds its ports for a guest that starts."""
        return self.state in ("published", "waiting", "reserved")

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of its line in the table."""
        listen, target = self.address or "*", self.target or BY_DHCP
        if self.target_first is not None:
            listen = f"{bracketed(listen)}:{_ports(self.first, self.last)}"
        if self.target_first is not None and self.target_last is not None:
            target = f"{bracketed(target)}:{span_text(self.target_first, self.target_last)}"
        if self.allowed:
            listen += f" ({', '.join(self.allowed)})"
        sources = ", ".join(self.sources) or "any"
        return (self.guest or "-", self.network, self.proto, listen, target, sources, self.state)


def _ports(first: int | None, last: int | None) -> str:
    return AUTO if first is None or last is None else span_text(first, last)


def collect(
    engine: Engine, network: str | None = None, *, published: bool = False
) -> list[ForwardRow]:
    """Return all forwards and static NATs, or only those of the network with that uuid.

    A forward on an address that the host does not have now is waiting.  ``published`` leaves
    out the forwards that are reserved for a guest that is about to start.
    """
    store = engine.store
    in_force = {*store.claims.forwards(network), *store.claims.static_nats(network)}
    claims: list[Forward | StaticNat] = [*store.claims.static_nats(network, published=published)]
    claims += store.claims.forwards(network, published=published)
    guests = {record.uuid: record.name for record in store.guests.all()}
    networks = {record.uuid: record for record in store.networks.all()}
    kinds = {uuid: record.kind for uuid, record in networks.items()}
    present = engine.kernel.host.addresses.beyond_link() if claims else set()

    def state(claim: Forward | StaticNat) -> ForwardState:
        if claim not in in_force:
            return "reserved"
        there = isinstance(claim, StaticNat) or not waits(
            claim, kinds.get(claim.network, ""), present
        )
        return "published" if there else "waiting"

    named = {uuid: record.name for uuid, record in networks.items()}
    rows = [_row(claim, guests, named, state(claim)) for claim in claims]
    return ordered(rows)


def _row(
    claim: Forward | StaticNat,
    guests: dict[str, str],
    networks: dict[str, str],
    state: ForwardState,
) -> ForwardRow:
    own = claim.owner == claim.network
    forward = claim if isinstance(claim, Forward) else None
    static = claim if isinstance(claim, StaticNat) else None
    address = listening(claim.address)
    return ForwardRow(
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
        allowed=allowed_ports(static.ports if static else ()),
        state=state,
        reason=_reason(address, state),
    )


def _reason(address: str, state: ForwardState) -> str | None:
    if state == "waiting":
        return f"the host does not have {address} now"
    return "the guest is about to start" if state == "reserved" else None


def allowed_ports(limits: Iterable[PortSet]) -> tuple[str, ...]:
    """Return the ports to which static NAT is limited, in words."""
    return tuple(f"{limit.proto} {span_text(limit.first, limit.last)}" for limit in limits)


def text(rows: Sequence[ForwardRow]) -> str:
    """Return the rows as aligned columns, and a line for each reason why rows are not in force."""
    if not rows:
        return NONE
    reasons = dict.fromkeys(
        f"  # {row.state}: {row.reason}" for row in rows if row.reason and not row.is_claimed
    )
    return "\n".join([*columns.aligned([HEADINGS, *(row.cells for row in rows)]), *reasons])


def as_json(rows: Sequence[ForwardRow]) -> str:
    """Return an object with "forwards"."""
    return json_text.dumped({"forwards": [asdict(row) for row in rows]})


def ordered(rows: Iterable[ForwardRow]) -> list[ForwardRow]:
    """Return rows by guest and network."""
    return sorted(rows, key=lambda row: (row.guest or "", row.network))


def row_of(entry: Mapping[str, Any]) -> ForwardRow:
    """Return the row in an object of the list."""
    return ForwardRow(
        **{**entry, "sources": tuple(entry["sources"]), "allowed": tuple(entry["allowed"])}
    )


def compact(rows: Sequence[ForwardRow]) -> list[str]:
    """Return a line for each guest with its forwards."""
    forwards: dict[str, list[str]] = {}
    for row in rows:
        _, _, proto, listen, target, _, _ = row.cells
        waiting = f" (waits for {row.address})" if row.state == "waiting" else ""
        forwards.setdefault(row.guest or "network", []).append(
            f"{proto} {listen} -> {target}{waiting}"
        )
    return [f"{guest}: {', '.join(targets)}" for guest, targets in forwards.items()]
