# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of routers in /var/lib/libvirt-natns/routers, read and written safely.

A file is replaced as a whole and synchronized: after a crash it has its old content or its
new content.  A damaged file is put aside under another name, and never deleted.
"""

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from libvirt_natns import names
from libvirt_natns.errors import RouterFileError, StoreError
from libvirt_natns.kernel.locks import locked

WRONG = (TypeError, KeyError, ValueError, AttributeError, IndexError, struct.error)
"""Errors that foreign content can cause while it is parsed."""

MOST_ASIDE = 9
"""Damaged files that are kept; then the last of them is replaced."""


def directory() -> Path:
    """Return the directory of all routers' files."""
    return names.router_file("", "").parent


@contextmanager
def lock() -> Iterator[None]:
    """Hold off all others that change a router; an empty directory is removed."""
    place = directory()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(place):
        try:
            yield
        finally:
            with suppress(OSError):
                place.rmdir()


def read(file: Path) -> dict[str, Any] | None:
    """Return the JSON object of a file; None where the file is missing.

    Raises RouterFileError for other content, StoreError where the file cannot be read.
    """
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise broken(file) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise broken(file) from error
        raise StoreError(f"cannot read {file}", error.strerror or str(error)) from error
    if not isinstance(data, dict):
        raise broken(file)
    return data


def broken(file: Path) -> RouterFileError:
    """Return the error for a file with other content than ours."""
    return RouterFileError(
        f"{file} is damaged, or of another version",
        f"virt-natns router down {file.stem} works without this file",
    )


def write(file: Path, data: dict[str, Any]) -> None:
    """Write a JSON object.  Raises OSError."""
    write_text(file, json.dumps(data), 0o600)


def write_text(file: Path, text: str, mode: int) -> None:
    """Write a file with permissions ``mode``.  Raises OSError."""
    fresh = file.with_suffix(".new")
    if file.is_dir():
        put_aside(file)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)
    parent = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def put_aside(file: Path) -> Path:
    """Rename a damaged file; returns its new name.  Raises OSError."""
    for number in range(1, MOST_ASIDE + 1):
        aside = file.with_name(f"{file.name}.damaged{f'-{number}' if number > 1 else ''}")
        if not aside.exists():
            break
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    file.replace(aside)
    return aside


def remove(file: Path) -> None:
    """Remove a file, or a directory in its place; a missing file is success."""
    try:
        file.unlink(missing_ok=True)
    except IsADirectoryError:
        shutil.rmtree(file)
