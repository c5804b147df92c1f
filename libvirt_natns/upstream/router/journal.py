# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was done to the host for a router namespace, written down before it is done.

One file a router in /var/lib/libvirt-natns/routers, and the whole truth of it: what
the NIC was before, what the router is to be, how far one has come, and by when
somebody must confirm.  A kill leaves the file, and whoever comes next puts
everything back by it.

A second file keeps what was confirmed: what the router is to be, which is what a boot
makes of it, and the NIC's settings, where nobody else gives the NIC an address then.
``restore`` makes a third one, a shell script, of the same.

A file that is damaged is put aside, under another name, by the verbs that can go on
without it; the others raise RouterFileError.
"""

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Literal, get_args

from libvirt_natns import names
from libvirt_natns.errors import RouterFileError, StoreError
from libvirt_natns.firewall.rules import Transport
from libvirt_natns.kernel.boot import boot_id
from libvirt_natns.kernel.locks import locked
from libvirt_natns.records import asdict, dataclass, replace
from libvirt_natns.upstream.router import hardware, nic, restore
from libvirt_natns.upstream.router.nic import Capture
from libvirt_natns.upstream.router.resolv_conf import Resolver

State = Literal["going up", "up", "going down"]

WRONG = (TypeError, KeyError, ValueError, AttributeError, IndexError, struct.error)
"""What another content than ours comes to, whatever it is."""

MOST_ASIDE = 9
"""Damaged files that are kept; then the last one is replaced."""


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
    resolver: Resolver | None = None

    @property
    def nic(self) -> str:
        """The name that the NIC had."""
        return self.target.nic if self.target else self.before.name


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
    """The record of a router; None where nothing was begun.

    Raises RouterFileError for one that makes no sense, StoreError where it cannot be read.
    """
    file = names.router_file(name, "json")
    data = _read(file)
    return _record(file, data) if data is not None else None


def load_all() -> list[Record]:
    """All records that can be read, by name: a damaged one concerns its own router alone."""
    found = []
    for file in sorted(_directory().glob("*.json")):
        with suppress(StoreError):
            data = _read(file)
            if data is not None:
                found.append(_record(file, data))
    return found


def damaged() -> dict[str, StoreError]:
    """Why records cannot be read, by what their files are called."""
    found = {}
    for file in sorted(_directory().glob("*.json")):
        try:
            data = _read(file)
            if data is not None:
                _record(file, data)
        except StoreError as error:
            found[file.stem] = error
    return found


def known_names() -> list[str]:
    """Routers that are recorded or were confirmed, by what their files are called."""
    kinds = ("json", "kept", "restore")
    found = {file.stem for kind in kinds for file in _directory().glob(f"*.{kind}")}
    return sorted(found)


def put_aside(file: Path) -> Path:
    """Give a damaged file another name, under which it is kept.  Raises OSError."""
    for number in range(1, MOST_ASIDE + 1):
        aside = file.with_name(f"{file.name}.damaged{f'-{number}' if number > 1 else ''}")
        if not aside.exists():
            break
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    file.replace(aside)
    return aside


def save(record: Record) -> None:
    """Write a record, so that it survives whatever happens next."""
    _write(names.router_file(record.target.name, "json"), _as_object(record))


def discard(name: str) -> None:
    """Forget a router; that nothing is known of it is success."""
    for kind in ("json", "rules"):
        remove(names.router_file(name, kind))


def remove(file: Path) -> None:
    """Remove a file of ours, and what somebody has put in its place; missing is success."""
    try:
        file.unlink(missing_ok=True)
    except IsADirectoryError:
        shutil.rmtree(file)


def keep(record: Record) -> None:
    """Keep a router that is confirmed."""
    made = {
        **nic.as_object(record.before),
        "target": asdict(record.target),
        "resolver": asdict(record.resolver),
    }
    _write(names.router_file(record.target.name, "kept"), made)
    write_script(record.target, record.before)


def write_script(target: Target, before: Capture) -> None:
    """Write what gives the NIC its settings back without Python, unless it is there."""
    file = names.router_file(target.name, "restore")
    text = restore.script(target.namespace, target.link, hardware.renamed(before, target.nic))
    with suppress(OSError, UnicodeDecodeError):
        if file.read_text() == text:
            return
    _write_text(file, text, 0o700)


def kept(name: str) -> Kept | None:
    """What was kept; None without anything.  Raises StoreError."""
    file = names.router_file(name, "kept")
    data = _read(file)
    if data is None:
        return None
    target, found = data.get("target"), data.get("resolver")
    try:
        return Kept(
            nic.from_object(data),
            _target(target) if target is not None else None,
            _resolver(found) if found is not None else None,
        )
    except WRONG as error:
        raise _broken(file) from error


def _as_object(record: Record) -> dict[str, Any]:
    return {**asdict(record), "before": nic.as_object(record.before)}


def _target(data: dict[str, Any]) -> Target:
    target = nic.known_fields(Target, data)
    target["ports"] = tuple(_port(*each) for each in target["ports"])
    target["addresses6"] = tuple(map(str, map(IPv6Address, target["addresses6"])))
    target["servers"] = tuple(map(str, map(ip_address, target["servers"])))
    made = Target(**target)
    # Of these all else is made.
    IPv4Network(made.host_subnet), IPv4Network(made.transit)
    return made


def _port(protocol: Transport, first: int, last: int) -> tuple[Transport, int, int]:
    if protocol not in get_args(Transport) or not 0 < int(first) <= int(last) < 65536:
        raise ValueError(f"{protocol}/{first}-{last} is no port")
    return protocol, int(first), int(last)


def _resolver(data: dict[str, Any]) -> Resolver:
    return Resolver(**nic.known_fields(Resolver, data))


def _record(file: Path, data: dict[str, Any]) -> Record:
    try:
        made = nic.known_fields(Record, data)
        made["target"] = _target(made["target"])
        made["before"] = nic.from_object(made["before"])
        made["resolver"] = _resolver(made["resolver"])
        if made["state"] not in get_args(State):
            raise ValueError("a state that is none")
        return Record(**made)
    except WRONG as error:
        raise _broken(file) from error


def _broken(file: Path) -> RouterFileError:
    return RouterFileError(
        f"{file} is damaged, or of another version",
        f"virt-natns router down {file.stem} goes on without it",
    )


def _read(file: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise _broken(file) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _broken(file) from error
        raise StoreError(f"cannot read {file}", error.strerror or str(error)) from error
    if not isinstance(data, dict):
        raise _broken(file)
    return data


def _write(file: Path, data: dict[str, Any]) -> None:
    _write_text(file, json.dumps(data), 0o600)


def _write_text(file: Path, text: str, mode: int) -> None:
    """Write a file, so that after a crash it is the old one or the new one, and whole."""
    fresh = file.with_suffix(".new")
    if file.is_dir():
        put_aside(file)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
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
