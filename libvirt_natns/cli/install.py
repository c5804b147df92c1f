# SPDX-License-Identifier: LGPL-2.1-or-later
"""Putting the hooks where libvirt looks for them, and taking them away again.

A hook that somebody else installed is never overwritten: libvirt (6.5 or
later) also runs what it finds in a directory next to it, and ours goes there.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.documents import config
from libvirt_natns.errors import ConfigError, InstallError
from libvirt_natns.records import dataclass

HOOKS = ("network", "qemu", "lxc")
HOOKS_DIRECTORY = Path("/etc/libvirt/hooks")
DROP_IN = "libvirt-natns"
MARK = "# libvirt-natns: "
HEAD_LINES = 5
NEEDED = "import lxml, pyroute2, libvirt_natns"
"""What the hooks' interpreter must be able to do."""
DAEMONS = ("libvirtd", "virtnetworkd", "virtqemud", "virtlxcd")
DISTRIBUTION_PYTHON = "/usr/bin/python3"
SCOPE_FILE_HEAD = '# Written by "virt-natns install"; see virt-natns(8).\n'

RELOAD_LIMIT = 10.0
"""Seconds that a daemon's reload may take: it renews the firewall rules of every network."""
RELOAD_BEGINS = 0.3
"""Seconds within which a daemon begins to reload; one that does not is busy otherwise."""

TABLE_HEAD = re.compile(r"^[ \t]*\[", re.MULTILINE)
SCOPE_LINE = re.compile(r"""^([ \t]*scope[ \t]*=[ \t]*)("[^"\n]*"|'[^'\n]*')""", re.MULTILINE)


def template(hook: str) -> str:
    """The text of a hook as it is shipped."""
    file = names.resource(f"hooks/{hook}")
    if file.is_file():
        return file.read_text()
    raise InstallError(f"the hook {hook} is not part of this installation", "install it again")


def render(hook: str) -> str:
    """The text of a hook for this machine: its interpreter and where the package is."""
    text = template(hook)
    for name, value in (("library", str(names.library())), ("python", interpreter())):
        line = f"{name}={shlex.quote(value)}".replace("\\", r"\\")
        text = re.sub(rf"(?m)^{name}=.*$", line, text, count=1)
    return text


@cache
def interpreter() -> str:
    """The distribution's Python where it has all that is needed, else this one.

    Asked for once a process: the answer takes an interpreter's start.
    """
    own = os.path.realpath(sys.executable)
    if own == os.path.realpath(DISTRIBUTION_PYTHON) and sys.prefix == sys.base_prefix:
        return DISTRIBUTION_PYTHON
    check = f"import sys; sys.path.append({str(names.library())!r}); {NEEDED}"
    try:
        done = subprocess.run(
            [DISTRIBUTION_PYTHON, "-I", "-c", check], capture_output=True, check=False
        )
    except OSError:
        return sys.executable
    return DISTRIBUTION_PYTHON if done.returncode == 0 else sys.executable


def is_ours(file: Path) -> bool:
    """Whether a hook file was written by us: a stranger's may well mention us."""
    try:
        head = file.read_text(errors="replace").splitlines()[:HEAD_LINES]
    except OSError:
        return False
    return any(line.startswith(MARK) for line in head)


def places(hook: str) -> tuple[Path, Path]:
    """Where a hook may lie: as the hook itself, or as a drop-in beside a foreign one."""
    return HOOKS_DIRECTORY / hook, HOOKS_DIRECTORY / f"{hook}.d" / DROP_IN


def install_hooks() -> tuple[Path, ...]:
    """Write all hooks; returns their paths.  Raises InstallError."""
    written = []
    try:
        for hook in HOOKS:
            main, drop_in = places(hook)
            # A link that leads nowhere now is somebody's all the same.
            foreign = os.path.lexists(main) and not is_ours(main)
            written.append(_write(drop_in if foreign else main, render(hook)))
            if not foreign and is_ours(drop_in):
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
    """Remove our hooks, and no others; returns what was removed.

    Tries all of them.  Raises InstallError for those that stay.
    """
    removed = []
    problems = []
    for hook in HOOKS:
        for file in places(hook):
            try:
                if is_ours(file):
                    _remove(file)
                    removed.append(file)
            except OSError as error:
                problems.append(f"cannot remove {error.filename} ({error.strerror})")
    if problems:
        raise InstallError("; ".join(problems), "are you root?")
    return tuple(removed)


def is_current(file: Path) -> bool:
    """Whether one of our hooks is as ``install`` would write it today."""
    hook = next(hook for hook in HOOKS if file in places(hook))
    return file.read_text() == render(hook) and os.access(file, os.X_OK)


def installed_hooks() -> tuple[Path, ...]:
    """Our hooks that are in place."""
    return tuple(file for hook in HOOKS for file in places(hook) if is_ours(file))


def write_scope(scope: str) -> Path:
    """Set ``scope`` in the configuration file, and nothing else of it.

    Raises InstallError where the file cannot be written, or is so unusual that
    only its author should change it.
    """
    file = names.CONFIG_FILE
    try:
        old = file.read_text() if file.exists() else None
        new = with_scope(old, scope)
        if new != old:
            file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _replace(file, new)
    except OSError as error:
        raise InstallError(f"cannot write {file}", str(error.strerror)) from error
    return file


def with_scope(text: str | None, scope: str) -> str:
    """The configuration's text with this scope; ``None`` stands for no file."""
    line = f'scope = "{scope}"\n'
    if text is None:
        return SCOPE_FILE_HEAD + line
    table = TABLE_HEAD.search(text)
    top, rest = (text[: table.start()], text[table.start() :]) if table else (text, "")
    # Top-level keys must stand ahead of the first table.
    changed, count = SCOPE_LINE.subn(lambda found: f'{found[1]}"{scope}"', top, count=1)
    new = changed + rest if count else line + text
    try:
        understood = config.parse(new, str(names.CONFIG_FILE)).scope == scope
    except ConfigError:
        understood = False
    if not understood:
        raise InstallError(f"cannot set the scope in {names.CONFIG_FILE}", f"write {line.strip()}")
    return new


def _replace(file: Path, text: str) -> None:
    """Write a file at once and whole, also where it is a link to one; keeps its mode."""
    real = file.resolve()
    fresh = real.with_name(f".{real.name}.new")
    fresh.write_text(text)
    if real.exists():
        shutil.copymode(real, fresh)
    fresh.replace(real)


def remove_state() -> None:
    """Remove the state, the run-time directory, and a configuration that we wrote."""
    for directory in (names.STATE_DIRECTORY, names.RUN_DIRECTORY):
        shutil.rmtree(directory, ignore_errors=True)
    file = names.CONFIG_FILE
    ours = re.escape(SCOPE_FILE_HEAD) + r'scope = "\w+"\n'
    # Somebody else's file may be in any encoding, and its directory have more of them.
    with suppress(OSError):
        if re.fullmatch(ours, file.read_text(errors="replace")):
            file.unlink()
            file.parent.rmdir()


@dataclass(frozen=True, slots=True)
class Process:
    """A running libvirt daemon; ``started`` is in clock ticks since boot."""

    name: str
    pid: int
    started: int

    @property
    def start_time(self) -> float:
        """When it was started, in seconds since the epoch."""
        since_boot = self.started / os.sysconf("SC_CLK_TCK")
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def daemons() -> list[Process]:
    """The running libvirt daemons that see the hooks we see.

    Those of another mount namespace, a container's for instance, have hooks of
    their own.
    """
    own = Path("/proc/self/ns/mnt").stat().st_ino
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (entry / "stat").read_text().partition(" (")[2].rpartition(") ")
            if name in DAEMONS and (entry / "ns/mnt").stat().st_ino == own:
                found.append(Process(name, int(entry.name), int(rest.split()[19])))
        except OSError:
            continue
    return found


def reload_daemons() -> tuple[str, ...]:
    """Have the running libvirt daemons look for hooks again (SIGHUP); returns their names.

    A daemon looks when it starts or reloads; one that is not running, but
    started by its socket, will look anyway.
    """
    told = []
    for daemon in daemons():
        # A daemon that reloads already looked before our files changed, and ignores
        # a second signal until it is done.
        _await(partial(_at_rest, daemon.pid), RELOAD_LIMIT)
        try:
            os.kill(daemon.pid, signal.SIGHUP)
        except ProcessLookupError:
            continue
        told.append(daemon)
    for daemon in told:
        # Whoever reloads after us must not be ignored either.  One that has begun
        # and ended between two looks is done as well.
        if _await(partial(_reloads, daemon.pid), RELOAD_BEGINS):
            _await(partial(_at_rest, daemon.pid), RELOAD_LIMIT)
    note = {"told": [[daemon.pid, daemon.started] for daemon in told]}
    # Without the note, doctor asks for one reload more than is needed.
    with suppress(OSError):
        names.STATE_DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
        _note_file().write_text(json.dumps(note))
    return tuple(daemon.name for daemon in told)


def _reloads(pid: int) -> bool:
    """Whether a daemon is reloading: libvirt has a thread of its own for it."""
    for thread in Path(f"/proc/{pid}/task").glob("*/comm"):
        try:
            if thread.read_text().strip() == "daemon-reload":
                return True
        except OSError:
            continue
    return False


def _at_rest(pid: int) -> bool:
    return not _reloads(pid)


def _await(condition: Callable[[], bool], limit: float) -> bool:
    """Wait until something is so, at most ``limit`` seconds; whether it is."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def blind_daemons() -> tuple[str, ...]:
    """Running daemons that have not looked for hooks since ours were installed."""
    try:
        told = json.loads(_note_file().read_text())["told"]
    except (OSError, ValueError, KeyError):
        told = []
    installed = max((file.stat().st_mtime for file in installed_hooks()), default=0.0)
    return tuple(
        daemon.name
        for daemon in daemons()
        # Both clocks count whole ticks only.
        if [daemon.pid, daemon.started] not in told and daemon.start_time + 1 < installed
    )


def _note_file() -> Path:
    return names.STATE_DIRECTORY / "told.json"
