# SPDX-License-Identifier: LGPL-2.1-or-later
"""check and sync: what was recorded against what the kernel and libvirt show.

Neither calls libvirt: the caller asks it and hands over what is active.
"""

from collections.abc import Callable, Mapping
from functools import partial

from libvirt_natns import document, executor, host
from libvirt_natns.engine import Engine
from libvirt_natns.errors import NatnsError
from libvirt_natns.selection import verdict
from libvirt_natns.store import Record, now

STALLED = 30.0
"""Seconds after which a start that came to no end counts as dead."""

Active = Mapping[str, bytes]
"""Networks that libvirt has active: their XML by uuid."""

Finding = tuple[str, str]
"""A network's name ("host" for what they share), and what is to be said of it."""


def differences(engine: Engine, record: Record) -> list[str]:
    """How the kernel differs from what a network that is up needs, in words."""
    if record.state != "up":
        return []
    try:
        network = document.parse_network(record.document)
        upstream = engine.planner.upstream(network)
        address = engine.store.lease(upstream.name, record.uuid)
        if address is None:
            return [f"no address of upstream {upstream.name} is leased"]
        plan = engine.planner.plan(network, upstream, address)
        return executor.differences(engine.kernel, plan)
    except NatnsError as error:
        return [str(error)]


def host_differences(engine: Engine) -> list[str]:
    """The same for what the networks share in the host."""
    try:
        return host.differences(engine.kernel, engine.planner.host_needs())
    except NatnsError as error:
        return [str(error)]


def missed(engine: Engine, active: Active) -> list[Finding]:
    """Starts and stops that no hook told of."""
    up = {record.uuid: record.name for record in engine.store.networks("up")}
    found = [
        (name, "is up, but not active in libvirt") for u, name in up.items() if u not in active
    ]
    for uuid, xml in active.items():
        if uuid not in up and _is_ours(engine, xml):
            name = document.parse_network(xml).name
            found.append((name, "is active in libvirt, but has no namespace"))
    return found


def sync(engine: Engine, active: Active | None) -> list[Finding]:
    """Repair everything; returns what was wrong.

    ``active`` is what libvirt runs; None where it cannot be asked: then a
    network whose bridge is there counts as active.  What is well is not
    touched.  Errors are raised together, after all that can be repaired was.
    """
    found: list[Finding] = []
    errors: list[str] = []
    for name, step in _steps(engine, active):
        try:
            found += [(name, what) for what in step()]
        except NatnsError as error:
            errors.append(str(error))
    if errors:
        raise NatnsError("; ".join(errors))
    return found


def _steps(engine: Engine, active: Active | None) -> list[tuple[str, Callable[[], list[str]]]]:
    steps: list[tuple[str, Callable[[], list[str]]]] = []
    running = {} if active is None else dict(active)
    for record in engine.store.networks("preparing", "starting", "up"):
        if not _is_active(engine, record, active):
            steps.append((record.name, partial(_end, engine, record)))
        elif active is None:
            running[record.uuid] = record.document
    for xml in running.values():
        steps.append((_name(xml), partial(_repair, engine, xml)))
    steps.append(("host", partial(host.ensure, engine.kernel, engine.planner.host_needs)))
    return steps


def _is_active(engine: Engine, record: Record, active: Active | None) -> bool:
    unfinished = record.state in ("preparing", "starting") and record.this_boot
    if unfinished and now() - record.since < STALLED:
        return True
    if active is not None:
        return record.uuid in active
    return engine.kernel.link(None, record.bridge) is not None


def _name(xml: bytes) -> str:
    try:
        return document.parse_network(xml).name
    except NatnsError:
        return "?"


def _end(engine: Engine, record: Record) -> list[str]:
    engine.down(record.uuid)
    return ["was not active any more, and was removed"]


def _repair(engine: Engine, xml: bytes) -> list[str]:
    network = document.parse_network(xml)
    record = engine.store.network(network.uuid)
    state = record.state if record and record.this_boot else None
    if state in ("preparing", "starting") and record and now() - record.since < STALLED:
        return []
    if state != "up" and not _is_ours(engine, xml):
        return []
    return engine.up(network, xml)


def _is_ours(engine: Engine, xml: bytes) -> bool:
    try:
        return verdict(document.parse_network(xml), engine.config).handled
    except NatnsError:
        return False
