# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command watch, and status --watch: changes as the service tells them.

The service pushes, as it hears of libvirt and the kernel already.  The client polls nothing.
Without the service there is no stream.  A command that polled would cost as much as the service
for each watcher, and would hide that the service is missing.

A service that restarts comes back within seconds.  The client connects again then, and the stream
goes on with the whole state.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

from libvirt_natns.cli import json_text, look_client, state_changes, status_report, watch_lines
from libvirt_natns.cli.look_client import LookLostError, ReaderGoneError
from libvirt_natns.cli.state_changes import StateChange
from libvirt_natns.errors import NatnsError

RESTART_LIMIT = 30.0
"""Seconds in which a service that restarts comes back."""

RESTART_POLL = 0.5
"""Seconds between two attempts to connect."""

CLEAR = "\x1b[H\x1b[2J\x1b[3J"


def run(options: argparse.Namespace) -> int:
    """Print the state and then each change, a line each, until it is interrupted."""
    state: dict[str, Any] = {}
    for event in _events():
        if options.json:
            _say(json_text.dumped({k: v for k, v in event.items() if k != "version"}, line=True))
            continue
        after = _after(state, event)
        for line in watch_lines.of(state, after, event):
            _say(line)
        state = after
    return 0


def show(named: str | None) -> int:
    """Print the status of all networks, or of one, at each change until it is interrupted."""
    state: dict[str, Any] = {}
    for event in _events():
        if event["event"] == "error":
            _draw(f"virt-natns: {event['error']}")
            continue
        state = _after(state, event)
        _draw(status_report.text(status_report.report_of(state, named)))
    return 0


def _events() -> Iterator[dict[str, Any]]:
    """Yield the lines of the stream, also over a restart of the service.

    Raises ServiceError where no service runs, or none comes back.
    """
    lost: float | None = None
    seen = False
    while True:
        try:
            for event in look_client.stream():
                lost, seen = None, True
                yield event
        except ReaderGoneError:
            return
        except LookLostError:
            if not seen:
                raise
        now = time.monotonic()
        lost = now if lost is None else lost
        if now - lost > RESTART_LIMIT:
            raise NatnsError(
                f"the service has ended, and did not come back in {RESTART_LIMIT:.0f} s",
                look_client.START,
            )
        time.sleep(RESTART_POLL)


def _after(state: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    """Return the state after a line of the stream."""
    if event["event"] == "state":
        return dict(event["state"])
    if event["event"] == "change":
        return state_changes.applied(state, StateChange(event["set"], event["removed"]))
    return state


def _draw(text: str) -> None:
    # A file or a pipe gets one table after the other.
    _say(f"{CLEAR}{text}" if sys.stdout.isatty() else f"{text}\n")


def _say(text: str) -> None:
    print(text, flush=True)
