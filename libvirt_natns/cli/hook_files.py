# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hook files in libvirt's directory: install them, compare them, and remove them.

A hook of another author is never overwritten.  libvirt (6.5 or later) also runs the
files in a directory next to the hook.  Our hook goes there as a drop-in.
"""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.errors import InstallError

HOOKS = ("network", "qemu", "lxc")
HOOKS_DIRECTORY = Path("/etc/libvirt/hooks")
DROP_IN = "libvirt-natns"
MARK = "# libvirt-natns: "

HEAD_LINES = 5
"""Lines of a hook file in which the mark must be."""

NEEDED = "import lxml, pyroute2, libvirt_natns"
"""The modules that the hooks' interpreter must be able to import."""

DISTRIBUTION_PYTHON = "/usr/bin/python3"


def places(hook: str) -> tuple[Path, Path]:
    """Return the two paths of a hook: the hook itself, and the drop-in beside a foreign hook."""
    return HOOKS_DIRECTORY / hook, HOOKS_DIRECTORY / f"{hook}.d" / DROP_IN


def unfinished(hook: str) -> tuple[Path, Path]:
    """Return the two places in which a killed ``install`` may leave a half-written hook.

    libvirt runs every file that can be executed in the drop-in's directory, so hooks are
    written beside it.  Earlier versions wrote drop-ins in that directory.
    """
    main, drop_in = places(hook)
    return main.with_name(f".{main.name}.new"), drop_in.with_name(f".{drop_in.name}.new")


def is_ours(file: Path) -> bool:
    """True if a hook file is ours; the text of a foreign hook may mention us elsewhere."""
    try:
        head = file.read_text(errors="replace").splitlines()[:HEAD_LINES]
    except OSError:
        return False
    return any(line.startswith(MARK) for line in head)


def is_current(file: Path) -> bool:
    """True if a hook of ours is as ``install`` would write it today."""
    hook = next(hook for hook in HOOKS if file in places(hook))
    return file.read_bytes() == render(hook).encode() and os.access(file, os.X_OK)


def installed() -> tuple[Path, ...]:
    """Return our hooks that are in place."""
    return tuple(file for hook in HOOKS for file in places(hook) if is_ours(file))


def newest() -> float:
    """Return when the newest of our hooks was installed, in seconds since the epoch; 0 for none."""
    return max((file.stat().st_mtime for file in installed()), default=0.0)


def render(hook: str) -> str:
    """Return the text of a hook for this machine: its interpreter and the package's place.

    Raises InstallError where the hook was not shipped.
    """
    template = names.resource(f"hooks/{hook}")
    if not template.is_file():
        raise InstallError(
            f"the hook {hook} is not part of this installation", "install libvirt-natns again"
        )
    text = template.read_text()
    for name, value in (("library", str(names.library())), ("python", interpreter())):
        line = f"{name}={shlex.quote(value)}".replace("\\", r"\\")
        text = re.sub(rf"(?m)^{name}=.*$", line, text, count=1)
    return text


@cache
def interpreter() -> str:
    """Return the distribution's Python where it has all modules of the hooks, else our own.

    The answer is kept for the process, as it takes the start of an interpreter.
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


def install() -> tuple[Path, ...]:
    """Write all hooks, and return their paths.  Raises InstallError."""
    written = []
    try:
        for hook in HOOKS:
            main, drop_in = places(hook)
            # A dangling link counts as foreign, too.
            foreign = os.path.lexists(main) and not is_ours(main)
            fresh, leftover = unfinished(hook)
            written.append(_write(drop_in if foreign else main, fresh, render(hook)))
            if os.path.lexists(leftover):
                _unlink(leftover)
            if not foreign and is_ours(drop_in):
                _unlink(drop_in)
    except OSError as error:
        raise InstallError(
            f"cannot write {error.filename}", f"{error.strerror}; are you root?"
        ) from error
    return tuple(written)


def _write(file: Path, fresh: Path, text: str) -> Path:
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # libvirt may run the hook at any moment, so it must never see half a file.
    fresh.write_text(text)
    fresh.chmod(0o755)
    fresh.replace(file)
    return file


def remove() -> tuple[Path, ...]:
    """Remove our hooks, and no others; return the removed paths.

    Tries all hooks.  Raises InstallError for hooks that stay.
    """
    removed = []
    problems = []
    for hook in HOOKS:
        for file in (*unfinished(hook), *places(hook)):
            is_whole = file in places(hook)
            try:
                if is_ours(file) if is_whole else os.path.lexists(file):
                    _unlink(file)
                    removed += [file] if is_whole else []
            except OSError as error:
                problems.append(f"cannot remove {error.filename} ({error.strerror})")
    if problems:
        raise InstallError("; ".join(problems), "are you root?")
    return tuple(removed)


def _unlink(file: Path) -> None:
    """Remove a hook file, and the drop-in directory if it is empty now."""
    file.unlink()
    directory = file.parent
    if directory.name.endswith(".d") and not any(directory.iterdir()):
        directory.rmdir()
