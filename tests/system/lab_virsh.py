# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commonest commands of virsh by libvirt's library, in the test's own process.

A suite runs them thousands of times, and a start of virsh takes longer than its request.
libvirtd and its hooks do the same for both.  A result has the exit status and the output of
virsh, and its line with libvirt's error.  Other commands and options are left to virsh.
"""

import re
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import libvirt

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

Command = Callable[[Any, str], str | None]
"""Does a command on a connection, with its last argument; returns what virsh would print."""


def run(arguments: tuple[str, ...], timeout: float) -> "subprocess.CompletedProcess[str] | None":
    """Run ``virsh -q ARGUMENTS``; None for a command that only virsh knows.

    ``timeout`` is in seconds; raises TimeoutError.
    """
    command = COMMANDS.get(arguments) or COMMANDS.get(arguments[:-1])
    if command is None:
        return None
    done: list[subprocess.CompletedProcess[str]] = []

    def ask() -> None:
        done.append(_answer(command, arguments))

    # The library cannot be told to give up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    if not done:
        raise TimeoutError
    return done[0]


def _answer(command: Command, arguments: tuple[str, ...]) -> "subprocess.CompletedProcess[str]":
    words = ["virsh", "-q", *arguments]
    try:
        # For each command: a test may have restarted libvirtd since.
        connection = libvirt.open()
        try:
            printed = command(connection, arguments[-1])
        finally:
            connection.close()
    except (libvirt.libvirtError, OSError) as error:
        return subprocess.CompletedProcess(words, 1, "", f"error: {error}\n")
    return subprocess.CompletedProcess(words, 0, printed or "", "")


def _network(connection: Any, name: str) -> Any:  # noqa: ANN401
    if UUID.fullmatch(name):
        return connection.networkLookupByUUIDString(name)
    return connection.networkLookupByName(name)


def _domain(connection: Any, name: str) -> Any:  # noqa: ANN401
    if UUID.fullmatch(name):
        return connection.lookupByUUIDString(name)
    return connection.lookupByName(name)


def _names(objects: Iterable[Any]) -> str:
    return "".join(f"{each.name()}\n" for each in objects)


COMMANDS: dict[tuple[str, ...], Command] = {
    ("net-define",): lambda to, file: to.networkDefineXML(Path(file).read_text()) and None,
    ("net-start",): lambda to, name: _network(to, name).create() and None,
    ("net-start", "--network"): lambda to, name: _network(to, name).create() and None,
    ("net-destroy",): lambda to, name: _network(to, name).destroy() and None,
    ("net-undefine",): lambda to, name: _network(to, name).undefine() and None,
    ("net-uuid",): lambda to, name: f"{_network(to, name).UUIDString()}\n",
    ("net-dumpxml",): lambda to, name: _network(to, name).XMLDesc(),
    ("define",): lambda to, file: to.defineXML(Path(file).read_text()) and None,
    ("create",): lambda to, file: to.createXML(Path(file).read_text()) and None,
    ("create", "--paused"): lambda to, file: (
        to.createXML(Path(file).read_text(), libvirt.VIR_DOMAIN_START_PAUSED) and None
    ),
    ("start",): lambda to, name: _domain(to, name).create() and None,
    ("start", "--paused"): lambda to, name: (
        _domain(to, name).createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED) and None
    ),
    ("destroy",): lambda to, name: _domain(to, name).destroy() and None,
    ("undefine",): lambda to, name: _domain(to, name).undefine() and None,
    ("dumpxml",): lambda to, name: _domain(to, name).XMLDesc(),
    ("list", "--all", "--name"): lambda to, _: _names(to.listAllDomains()),
    ("net-list", "--all", "--name"): lambda to, _: _names(to.listAllNetworks()),
    ("domuuid",): lambda to, name: f"{_domain(to, name).UUIDString()}\n",
}

libvirt.registerErrorHandler(lambda _context, _error: None, None)
