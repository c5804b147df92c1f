# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lines for people about changes of the state: pure.

A line begins with the time and the thing that has changed.
"""

import time
from collections.abc import Iterator
from typing import Any

from libvirt_natns.cli.state_changes import KEYS, ORDER
from libvirt_natns.values import quoted

WatchedState = dict[str, Any]

FINDINGS = {
    "missed": ("network", "difference"),
    "guests": ("guest", "difference"),
    "waiting": ("network", "reason"),
}
"""Parts with lists of findings, and the keys of a finding's subject and text."""

LINES = ("host", "stops", "notes")
"""Parts with lists of lines about the host."""


def of(before: WatchedState, after: WatchedState, event: dict[str, Any]) -> Iterator[str]:
    """Yield the lines about an event of the stream, between the states before and after it."""
    at = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    if event["event"] == "error":
        yield f"{at} state unknown: {event['error']}"
    else:
        yield from (f"{at} {line}" for line in _lines(before, after))


def _lines(before: WatchedState, after: WatchedState) -> Iterator[str]:
    for part, describe in (("networks", _network), ("domains", _guest)):
        yield from _entries(part, describe, before.get(part), after.get(part))
    earlier, later = (_forwards(state) for state in (before, after))
    yield from (f"forward {line}" for line in later if line not in earlier)
    yield from (f"forward {line}: gone" for line in earlier if line not in later)
    for part in (*LINES, *FINDINGS):
        former, present = (_texts(part, state) for state in (before, after))
        yield from (line for line in present if line not in former)
        yield from (f"{line}: no more" for line in former if line not in present)
    if before.get("service") != after.get("service"):
        yield f"service: {(after.get('service') or {}).get('state')}"


def _entries(part: str, describe: Any, old: Any, new: Any) -> Iterator[str]:  # noqa: ANN401
    key = KEYS[part]
    former = {entry[key]: describe(entry) for entry in old or ()}
    for entry in new or ():
        line = describe(entry)
        if former.pop(entry[key], None) != line:
            yield line
    names = {entry[key]: entry[ORDER[part]] for entry in old or ()}
    for gone in former:
        if gone not in {entry[key] for entry in new or ()}:
            yield f"{'network' if part == 'networks' else 'guest'} {quoted(names[gone])}: gone"


def _network(entry: dict[str, Any]) -> str:
    address = f", {entry['address']}" if entry["address"] else ""
    leases = [f"{lease['mac']} {lease['address']}" for lease in entry["dhcp_leases"]]
    leased = f", leases {'; '.join(leases)}" if leases else ""
    state, health = entry["state"], entry["health"]
    said = state if health == state else f"{state}, {health}"
    return f"network {quoted(entry['network'])}: {said}{address}{leased}"


def _guest(entry: dict[str, Any]) -> str:
    return f"guest {quoted(entry['name'])}: {'running' if entry['running'] else 'off'}"


def _forwards(state: WatchedState) -> list[str]:
    """Return the forwards of a state in words."""
    return [
        f"of {quoted(row['guest'] or row['network'])}: {row['proto']} {row['address'] or '*'}"
        + (f":{row['first']}" if row["first"] else "")
        + f" -> {row['target'] or 'its DHCP address'}, {row['state']}"
        for row in state.get("forwards") or ()
    ]


def _texts(part: str, state: WatchedState) -> list[str]:
    entries = state.get(part) or ()
    if part in LINES:
        return [f"host: {entry}" for entry in entries]
    subject, text = FINDINGS[part]
    return [f"{entry[subject]}: {entry[text]}" for entry in entries]
