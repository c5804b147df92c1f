# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules for the users who may look without being root, and the list of commands for them.

A command runs as root for them, so it may change nothing, name no file, and print no secret.  An
option that is not listed here is refused: a new option of a command is not open by itself.
"""

import argparse
import ctypes
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

CREDENTIALS = struct.Struct("3i")
"""SO_PEERCRED: process, user and group."""

SO_PEERGROUPS = 59
"""Of asm-generic/socket.h, since Linux 4.13.  Python has no name for it.

sparc and parisc have other numbers.  The kernel refuses this one there, and so does ``peer``."""

MOST_GROUPS = 65536
"""The most groups of a process, NGROUPS_MAX."""

LOOKS: dict[tuple[str, ...], frozenset[str]] = {
    ("status",): frozenset({"network", "json"}),
    ("check",): frozenset({"network", "json"}),
    ("plan",): frozenset({"network", "json"}),
    ("forward", "list"): frozenset({"guest", "json"}),
    ("diagram",): frozenset({"format"}),
}
"""The commands, with the arguments that they may have."""

STREAM = ("watch", "--json")
"""The request for the stream of changes."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Peer:
    """The user at the other end of a connection."""

    uid: int

    @property
    def is_root(self) -> bool:
        """True for root."""
        return self.uid == 0


def peer(connection: socket.socket, group: int | None) -> Peer | None:
    """Return the user of a connection; None unless that is root or in the group.

    The kernel keeps both from the moment of the connection.  So no process that takes the number
    of the client counts, and no later change of its user.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _, uid, gid = CREDENTIALS.unpack(credentials)
    if uid == 0 or (group is not None and group in (gid, *_groups(connection))):
        return Peer(uid)
    return None


def _groups(connection: socket.socket) -> tuple[int, ...]:
    """Return the supplementary groups of a connection's user; none where the kernel tells none."""
    # Python's own getsockopt takes at most 1024 octets.
    buffer = (ctypes.c_uint32 * MOST_GROUPS)()
    length = ctypes.c_uint32(ctypes.sizeof(buffer))
    if _libc.getsockopt(
        connection.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(length)
    ):
        return ()
    return tuple(buffer[: length.value // ctypes.sizeof(ctypes.c_uint32)])


def command_of(words: Sequence[str]) -> tuple[str, ...] | None:
    """Return the listed command that words of a command line begin with; None for another."""
    return next((each for each in LOOKS if tuple(words[: len(each)]) == each), None)


def refused(
    words: Sequence[str], options: argparse.Namespace, parser: argparse.ArgumentParser
) -> bool:
    """True if a command, or one of its options, is not open to members of the group."""
    command = command_of(words)
    if command is None:
        return True
    # The defaults are those of the same command without any argument but a placeholder.
    plain = vars(parser.parse_args([*command, *(("x",) if command == ("plan",) else ())]))
    return any(
        value != plain.get(name)
        for name, value in vars(options).items()
        if name not in LOOKS[command] and name != "command"
    )
