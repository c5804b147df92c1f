# SPDX-License-Identifier: LGPL-2.1-or-later
"""A long-lived nft that takes commands by the line: ``nft -i``.

A start of nft costs 7 ms beside libvirt's rules: most of it for the program's libraries and
those of xtables.  A program that has started lists the ruleset in 2 to 3 ms.  The child ends
when its process closes the pipe, in any way.

A line is one transaction.  The child answers each line on its standard output, or complains
on its standard error.  A load has no answer, so a short listing follows each line.

Limits: the child belongs to the namespace of the thread that starts it.  ``ask`` returns None
in another namespace, for a long script, and where nft cannot talk in this way (a build without
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

from libvirt_natns.kernel import processes

OPTIONS = ("-i", "-j", "-s", "-t")
END = "list tables arp\n"
"""The listing that shows that the commands ahead of it are done."""
ANSWER = b'{"nftables": ['
"""How each listing begins; an nft that shows a prompt begins otherwise."""
COMPLAINT = b"Error:"

LONGEST = 1 << 14
"""Octets of a script that a pipe holds in any case, so that writing never waits."""

OWN_NAMESPACE = Path("/proc/thread-self/ns/net")


@dataclass(frozen=True, slots=True)
class NftAnswer:
    """The listing that a command has printed, "" for none, and nft's complaint, "" for none."""

    listing: str
    complaint: str


class BrokenChildError(Exception):
    """The child has ended, is stuck, or answers in another form."""


@dataclass(slots=True)
class NftChild:
    """An nft that runs: its process, the namespace it belongs to, and what was read ahead."""

    process: "subprocess.Popen[bytes]"
    namespace: int
    read: bytearray = field(default_factory=bytearray)

    def ask(self, line: str, listings: int, seconds: float) -> NftAnswer:
        """Send a line with commands, and return the answer.

        ``listings`` is the number of listings in the line.  Raises BrokenChildError.
        """
        deadline = time.monotonic() + seconds
        assert self.process.stdin is not None
        try:
            os.write(self.process.stdin.fileno(), os.fsencode(f"{line}\n{END}"))
        except OSError as error:
            raise BrokenChildError from error
        first = self._listing(deadline)
        # The child complains ahead of the listing at the end.
        complaint = self._complaint()
        if complaint or not listings:
            return NftAnswer("", complaint)
        self._listing(deadline)
        return NftAnswer(first, "")

    def end(self) -> None:
        """End the child, even one that is stuck."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def _listing(self, deadline: float) -> str:
        """Return the next listing.  Raises BrokenChildError."""
        assert self.process.stdout is not None
        output = self.process.stdout.fileno()
        while b"\n" not in self.read:
            waiting = max(0.0, deadline - time.monotonic())
            poll = select.poll()
            poll.register(output, select.POLLIN)
            some = os.read(output, 1 << 20) if poll.poll(waiting * 1000) else b""
            if not some:
                raise BrokenChildError
            self.read += some
        line, _, rest = bytes(self.read).partition(b"\n")
        self.read = bytearray(rest)
        if not line.startswith(ANSWER):
            raise BrokenChildError
        # A comment in a foreign table consists of any bytes.
        return line.decode(errors="surrogateescape")

    def _complaint(self) -> str:
        assert self.process.stderr is not None
        said = b""
        with suppress(BlockingIOError):
            while some := os.read(self.process.stderr.fileno(), 1 << 16):
                said += some
        return said.decode(errors="replace") if COMPLAINT in said else ""


_lock = threading.Lock()
_children: dict[int, NftChild] = {}
"""The child of this process, by the id of this process: a fork must not talk to it."""
_unusable: set[str] = set()
"""Programs that cannot talk by the line."""


def ask(program: str, commands: str, seconds: float, *, listings: int = 0) -> NftAnswer | None:
    """Have the long-lived nft carry out commands, in one transaction; None where it cannot.

    Where the result is None, no rule has changed, unless the child ended amid its work.
    ``listings`` is the number of listings that the commands ask for, 0 or 1.
    """
    line = one_line(commands)
    if len(line) > LONGEST or program in _unusable:
        return None
    with _lock:
        child = _usable(program, seconds)
        if child is None:
            return None
        try:
            return child.ask(line, listings, seconds)
        except BrokenChildError:
            _children.pop(os.getpid()).end()
            return None


def one_line(commands: str) -> str:
    """Return commands, or a script of several lines, as one line."""
    return "; ".join(line.strip() for line in commands.splitlines() if line.strip())


def _usable(program: str, seconds: float) -> NftChild | None:
    """Return the child for the caller's namespace; None where there is none."""
    try:
        namespace = OWN_NAMESPACE.stat().st_ino
    except OSError:
        return None
    child = _children.get(os.getpid())
    if child is not None and child.process.poll() is not None:
        _children.pop(os.getpid()).end()
        child = None
    if child is None:
        child = _started(program, namespace, seconds)
        if child is None:
            return None
        _children[os.getpid()] = child
    return child if child.namespace == namespace else None


def _started(program: str, namespace: int, seconds: float) -> NftChild | None:
    """Start a child and hear it answer; None, from then on, where it does not."""
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
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    child = NftChild(process, namespace)
    try:
        child.ask(END.strip(), 1, seconds)
    except BrokenChildError:
        child.end()
        _unusable.add(program)
        return None
    return child
