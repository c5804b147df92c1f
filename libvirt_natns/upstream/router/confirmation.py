# SPDX-License-Identifier: LGPL-2.1-or-later
"""A confirmed router, kept for the next boot.

A file has the router's target and the NIC's capture.  A boot makes the router again by the target,
and completes a NIC that no other program configures by the capture.  A shell script beside the file
gives the NIC its settings back without Python (``restore_script``).
"""

from contextlib import suppress
from dataclasses import asdict, dataclass

from libvirt_natns import names
from libvirt_natns.upstream.router import (
    hardware,
    nic_snapshot,
    restore_script,
    router_files,
)
from libvirt_natns.upstream.router.host_resolv_conf import Resolver
from libvirt_natns.upstream.router.journal import RouterRecord
from libvirt_natns.upstream.router.nic_snapshot import Capture, known_fields
from libvirt_natns.upstream.router.target import Target


@dataclass(frozen=True, slots=True)
class ConfirmedRouter:
    """The router that was confirmed last; ``target`` is None where an earlier version kept it."""

    before: Capture
    target: Target | None = None
    resolver: Resolver | None = None

    @property
    def nic(self) -> str:
        """The name that the NIC had."""
        return self.target.nic if self.target else self.before.name


def save(record: RouterRecord) -> None:
    """Keep a router that is confirmed.  Raises OSError."""
    data = {
        **nic_snapshot.as_object(record.before),
        "target": record.target.as_object(),
        "resolver": asdict(record.resolver),
    }
    router_files.write(names.router_file(record.target.name, "kept"), data)
    write_script(record.target, record.before)


def load(name: str) -> ConfirmedRouter | None:
    """Return the router that was confirmed last; None without any.  Raises StoreError."""
    file = names.router_file(name, "kept")
    data = router_files.read(file)
    if data is None:
        return None
    target, resolver = data.get("target"), data.get("resolver")
    try:
        return ConfirmedRouter(
            nic_snapshot.from_object(data),
            Target.from_object(target) if target is not None else None,
            Resolver(**known_fields(Resolver, resolver)) if resolver is not None else None,
        )
    except router_files.WRONG as error:
        raise router_files.broken(file) from error


def write_script(target: Target, before: Capture) -> None:
    """Write the restore script, unless it is there.  Raises OSError."""
    file = names.router_file(target.name, "restore")
    capture = hardware.renamed(before, target.nic)
    text = restore_script.script(target.namespace, target.link, capture)
    with suppress(OSError, UnicodeDecodeError):
        if file.read_text() == text:
            return
    router_files.write_text(file, text, 0o700)
