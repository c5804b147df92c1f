# SPDX-License-Identifier: LGPL-2.1-or-later
"""A long-lived nft for the host that takes commands by the line: ``nft -i``.

A start of nft costs 7 ms beside libvirt's rules: most of it for the program's libraries and
those of xtables.  A program that has started lists the ruleset in 2 to 3 ms.  The child ends
when its process closes the pipe, in any way.

A line is one transaction.  nft answers a listing on standard output, complains on standard
error, and answers a load with nothing.  So the two commands of ``END`` follow each line.  Their
answer shows that the line is done, and that its complaint has been written.

Limits: the child serves the host's namespace alone, that of the first process.  ``ask`` returns
None elsewhere, for a long script, and where nft does not talk in this way (a build without
libedit).  The caller then starts nft for these commands alone.
"""

import os
import select
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from libvirt_natns.errors import FirewallError
from libvirt_natns.kernel import processes

OPTIONS = ("-i", "-j", "-s", "-t")
END = b"describe ip saddr\nlist tables arp\n"
"""Its first answer is no JSON, as that of each listing is; its second makes nft flush both."""
MARK = b"payload expression"
COMPLAINT = b"Error:"
LISTING = b'{"nftables": ['

LONGEST = 1 << 14
"""Octets of a line that a pipe holds in any case, so that writing never waits."""
GREETING_LIMIT = 2.0
"""Seconds that nft has to answer ``END`` for the first time."""
WORN_OUT = 1 << 18
"""Octets of commands after which another child takes over: nft keeps all lines as a history."""

OWN_NAMESPACE = Path("/proc/thread-self/ns/net")
HOST_NAMESPACE = Path("/proc/1/ns/net")


@dataclass(frozen=True, slots=True)
class NftAnswer:
    """The listing that a line has asked for, "" for none, and nft's complaint, "" for none."""

    listing: str
    complaint: str


class BrokenChildError(Exception):
    """The child has ended, is stuck, or talks in another way."""


@dataclass(slots=True)
class NftChild:
    """An nft that runs, with the program's file, and the octets that were sent to it."""

    process: "subprocess.Popen[bytes]"
    program: tuple[int, int]
    sent: int = 0
    complaint: bytearray = field(default_factory=bytearray)

    @property
    def is_fit(self) -> bool:
        """True if the child runs, is not worn out, and its program was not upgraded."""
        return (
            self.process.poll() is None
            and self.sent < WORN_OUT
            and self.program == _file_of(str(self.process.args[0]))  # type: ignore[index]
        )

    def send(self, line: bytes) -> None:
        """Send a line with commands.  Raises BrokenChildError: the line was not carried out."""
        assert self.process.stdin is not None
        self.complaint.clear()
        self.sent += len(line)
        try:
            os.write(self.process.stdin.fileno(), line + b"\n" + END)
        except OSError as error:
            raise BrokenChildError from error

    def answer(self, seconds: float) -> NftAnswer:
        """Return the answer to the line that was sent.

        Raises BrokenChildError: the line may have been carried out, or not.
        """
        deadline = time.monotonic() + seconds
        said = bytearray()
        while not _is_whole(said):
            self._read(said, deadline)
        *listings, mark, _ = bytes(said).splitlines()
        if not mark.startswith(MARK) or not all(each.startswith(LISTING) for each in listings):
            raise BrokenChildError
        # The complaint about a line is written ahead of the answer to the next line.
        self._read(said, 0)
        listing = listings[0] if listings else b""
        if COMPLAINT not in self.complaint:
            # A mere warning.
            self.complaint.clear()
        # A comment in a foreign table consists of any bytes.
        return NftAnswer(
            listing.decode(errors="surrogateescape"), self.complaint.decode(errors="replace")
        )

    def end(self) -> None:
        """End the child, even one that is stuck."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def _read(self, said: bytearray, deadline: float) -> None:
        """Read what nft has written; both pipes, or nft would wait for a reader of the other."""
        poll = select.poll()
        targets: dict[int, bytearray] = {}
        for stream, target in ((self.process.stdout, said), (self.process.stderr, self.complaint)):
            assert stream is not None
            targets[stream.fileno()] = target
            poll.register(stream, select.POLLIN)
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready and deadline:
            raise BrokenChildError
        for descriptor, _ in ready:
            some = os.read(descriptor, 1 << 20)
            if not some:
                raise BrokenChildError
            targets[descriptor] += some


_lock = threading.Lock()
_children: dict[int, NftChild] = {}
"""The child of this process, by the id of this process: a fork must not talk to it."""
_silent: set[tuple[int, int]] = set()
"""Files of programs that do not talk by the line."""


def ask(program: str, commands: str, seconds: float, *, changes: bool = True) -> NftAnswer | None:
    """Have the long-lived nft carry out commands in one transaction; None where it cannot.

    Where the result is None, no command was carried out.  Raises FirewallError where the child
    ended amid a change, so that only the rules tell whether the change was made.
    """
    line = one_line(commands)
    if len(line) > LONGEST or not _in_host():
        return None
    with _lock:
        child = _fit_child(program)
        if child is None:
            return None
        try:
            child.send(line)
        except BrokenChildError:
            _end()
            return None
        try:
            return child.answer(seconds)
        except BaseException as error:
            # The rest of the answer would pass for that to the next line.
            _end()
            if not isinstance(error, BrokenChildError):
                raise
            if not changes:
                return None
            raise FirewallError("nft ended, or did not answer, amid a change") from error


def one_line(commands: str) -> bytes:
    """Return commands, or a script of several lines, as one line."""
    return os.fsencode("; ".join(line.strip() for line in commands.splitlines() if line.strip()))


def _is_whole(said: bytes | bytearray) -> bool:
    """True if the answer to ``END`` is there: the mark, and a listing behind it."""
    _, mark, rest = said.rpartition(MARK)
    return bool(mark) and rest.count(b"\n") >= len(END.splitlines())


def _in_host() -> bool:
    with suppress(OSError):
        return OWN_NAMESPACE.stat().st_ino == HOST_NAMESPACE.stat().st_ino
    return False


def _fit_child(program: str) -> NftChild | None:
    """Return a child that is fit, if need be another one; None where nft does not talk."""
    child = _children.get(os.getpid())
    if child is not None and child.is_fit:
        return child
    _end()
    file = _file_of(program)
    if file in _silent:
        return None
    child = _started(program, file)
    if child is None:
        _silent.add(file)
    else:
        _children[os.getpid()] = child
    return child


def _end() -> None:
    child = _children.pop(os.getpid(), None)
    if child is not None:
        child.end()


def _file_of(program: str) -> tuple[int, int]:
    """Return what changes with an upgrade of a program: the file's number and time."""
    try:
        status = Path(program).stat()
    except OSError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns


def _started(program: str, file: tuple[int, int]) -> NftChild | None:
    """Start a child and hear it answer; None where it does not."""
    try:
        process = subprocess.Popen(
            [program, *OPTIONS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            # It writes a history of commands, if it finds a home.
            env={"PATH": processes.PATH, "LC_ALL": "C", "HOME": "/nonexistent"},
        )
    except OSError:
        return None
    child = NftChild(process, file)
    try:
        child.send(b"")
        child.answer(GREETING_LIMIT)
    except BrokenChildError:
        child.end()
        return None
    return child
