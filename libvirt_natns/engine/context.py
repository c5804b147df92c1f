# SPDX-License-Identifier: LGPL-2.1-or-later
"""Context that all verbs share: configuration, state database, kernel session.

A network's own lock is taken before the host's, and never two networks' at once.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Self

from libvirt_natns import names
from libvirt_natns.engine.facts.planner import Planner
from libvirt_natns.engine.former_names import renamed
from libvirt_natns.engine.network_record import state_of
from libvirt_natns.engine.observer import NOBODY, Observer, tell
from libvirt_natns.engine.prebuilt import Built
from libvirt_natns.engine.publication.allocation import Allocation
from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.locks import LIMIT, locked
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.state.store import Store


@dataclass(slots=True)
class Change:
    """A verb's work under a network's lock.

    ``record`` is the network's row as it was read under the lock.  ``lines`` are the
    changes, in words.  ``discards``: the network is down, so its directory was made for
    the lock alone, and goes with the lock.
    """

    record: NetworkRecord | None
    lines: list[str]
    discards: bool

    @property
    def state(self) -> NetworkState:
        """The network's state as it was read."""
        return state_of(self.record)


@dataclass(frozen=True, slots=True)
class Context:
    """A configuration, a state database and a kernel session.

    ``observer`` hears of each change.  A resident process has a ``later`` for work that its
    caller need not wait for.  Its ``built`` has the networks that were built ahead.
    """

    config: Config
    store: Store
    kernel: Kernel
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

    def state(self, uuid: str) -> NetworkState:
        """Return a network's recorded state; a state from before a reboot counts as "down"."""
        return state_of(self.store.networks.get(uuid))

    @contextmanager
    def changing(
        self, verb: str, uuid: str, name: str = "", limit: float = LIMIT
    ) -> Iterator[Change]:
        """Hold a network's lock for the body, which gets the network's row and lists its changes.

        The row's name serves in place of an empty ``name``.
        """
        with (
            locked(names.network_directory(uuid), limit),
            self.observer.changing(uuid),
            self.kernel.work(),
        ):
            # Others may have changed the network until its lock was free.
            self.kernel.distrust()
            start = time.monotonic()
            change = self._read(uuid)
            try:
                yield change
            except BaseException:
                self.discard_lock(uuid)
                raise
            if change.discards:
                discard_directory(uuid)
            taken = time.monotonic() - start
        recorded = change.record.name if change.record else uuid
        tell(self.observer, verb, name or recorded, change.lines, taken)

    def _read(self, uuid: str) -> Change:
        try:
            record = self.store.networks.get(uuid)
            if record is not None:
                record = renamed(self.kernel, self.store, record)
        except NatnsError:
            directory = names.network_directory(uuid)
            with suppress(OSError):
                # Only a directory that was made for the lock is empty.
                directory.rmdir()
                directory.parent.rmdir()
            raise
        return Change(record, [], state_of(record) == "down")

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
