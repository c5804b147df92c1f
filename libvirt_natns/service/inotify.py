# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names that come to a directory or go from it, as inotify(7) tells of them."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x1000000
APPEARED = IN_CREATE | IN_MOVED_TO
NAMES = APPEARED | IN_DELETE | IN_MOVED_FROM
EVENT = struct.Struct("=iIII")

BLOCK = 65536
"""Octets that are read at once; an event has at most a few hundred."""

_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryMonitor:
    """Hears of names that come to a directory or go from it; the directory may come later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "cannot watch directories")
        self._parent = -1
        self._own = -1
        self._look()

    def fileno(self) -> int:
        return int(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _look(self) -> None:
        """Watch the directory, or its parent until the directory is there."""
        self._own = self._add(self._path, NAMES)
        if self._own < 0 and self._parent < 0:
            self._parent = self._add(self._path.parent, APPEARED)
            # The directory may have come in between.
            self._own = self._add(self._path, NAMES)
        if self._own >= 0 and self._parent >= 0:
            _libc.inotify_rm_watch(self._descriptor, self._parent)
            self._parent = -1

    def _add(self, path: Path, mask: int) -> int:
        encoded = os.fsencode(path)
        return int(_libc.inotify_add_watch(self._descriptor, encoded, mask | IN_ONLYDIR))

    def changes(self) -> Iterator[tuple[str, bool]]:
        """Yield each name that has changed; true with it means that it has come."""
        while True:
            try:
                events = os.read(self._descriptor, BLOCK)
            except BlockingIOError:
                return
            yield from self._parse(events)

    def _parse(self, events: bytes) -> Iterator[tuple[str, bool]]:
        while events:
            watch, mask, _, length = EVENT.unpack_from(events)
            end = EVENT.size + length
            name = os.fsdecode(events[EVENT.size : end].rstrip(b"\0"))
            events = events[end:]
            if watch == self._own and mask & NAMES:
                yield name, bool(mask & APPEARED)
            elif (watch == self._own and mask & IN_IGNORED) or (
                watch == self._parent and name == self._path.name
            ):
                self._look()
                # Names that came before the directory was watched.
                yield from ((entry.name, True) for entry in self._entries())

    def _entries(self) -> Iterator[Path]:
        with suppress(OSError):
            yield from self._path.iterdir()
