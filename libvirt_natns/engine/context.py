# SPDX-License-Identifier: LGPL-2.1-or-later
"""Context that all verbs share: configuration, state database, kernel session.

A network's own lock is taken before the host's, and never two networks' at once.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from libvirt_natns import names
from libvirt_natns.engine.facts.planner import Planner
from libvirt_natns.engine.observer import NOBODY, Observer, tell
from libvirt_natns.engine.operations.operation import Step
from libvirt_natns.engine.prebuilt import Built
from libvirt_natns.engine.publication.allocation import Allocation
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.locks import LIMIT, locked
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.records import dataclass, replace
from libvirt_natns.state.networks import State
from libvirt_natns.state.store import Store


@dataclass(frozen=True, slots=True)
class Context:
    """A configuration, a state database and a kernel session.

    ``before`` is called ahead of each change, for tests.  ``observer`` hears of each
    change.  A resident process has a ``later`` for work that its caller need not wait for.
    Its ``built`` has the networks that were built ahead.
    """

    config: Config
    store: Store
    kernel: Kernel
    before: Step | None = None
    observer: Observer = NOBODY
    later: Later = at_once
    built: Built | None = None

    @property
    def planner(self) -> Planner:
        return Planner(self.config, self.store, self.kernel)

    @property
    def choices(self) -> Allocation:
        return Allocation(self.config, self.store, self.kernel, self.observer)

    def waiting(self) -> Self:
        """Return the same context, for a caller that waits for all work."""
        return replace(self, later=at_once, built=None)

    def step(self, what: str) -> None:
        """Call ``before`` ahead of a change that is no operation of a plan."""
        if self.before is not None:
            self.before(what)

    def state(self, uuid: str) -> State:
        """Return a network's recorded state; a state from before a reboot counts as "down"."""
        record = self.store.networks.get(uuid)
        return record.state if record and record.this_boot else "down"

    @contextmanager
    def changing(
        self, verb: str, uuid: str, name: str, limit: float = LIMIT
    ) -> Iterator[list[str]]:
        """Hold a network's lock for the body, which lists its changes in the yielded list."""
        changed: list[str] = []
        directory = names.network_directory(uuid)
        with locked(directory, limit), self.observer.changing(uuid), self.kernel.work():
            # Others may have changed the network until its lock was free.
            self.kernel.forget()
            start = time.monotonic()
            try:
                yield changed
            finally:
                self.discard_lock(uuid)
            taken = time.monotonic() - start
        tell(self.observer, verb, name, changed, taken)

    def discard_lock(self, uuid: str) -> None:
        """Remove the directory of a network that is down: it was made for the lock alone."""
        if self.state(uuid) == "down":
            discard_directory(uuid)


def empty_directory(uuid: str) -> None:
    """Remove a network's run-time files, but not the directory, which holds its lock."""
    directory = names.network_directory(uuid)
    for file in directory.iterdir() if directory.is_dir() else ():
        file.unlink(missing_ok=True)


def discard_directory(uuid: str) -> None:
    """Remove a network's run-time directory, and the parent after the last network's."""
    directory = names.network_directory(uuid)
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        directory.parent.rmdir()
