# SPDX-License-Identifier: LGPL-2.1-or-later
"""Texts of files, with each of their characters."""

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
