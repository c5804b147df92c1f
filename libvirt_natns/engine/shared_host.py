# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs for the part of the host that networks share, and for the rules of routers."""

from functools import partial

from libvirt_natns.engine.context import Context
from libvirt_natns.engine.facts.host_needs import host_needs
from libvirt_natns.engine.host import zone
from libvirt_natns.engine.host.host import Host
from libvirt_natns.engine.observer import HOST
from libvirt_natns.upstream import routers


def of(context: Context) -> Host:
    """Return the shared part of the host."""
    planner = context.planner
    needs = partial(host_needs, planner)
    step, later = context.observer.step, context.later
    return Host(context.kernel, context.store, needs, planner.backend, step, later)


def ensure(context: Context, *, configured: bool = False) -> list[str]:
    """Make the host as the networks need it, and return what differed.

    With ``configured``, routers that are up follow today's configuration; else they
    stay as they came up.
    """
    with context.observer.changing(HOST):
        before = zone.bridges()
        differences = of(context).ensure() + _ensure_routers(context)
        repaired = routers.repair(
            context.config, context.kernel, context.store, configured=configured
        )
        return differences + repaired + zone.ensure(before)


def follow_forwarding(context: Context) -> None:
    """Let the host's rules drop only flows that the host forwards because of us alone."""
    with context.observer.changing(HOST):
        of(context).ensure()


def differences(context: Context) -> list[str]:
    """Return how the host differs from the networks' needs, in words."""
    host = of(context).differences() + zone.differences()
    return host + routers.differences(context.config, context.kernel, context.store)


def adjust(context: Context, uuid: str) -> None:
    """Make the host as the networks need it, where one network alone has come or changed."""
    host = of(context)
    if host.is_adjusted(uuid):
        host.leave()
    else:
        before = zone.bridges()
        with context.observer.changing(HOST):
            host.adjust(uuid)
            zone.follow(before)
    _ensure_routers(context)


def _ensure_routers(context: Context) -> list[str]:
    """Bring the rules of routers to the networks' forwards, and return what differed."""
    return routers.ensure(context.store, context.config, context.observer.step)
