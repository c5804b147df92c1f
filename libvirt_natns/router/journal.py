# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was done to the host for a router namespace, written down before it is done.

One file a router in /var/lib/libvirt-natns/routers, and the whole truth of it: what
the NIC was before, what the router is to be, how far one has come, and by when
somebody must confirm.  A kill leaves the file, and whoever comes next puts
everything back by it.

A second file keeps what was confirmed: what the router is to be, which is what a boot
makes of it, and the NIC's settings, where nobody else gives the NIC an address then.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any, Literal

from libvirt_natns import names
from libvirt_natns.errors import StoreError
from libvirt_natns.firewall.rules import Transport
from libvirt_natns.locks import locked
from libvirt_natns.records import asdict, dataclass, replace
from libvirt_natns.router import nic
from libvirt_natns.router.nic import Capture
from libvirt_natns.router.resolver import Resolver
from libvirt_natns.store import boot_id

State = Literal["going up", "up", "going down"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a router is to be: decided once, before anything is changed.

    ``ports`` go to the host: protocol, first, last.  ``addresses6`` are the
    host's own; ``servers`` are the resolvers that its resolv.conf is to name, none where it
    stays as it is.  ``leased``: the NIC's IPv4 address came by DHCP.

    Empty where networks get no IPv6: ``transit6`` is the private prefix between the router and
    networks, ``own6`` the address that the router takes besides what the NIC keeps.
    ``subnet6`` is the NIC's own subnet, of which networks can have parts.
    """

    name: str
    nic: str
    backend: str
    host_subnet: str
    ports: tuple[tuple[Transport, int, int], ...]
    addresses6: tuple[str, ...]
    transit: str
    servers: tuple[str, ...] = ()
    leased: bool = False
    transit6: str = ""
    subnet6: str = ""
    own6: str = ""

    @property
    def namespace(self) -> str:
        return names.router_namespace(self.name)

    @property
    def link(self) -> str:
        """The host's end of its patch."""
        return names.router_patch(self.name)

    @property
    def host(self) -> IPv4Interface:
        """The host's private address: the subnet's second."""
        subnet = IPv4Network(self.host_subnet)
        return IPv4Interface((subnet.network_address + 2, subnet.prefixlen))

    @property
    def gateway(self) -> IPv4Interface:
        """The router's address towards the host: the subnet's first."""
        subnet = IPv4Network(self.host_subnet)
        return IPv4Interface((subnet.network_address + 1, subnet.prefixlen))

    @property
    def transit_gateway(self) -> IPv4Address:
        return IPv4Network(self.transit).network_address + 1


@dataclass(frozen=True, slots=True)
class Record:
    """A router, as far as it has come.

    ``deadline`` is when it is taken back unless somebody confirms (seconds since
    boot), None where nobody need.  ``step`` is the one that was begun last.
    """

    target: Target
    before: Capture
    resolver: Resolver
    state: State
    boot: str
    step: str = ""
    deadline: float | None = None

    @property
    def this_boot(self) -> bool:
        return self.boot == boot_id()

    @property
    def is_whole(self) -> bool:
        """Whether it came up, and nobody has begun to take it down."""
        return self.state == "up" and self.this_boot

    @property
    def is_overdue(self) -> bool:
        """Whether it should have been taken back by now."""
        return self.deadline is not None and (not self.this_boot or nic.clock() >= self.deadline)


@dataclass(frozen=True, slots=True)
class Kept:
    """What was confirmed last; ``target`` is None where an earlier version has kept it."""

    before: Capture
    target: Target | None = None


# -- files -------------------------------------------------------------------


def _directory() -> Path:
    return names.router_file("", "").parent


@contextmanager
def lock() -> Iterator[None]:
    """Hold off all others that change a router; leaves no empty directory."""
    directory = _directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(directory):
        try:
            yield
        finally:
            with suppress(OSError):
                directory.rmdir()


def load(name: str) -> Record | None:
    """The record of a router; None where nothing was begun.  Raises StoreError."""
    data = _read(names.router_file(name, "json"))
    return _record(data) if data is not None else None


def load_all() -> list[Record]:
    """All records, by name.  Raises StoreError."""
    found = (_read(file) for file in sorted(_directory().glob("*.json")))
    return [_record(data) for data in found if data is not None]


def save(record: Record) -> None:
    """Write a record, so that it survives whatever happens next."""
    _write(names.router_file(record.target.name, "json"), _as_object(record))


def discard(name: str) -> None:
    """Forget a router; that nothing is known of it is success."""
    for kind in ("json", "rules"):
        names.router_file(name, kind).unlink(missing_ok=True)


def keep(record: Record) -> None:
    """Keep a router that is confirmed."""
    made = {**nic.as_object(record.before), "target": asdict(record.target)}
    _write(names.router_file(record.target.name, "kept"), made)


def kept(name: str) -> Kept | None:
    """What was kept; None without anything.  Raises StoreError."""
    file = names.router_file(name, "kept")
    data = _read(file)
    if data is None:
        return None
    target = data.pop("target", None)
    try:
        return Kept(nic.from_object(data), _target(target) if target is not None else None)
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(file) from error


def _as_object(record: Record) -> dict[str, Any]:
    return {**asdict(record), "before": nic.as_object(record.before)}


def _target(data: dict[str, Any]) -> Target:
    target = dict(data)
    target["ports"] = tuple(tuple(each) for each in target["ports"])
    target["addresses6"] = tuple(target["addresses6"])
    target["servers"] = tuple(target["servers"])
    return Target(**target)


def _record(data: dict[str, Any]) -> Record:
    try:
        made = dict(data)
        made["target"] = _target(made["target"])
        made["before"] = nic.from_object(made["before"])
        made["resolver"] = Resolver(**made["resolver"])
        return Record(**made)
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(_directory()) from error


def _broken(file: Path) -> StoreError:
    return StoreError(f"{file} holds something that virt-natns did not write", "move it away")


def _read(file: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _broken(file) from error
    if not isinstance(data, dict):
        raise _broken(file)
    return data


def _write(file: Path, data: dict[str, Any]) -> None:
    fresh = file.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(data, stream)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def advance(record: Record, **changes: Any) -> Record:  # noqa: ANN401
    """The record with some fields changed, written down."""
    changed: Record = replace(record, **changes)
    save(changed)
    return changed
