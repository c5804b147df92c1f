# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking libvirt-natns off a machine, whatever of it is broken.

Each part is tried, and none needs another one: hooks and the host's rules go also
where the configuration, the state database, the service or a library is broken.
All that is not in the standard library is imported by the part that needs it.

Limit: without lxml or pyroute2, networks keep their namespaces until it is there again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from libvirt_natns import names
from libvirt_natns.cli import install
from libvirt_natns.errors import InstallError, RouterError, describe

if TYPE_CHECKING:
    from libvirt_natns.engine.engine import Engine
    from libvirt_natns.engine.reconcile import Outcome
    from libvirt_natns.model.configuration import Config

Ask = Callable[[], Mapping[str, bytes] | None]
"""Asks libvirt for its active networks; None where it does not answer."""

T = TypeVar("T")

AGAIN = "fix that and run virt-natns uninstall again"


def run(ask: Ask) -> None:
    """Remove service, hooks, networks' namespaces, the host's rules and the state.

    Prints what was removed.  Raises RouterError, and removes nothing, while a router
    is up; InstallError, at the end, for all that could not be removed.
    """
    check_no_router()
    removal = _Removal()
    # It would bring back what goes now.
    ended = removal.attempt(_end_service)
    if ended:
        print(ended)
    early = removal.attempt(lambda: _release(ask, renew=bool(install.daemons())), again=True)
    found = install.installed_hooks()
    removal.attempt(install.remove_hooks)
    for file in found:
        if not install.is_ours(file):
            print(f"removed {file}")
    # For what it has got back, libvirt now starts its own dnsmasq again: it heeds
    # no second signal while it reloads, so the networks have gone first.
    told = removal.attempt(install.reload_daemons)
    if told:
        print(f"told {', '.join(told)}")
    # What was started in between.
    late = removal.attempt(lambda: _release(ask, renew=False))
    if late is None or late.errors:
        removal.attempt(_remove_rules)
    for outcome in filter(None, (early, late)):
        for name, what in outcome.repaired:
            print(f"{name}: {what}")
    problems = [*removal.problems, *(late.errors if late else [])]
    if problems:
        raise InstallError("; ".join(problems), AGAIN)
    install.remove_state()


class _Removal:
    """Tries parts of the removal, and keeps what went wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def attempt(self, part: Callable[[], T], *, again: bool = False) -> T | None:
        """Return what a part returns; None where it fails.

        ``again``: it is tried again later, and only that failure counts.
        """
        try:
            return part()
        except Exception as error:  # whatever is broken, the other parts must go
            line = describe(error)[0]
            if not again and line not in self.problems:
                self.problems.append(line)
        return None


def check_no_router() -> None:
    """Refuse to forget what puts a host's NIC back.  Raises RouterError."""
    for file in sorted((names.STATE_DIRECTORY / "routers").glob("*.json")):
        raise RouterError(f"router {file.stem} is up", f"virt-natns router down {file.stem}")


def _end_service() -> str | None:
    from libvirt_natns.cli import service_control

    return service_control.end()


def _release(ask: Ask, *, renew: bool) -> "Outcome":
    """Give the networks back to libvirt: the recorded ones, or else what the kernel shows."""
    from libvirt_natns.engine import reconcile
    from libvirt_natns.errors import StoreError

    settings = _settings()
    try:
        with _engine(settings, names.STATE_DIRECTORY) as engine:
            outcome = reconcile.release(engine, ask, renew=renew)
        if not outcome.errors:
            return outcome
    except StoreError:
        outcome = reconcile.Outcome([], [])
    with TemporaryDirectory(prefix="virt-natns-") as empty:
        with _engine(settings, Path(empty)) as engine:
            rest = reconcile.release(engine, ask, renew=renew)
    # What the records of broken networks name may still be in the host.
    _remove_rules()
    return reconcile.Outcome(outcome.repaired + rest.repaired, rest.errors)


@contextmanager
def _engine(settings: "Config", directory: Path) -> "Iterator[Engine]":
    from libvirt_natns.engine.engine import Engine
    from libvirt_natns.kernel.session import Kernel
    from libvirt_natns.state.store import Store

    with closing(Store(directory)) as store, Kernel() as kernel:
        yield Engine(settings, store, kernel)


def _settings() -> "Config":
    """The configuration; where it is wrong, all networks go whatever it says."""
    from libvirt_natns.documents import config
    from libvirt_natns.errors import ConfigError
    from libvirt_natns.model.configuration import Config

    try:
        return config.load()
    except ConfigError:
        return Config()


def _remove_rules() -> None:
    from libvirt_natns.firewall import host

    host.remove()
