# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command uninstall: remove libvirt-natns from a machine in any state.

Each part is tried, and no part needs another.  A broken configuration, state database,
service or library does not keep hooks and the host's rules from being removed.
The part that needs a third-party library imports it.

Limit: without lxml or pyroute2, networks keep their namespaces until the library is back.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from libvirt_natns import names
from libvirt_natns.cli import chroot, firewalld_files, hook_files, scope
from libvirt_natns.daemons import libvirtd_reload
from libvirt_natns.errors import InstallError, RouterError, describe

if TYPE_CHECKING:
    from libvirt_natns.engine.engine import Engine
    from libvirt_natns.engine.reconcile.active import AskNetworks
    from libvirt_natns.engine.reconcile.repairs import Outcome
    from libvirt_natns.model.configuration import Config

T = TypeVar("T")

AGAIN = "fix that and run virt-natns uninstall again"


def run(ask: "AskNetworks", *, package: bool = False) -> None:
    """Remove the service, hooks, networks' namespaces, the host's rules and the state.

    For a package, the state stays, as do the service's units: these are the package
    manager's.  Prints what was removed.  Raises RouterError, and removes nothing, while a
    router is up.  Raises InstallError, at the end, for everything that could not be removed.
    """
    if chroot.is_chroot():
        _remove_files()
        print(f"virt-natns {chroot.SAID}")
    else:
        check_no_router()
        _take_down(ask, package=package)
    remove_state(package=package)


def _remove_files() -> None:
    """Remove the hooks and firewalld's files."""
    for file in hook_files.remove():
        print(f"removed {file}")
    _leave_firewalld()


def _take_down(ask: "AskNetworks", *, package: bool) -> None:
    """Remove all but the state.  Raises InstallError, at the end, for parts that stay."""
    removal = _Removal()
    # The service would repair the parts that are removed now.
    ended = removal.attempt(lambda: _end_service(package=package))
    if ended:
        print(ended)
    early = removal.attempt(
        lambda: _release(ask, renew=bool(libvirtd_reload.running())), again=True
    )
    installed = hook_files.installed()
    removal.attempt(hook_files.remove)
    for file in installed:
        if not hook_files.is_ours(file):
            print(f"removed {file}")
    # When libvirt reloads, it starts its own dnsmasq for the networks that were given back.
    # libvirt ignores a second signal while it reloads, so the networks come first.
    daemons = removal.attempt(libvirtd_reload.reload)
    if daemons:
        print(f"told {', '.join(daemons)}")
    # Networks may have started in between.
    late = removal.attempt(lambda: _release(ask, renew=False))
    if late is None or late.errors:
        removal.attempt(_remove_rules)
        removal.attempt(_end_relays)
    for outcome in filter(None, (early, late)):
        for name, what in outcome.repaired:
            print(f"{name}: {what}")
    removal.attempt(_leave_firewalld)
    problems = [*removal.problems, *(late.errors if late else [])]
    if problems:
        raise InstallError("; ".join(problems), AGAIN)


class _Removal:
    """Tries parts of the removal, and keeps their errors."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def attempt(self, part: Callable[[], T], *, again: bool = False) -> T | None:
        """Return the result of a part; None where it fails.

        With ``again``, the part is tried again later, and only a failure then counts.
        """
        try:
            return part()
        except Exception as error:  # an error must not keep the other parts
            line = describe(error)[0]
            if not again and line not in self.problems:
                self.problems.append(line)
        return None


def check_no_router() -> None:
    """Refuse to forget the journal that puts a host's NIC back.  Raises RouterError."""
    for file in sorted((names.STATE_DIRECTORY / "routers").glob("*.json")):
        raise RouterError(f"router {file.stem} is up", f"virt-natns router down {file.stem}")


def _end_service(*, package: bool) -> str | None:
    from libvirt_natns.cli import service_control

    return service_control.end(disable=not package)


def _leave_firewalld() -> None:
    for line in firewalld_files.remove():
        print(line)


def _release(ask: "AskNetworks", *, renew: bool) -> "Outcome":
    """Give the recorded networks back to libvirt, or else the networks that the kernel shows."""
    from libvirt_natns.engine.reconcile import release, repairs
    from libvirt_natns.errors import StoreError

    settings = _settings()
    try:
        with open_engine(settings, names.STATE_DIRECTORY) as engine:
            outcome = release.release_all(engine, ask, renew=renew)
        if not outcome.errors:
            return outcome
    except StoreError:
        outcome = repairs.Outcome([], [])
    with TemporaryDirectory(prefix="virt-natns-") as empty:
        with open_engine(settings, Path(empty)) as engine:
            rest = release.release_all(engine, ask, renew=renew)
    # The host may still have rules for networks with broken records.
    _remove_rules()
    return repairs.Outcome(outcome.repaired + rest.repaired, rest.errors)


@contextmanager
def open_engine(settings: "Config", directory: Path) -> "Iterator[Engine]":
    """Open an engine over the state in a directory."""
    from libvirt_natns.engine.engine import Engine
    from libvirt_natns.kernel.session import Kernel
    from libvirt_natns.state.store import Store

    with closing(Store(directory)) as store, Kernel() as kernel:
        yield Engine(settings, store, kernel)


def _settings() -> "Config":
    """Return the configuration; the defaults where it is wrong, as all networks are removed."""
    from libvirt_natns.documents import config
    from libvirt_natns.errors import ConfigError
    from libvirt_natns.model.configuration import Config

    try:
        return config.load()
    except ConfigError:
        return Config()


def _remove_rules() -> None:
    from libvirt_natns.firewall import host_firewall

    host_firewall.remove()


def _end_relays() -> None:
    from libvirt_natns.daemons import dns_relay

    for bridge in dns_relay.present():
        dns_relay.stop(bridge)


def remove_state(*, package: bool) -> None:
    """Remove the state, the run-time directory, and a configuration that we wrote.

    For a package, these go when it is purged, except the run-time directory.
    """
    shutil.rmtree(names.RUN_DIRECTORY, ignore_errors=True)
    if not package:
        shutil.rmtree(names.STATE_DIRECTORY, ignore_errors=True)
        scope.remove_written()
