# SPDX-License-Identifier: LGPL-2.1-or-later
"""The health of routers: how they differ from their records and the configuration."""

from contextlib import suppress
from typing import Literal

from libvirt_natns.errors import LockError, StoreError
from libvirt_natns.model.configuration import Config
from libvirt_natns.operations.carry_out import plan_differences
from libvirt_natns.upstream.router import journal, nic_lease, preflight, recover, router_files
from libvirt_natns.upstream.router.journal import RouterRecord
from libvirt_natns.upstream.router.lifecycle import PORTS_DIFFER, RouterLifecycle

Health = Literal["down", "half-done", "overdue", "unconfirmed", "up", "damaged"]


def of(verbs: RouterLifecycle, name: str) -> tuple[Health, RouterRecord | None, list[str]]:
    """Return how a router is, its record, and in words what differs."""
    try:
        record = journal.load(name)
    except StoreError as error:
        return "damaged", None, [str(error)]
    if record is None and recover.is_lost(name):
        return "damaged", None, [f"the journal of router {name} is missing"]
    if record is None or not record.this_boot:
        return "down", None, []
    if not record.is_whole:
        return "half-done", record, []
    if record.is_overdue:
        return "overdue", record, []
    differing = _differences(verbs, name)
    if differing:
        # Work that goes on changes settings for a moment: a lease that comes into force does.
        with suppress(LockError), router_files.lock():
            verbs.kernel.distrust()
            differing = _differences(verbs, name)
    if differing:
        return "damaged", record, differing
    return ("up" if record.deadline is None else "unconfirmed"), record, []


def _differences(verbs: RouterLifecycle, name: str) -> list[str]:
    try:
        return differences(verbs, name)
    except StoreError as error:
        # The needs of its networks stand in the database.
        return [str(error)]


def differences(verbs: RouterLifecycle, name: str) -> list[str]:
    """Return in words how a router that is up differs from what it should be."""
    record = journal.load(name)
    if record is None or not record.is_whole:
        return []
    with verbs.kernel.work():
        plan = verbs.plan(record)
        differing = plan_differences(verbs.kernel, [step.operation for step in plan])
    wanted = verbs.config.routers.get(name)
    if wanted is not None and preflight.ports(wanted) != record.target.ports:
        differing.append(PORTS_DIFFER)
    return differing + unapplied(verbs.config, name)


def all_differences(verbs: RouterLifecycle) -> list[str]:
    """Return in words how all routers that are up differ from what they should be."""
    differing = [
        f"router {record.target.name}: {line}"
        for record in journal.load_all()
        for line in (
            *differences(verbs, record.target.name),
            *nic_lease.left_out(record.target),
        )
    ]
    return differing + [f"router {name}: {error}" for name, error in journal.damaged().items()]


def repair_all(verbs: RouterLifecycle, *, configured: bool = False) -> list[str]:
    """Repair all routers that are up; returns what differed.  Raises a NatnsError.

    ``configured``: an administrator asks, so changed ``host_ports`` come into force.
    """
    repaired = []
    for record in journal.load_all():
        name = record.target.name
        if record.is_whole and not record.is_overdue and differences(verbs, name):
            done = verbs.repair(name, configured=configured)
            repaired += [f"router {name}: {line}" for line in done]
    return repaired


def unapplied(config: Config, name: str) -> list[str]:
    """Return the changes of the configuration that only a router made anew can have."""
    record, wanted = journal.load(name), config.routers.get(name)
    if record is None or not record.is_whole or wanted is None:
        return []
    return preflight.unapplied(wanted, record.target, record.before)
