# SPDX-License-Identifier: LGPL-2.1-or-later
"""How commands get at the machine: as root, with its engine, its routers and its libvirt."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from libvirt_natns import names
from libvirt_natns.daemons import libvirt
from libvirt_natns.documents import config
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.reconcile.active import Active, AskNetworks
from libvirt_natns.errors import LibvirtError, NatnsError, StoreError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.state import database
from libvirt_natns.state.database import SQLError
from libvirt_natns.state.store import Store
from libvirt_natns.upstream.router import client_networks
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle

Engines = Callable[..., AbstractContextManager[Engine]]
"""Opens an engine, as ``engine`` does."""


def require_root() -> None:
    """Raise NatnsError for a user other than root."""
    if os.geteuid() != 0:
        raise NatnsError("only root can do this", "use sudo")


@contextmanager
def engine(settings: Config | None = None, *, look_only: bool = False) -> Iterator[Engine]:
    """Open the engine over the machine's state; ``settings`` default to the configuration.

    ``look_only`` makes no state database where there is none.
    """
    require_root()
    with ExitStack() as cleanup:
        directory = names.STATE_DIRECTORY
        database.check_there(directory)
        if look_only and not (directory / "state.db").exists():
            directory = Path(cleanup.enter_context(TemporaryDirectory(prefix="virt-natns-")))
        settings = settings or config.load()
        store = Store(directory)
        cleanup.callback(store.close)
        yield Engine(settings, store, cleanup.enter_context(Kernel()))


@contextmanager
def machine() -> Iterator[RouterLifecycle]:
    """Open the verbs of routers, also where configuration or state database cannot be read."""
    require_root()
    settings, faults = Config(), list[NatnsError]()
    try:
        settings = config.load()
    except (NatnsError, OSError, ValueError) as error:
        faults.append(_as_fault(error, str(names.CONFIG_FILE)))
    with ExitStack() as cleanup:
        try:
            verbs = cleanup.enter_context(engine(settings, look_only=True))
        except (NatnsError, OSError, SQLError) as error:
            faults.append(_as_fault(error, str(names.STATE_DIRECTORY / "state.db")))
            yield _bare_machine(settings, cleanup.enter_context(Kernel()), faults)
            return
        store = verbs.store
        yield RouterLifecycle(
            verbs.config,
            verbs.kernel,
            partial(client_networks.needs, store, verbs.config),
            partial(client_networks.users, store),
            partial(client_networks.reattach, store, verbs.repair_unless_changed),
            tuple(faults),
        )


def _as_fault(error: Exception, where: str) -> NatnsError:
    return error if isinstance(error, NatnsError) else NatnsError(f"cannot read {where}: {error}")


def _bare_machine(settings: Config, kernel: Kernel, faults: list[NatnsError]) -> RouterLifecycle:
    """Return the verbs without the database.  Only the database knows a router's networks."""

    def unknown(*_: object) -> NoReturn:
        raise StoreError(faults[-1].fact, faults[-1].remedy)

    return RouterLifecycle(settings, kernel, unknown, unknown, unknown, tuple(faults))


# -- libvirt -----------------------------------------------------------------


def network_asker(*, wake: bool = True) -> AskNetworks:
    """Return a function that asks libvirt for its active networks.

    The function says once that libvirt does not answer, and returns None then.  ``wake`` False
    starts no daemon that sleeps.
    """
    failures: list[LibvirtError] = []

    def ask() -> Active | None:
        try:
            return libvirt.active_networks(wake=wake)
        except LibvirtError as error:
            if not failures:
                print(
                    f"virt-natns: {error}: networks with a bridge count as active", file=sys.stderr
                )
            failures.append(error)
        return None

    return ask


def active_guests(*, wake: bool = True) -> libvirt.ActiveDomains | None:
    """Return the guests that run; None where libvirt does not answer."""
    with suppress(LibvirtError):
        return libvirt.active_domains(wake=wake)
    return None
