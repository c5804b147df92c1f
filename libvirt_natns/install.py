# SPDX-License-Identifier: LGPL-2.1-or-later
"""Putting the hooks where libvirt looks for them, and taking them away again.

A hook that somebody else installed is never overwritten: libvirt (6.5 or
later) also runs what it finds in a directory next to it, and ours goes there.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.errors import InstallError

HOOKS = ("network", "qemu")
HOOKS_DIRECTORY = Path("/etc/libvirt/hooks")
DROP_IN = "libvirt-natns"
MARK = "# libvirt-natns: "
DAEMONS = ("libvirtd", "virtnetworkd", "virtqemud", "virtlxcd")
DISTRIBUTION_PYTHON = "/usr/bin/python3"
SCOPE_FILE_HEAD = '# Written by "virt-natns install"; see virt-natns(8).\n'


@dataclass(frozen=True, slots=True)
class Report:
    """What was written or removed, and which daemons were told."""

    files: tuple[Path, ...]
    daemons: tuple[str, ...]


def template(hook: str) -> str:
    """The text of a hook as it is shipped."""
    package = Path(__file__).resolve().parent
    for directory in (package / "hooks", package.parent / "hooks"):
        file = directory / hook
        if file.is_file():
            return file.read_text()
    raise InstallError(f"the hook {hook} is not part of this installation", "install it again")


def render(hook: str) -> str:
    """The text of a hook for this machine: its interpreter and where the package is."""
    library = str(Path(__file__).resolve().parent.parent)
    text = template(hook).replace('LIBRARY = ""', f"LIBRARY = {library!r}", 1)
    return re.sub(r"\A#!.*", lambda _: f"#!{interpreter()} -IS", text, count=1)


def interpreter() -> str:
    """The distribution's Python where it has all that is needed, else this one."""
    own = os.path.realpath(sys.executable)
    if own == os.path.realpath(DISTRIBUTION_PYTHON) and sys.prefix == sys.base_prefix:
        return DISTRIBUTION_PYTHON
    library = str(Path(__file__).resolve().parent.parent)
    check = f"import sys; sys.path.append({library!r}); import lxml, pyroute2, libvirt_natns"
    try:
        done = subprocess.run(
            [DISTRIBUTION_PYTHON, "-I", "-c", check], capture_output=True, check=False
        )
    except OSError:
        return sys.executable
    return DISTRIBUTION_PYTHON if done.returncode == 0 else sys.executable


def is_ours(file: Path) -> bool:
    """Whether a hook file was written by us."""
    try:
        return MARK in file.read_text(errors="replace")
    except OSError:
        return False


def places(hook: str) -> tuple[Path, Path]:
    """Where a hook may lie: as the hook itself, or as a drop-in beside a foreign one."""
    return HOOKS_DIRECTORY / hook, HOOKS_DIRECTORY / f"{hook}.d" / DROP_IN


def install_hooks() -> tuple[Path, ...]:
    """Write all hooks; returns their paths.  Raises InstallError."""
    written = []
    try:
        for hook in HOOKS:
            main, drop_in = places(hook)
            foreign = main.exists() and not is_ours(main)
            written.append(_write(drop_in if foreign else main, render(hook)))
            if foreign is False and is_ours(drop_in):
                _remove(drop_in)
    except OSError as error:
        raise InstallError(
            f"cannot write {error.filename}", f"{error.strerror}; are you root?"
        ) from error
    return tuple(written)


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Never half a hook: libvirt may run it at any moment.
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(text)
    fresh.chmod(0o755)
    fresh.replace(file)
    return file


def _remove(file: Path) -> None:
    file.unlink()
    directory = file.parent
    if directory.name.endswith(".d") and not any(directory.iterdir()):
        directory.rmdir()


def remove_hooks() -> tuple[Path, ...]:
    """Remove our hooks, and no others; returns what was removed."""
    removed = []
    try:
        for hook in HOOKS:
            for file in places(hook):
                if is_ours(file):
                    _remove(file)
                    removed.append(file)
    except OSError as error:
        raise InstallError(
            f"cannot remove {error.filename}", f"{error.strerror}; are you root?"
        ) from error
    return tuple(removed)


def installed_hooks() -> tuple[Path, ...]:
    """Our hooks that are in place."""
    return tuple(file for hook in HOOKS for file in places(hook) if is_ours(file))


def write_scope(scope: str) -> Path:
    """Set ``scope`` in the configuration file, and nothing else of it."""
    line = f'scope = "{scope}"\n'
    file = names.CONFIG_FILE
    try:
        text = file.read_text() if file.exists() else SCOPE_FILE_HEAD
        if re.search(r"(?m)^scope\s*=", text):
            text = re.sub(r"(?m)^scope\s*=.*\n?", line, text, count=1)
        elif text == SCOPE_FILE_HEAD:
            text += line
        else:
            # Top-level keys must stand ahead of the first table.
            text = line + text
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise InstallError(f"cannot write {file}", str(error.strerror)) from error
    return file


def remove_state() -> None:
    """Remove the state, the run-time directory, and a configuration that we wrote."""
    for directory in (names.STATE_DIRECTORY, names.RUN_DIRECTORY):
        shutil.rmtree(directory, ignore_errors=True)
    file = names.CONFIG_FILE
    if file.exists() and re.fullmatch(
        re.escape(SCOPE_FILE_HEAD) + r'scope = "\w+"\n', file.read_text()
    ):
        file.unlink()
        if not any(file.parent.iterdir()):
            file.parent.rmdir()


def reload_daemons() -> tuple[str, ...]:
    """Have the running libvirt daemons look for hooks again (SIGHUP); returns their names.

    A daemon looks when it starts or reloads; one that is not running, but
    started by its socket, will look anyway.  Only daemons of our own mount
    namespace are told: others have hooks of their own.
    """
    told = []
    own = Path("/proc/self/ns/mnt").stat().st_ino
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name = (entry / "comm").read_text().strip()
            if name in DAEMONS and (entry / "ns/mnt").stat().st_ino == own:
                os.kill(int(entry.name), signal.SIGHUP)
                told.append(name)
        except OSError:
            continue
    return tuple(told)
