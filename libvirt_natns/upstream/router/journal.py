# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal of a router: each change of the host is written down before it is made.

A router's file has all that is known: the NIC before the router, the router's target, the last
step that was begun, and the deadline of the confirmation.  A kill leaves the file, and the next
command for the router puts everything back by it.

A damaged file is put aside by the verbs that can go on without it (``recover``); for all
others it is a RouterFileError.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from libvirt_natns import names
from libvirt_natns.errors import StoreError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.upstream.router import nic_snapshot, router_files
from libvirt_natns.upstream.router.host_resolv_conf import Resolver
from libvirt_natns.upstream.router.nic_snapshot import Capture, known_fields
from libvirt_natns.upstream.router.target import Target

RouterState = Literal["going up", "up", "going down"]


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """A router, as far as it has come.

    ``before`` and ``resolver`` are the NIC and resolv.conf before the router.  ``step`` was
    begun last.  ``deadline``, in seconds since boot, is when an unconfirmed router is taken
    back; None for a router that need not be confirmed.
    """

    target: Target
    before: Capture
    resolver: Resolver
    state: RouterState
    boot: str
    step: str = ""
    deadline: float | None = None

    @property
    def this_boot(self) -> bool:
        return self.boot == boot_id()

    @property
    def is_whole(self) -> bool:
        """True if the router came up, and its way down has not begun."""
        return self.state == "up" and self.this_boot

    @property
    def is_overdue(self) -> bool:
        """True if the router should have been taken back by now."""
        if self.deadline is None:
            return False
        return not self.this_boot or boot_clock.now() >= self.deadline


def load(name: str) -> RouterRecord | None:
    """Return the record of a router; None where nothing was begun.

    Raises RouterFileError for a damaged file, StoreError where the file cannot be read.
    """
    return _load(names.router_file(name, "json"))


def _load(file: Path) -> RouterRecord | None:
    data = router_files.read(file)
    if data is None:
        return None
    try:
        fields = known_fields(RouterRecord, data)
        fields["target"] = Target.from_object(fields["target"])
        fields["before"] = nic_snapshot.from_object(fields["before"])
        fields["resolver"] = Resolver(**known_fields(Resolver, fields["resolver"]))
        if fields["state"] not in get_args(RouterState):
            raise ValueError("an unknown state")
        return RouterRecord(**fields)
    except router_files.WRONG as error:
        raise router_files.broken(file) from error


def load_all() -> list[RouterRecord]:
    """Return all records that can be read, by name.

    A damaged record concerns its own router alone.
    """
    records = []
    for file in sorted(router_files.directory().glob("*.json")):
        with suppress(StoreError):
            record = _load(file)
            if record is not None:
                records.append(record)
    return records


def damaged() -> dict[str, StoreError]:
    """Return why records cannot be read, by the stem of their files."""
    errors = {}
    for file in sorted(router_files.directory().glob("*.json")):
        try:
            _load(file)
        except StoreError as error:
            errors[file.stem] = error
    return errors


def known_names() -> list[str]:
    """Return the routers that are recorded or were confirmed, by the stem of their files."""
    kinds = ("json", "kept", "restore")
    files = router_files.directory()
    return sorted({file.stem for kind in kinds for file in files.glob(f"*.{kind}")})


def save(record: RouterRecord) -> None:
    """Write a record.  Raises OSError."""
    data: dict[str, Any] = {
        **asdict(record),
        "target": record.target.as_object(),
        "before": nic_snapshot.as_object(record.before),
    }
    router_files.write(names.router_file(record.target.name, "json"), data)


def advance(record: RouterRecord, **changes: Any) -> RouterRecord:  # noqa: ANN401
    """Write a record with some fields changed; returns the changed record.  Raises OSError."""
    changed: RouterRecord = replace(record, **changes)
    save(changed)
    return changed


class JournalObserver:
    """Writes each operation of a router down before it is done; ``record`` as written last."""

    def __init__(self, record: RouterRecord, announce: Callable[[str], None]) -> None:
        self.record = record
        self._announce = announce

    def begin(self, what: str) -> None:
        """Write down that a step begins.  Raises OSError."""
        self._announce(what)
        self.record = advance(self.record, step=what)


def discard(name: str) -> None:
    """Delete the record of a router; a missing record is success."""
    for kind in ("json", "rules"):
        router_files.remove(names.router_file(name, kind))
