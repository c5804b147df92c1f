# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes between two states, as the stream of ``watch`` has them: pure.

A state is the object of ``status --json``.  A part with entries changes entry by entry; any other
part is replaced as a whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NatnsState = Mapping[str, Any]

KEYS = {"networks": "uuid", "domains": "uuid", "upstreams": "name", "libvirt_networks": "uuid"}
"""The parts with entries, and the key that tells an entry from others."""

ORDER = {"networks": "network", "domains": "name", "upstreams": "name", "libvirt_networks": "name"}
"""The key by which the entries of a part are ordered."""

TICKING = frozenset({"lease_seconds"})
"""Keys of entries with a value that only the passing of time changes, which is no change."""


@dataclass(frozen=True, slots=True)
class StateChange:
    """``set`` has new and changed entries of parts, and other parts; ``removed`` has keys."""

    set: dict[str, Any]
    removed: dict[str, list[str]]


def between(old: NatnsState, new: NatnsState) -> StateChange | None:
    """Return the change from one state to another; None where nothing has changed."""
    changed: dict[str, Any] = {}
    removed: dict[str, list[str]] = {}
    for part, value in new.items():
        if part not in KEYS or value is None:
            if value != old.get(part):
                changed[part] = value
            continue
        before, after = _by_key(part, old.get(part)), _by_key(part, value)
        entries = [
            entry
            for key, entry in after.items()
            if key not in before or _lasting(entry) != _lasting(before[key])
        ]
        # An empty list after null says that the part is known from now on.
        if entries or old.get(part) is None:
            changed[part] = entries
        if gone := [key for key in before if key not in after]:
            removed[part] = gone
    return StateChange(changed, removed) if changed or removed else None


def applied(state: NatnsState, change: StateChange) -> dict[str, Any]:
    """Return the state after a change."""
    after = dict(state)
    for part in (*change.set, *(part for part in change.removed if part not in change.set)):
        value = change.set.get(part, [])
        if part not in KEYS or value is None:
            after[part] = value
            continue
        entries = _by_key(part, state.get(part)) | _by_key(part, value)
        for key in change.removed.get(part, ()):
            entries.pop(key, None)
        after[part] = sorted(entries.values(), key=lambda entry: str(entry[ORDER[part]]))
    return after


def _by_key(part: str, entries: list[dict[str, Any]] | None) -> dict[str, dict[str, Any]]:
    return {str(entry[KEYS[part]]): entry for entry in entries or ()}


def _lasting(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in TICKING}
