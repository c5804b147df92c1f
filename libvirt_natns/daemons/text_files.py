# SPDX-License-Identifier: LGPL-2.1-or-later
"""Texts of files that daemons read, with each of their characters.

Files are written beside the present ones while a daemon still runs.  So a full disk ends no
daemon that could not be started again.
"""

from collections.abc import Mapping
from pathlib import Path


def exact_text(path: Path) -> str:
    """Return a file's text with each of its characters.  Raises OSError, UnicodeDecodeError.

    Reading as text would turn CR into a line's end, and dnsmasq does not end a line there.
    """
    return path.read_bytes().decode()


def text_if_any(path: Path) -> str:
    """Return a file's exact text; empty where it cannot be read."""
    try:
        return exact_text(path)
    except (OSError, UnicodeDecodeError):
        return ""


def prepare(texts: Mapping[Path, str]) -> dict[Path, Path]:
    """Write texts beside their files, and return the fresh files by the places of ``put``.

    Raises OSError, and leaves no fresh file then.
    """
    fresh = {path: path.with_name(f"{path.name}.new") for path in texts}
    try:
        for path, text in texts.items():
            fresh[path].write_bytes(text.encode())
            fresh[path].chmod(0o644)
    except OSError:
        for file in fresh.values():
            file.unlink(missing_ok=True)
        raise
    return fresh


def put(fresh: Mapping[Path, Path]) -> None:
    """Put prepared files in their places."""
    for path, file in fresh.items():
        file.replace(path)
