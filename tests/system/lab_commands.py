# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands of virt-natns without a start of the interpreter each: forks of one that has all loaded.

The suite runs thousands of commands and hooks, and most of their time is the import of
modules.  A server, a process of one thread, has imported them and forks for each request.
A client here sends a command; ``lab_interpreter`` sends the number of a process to stand for.
Only what an interpreter does before ``main`` is not tested this way; test_commands,
test_install and the files with real interpreters do that.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

FAILED = 70
"""Exit status of a command that could not be run at all."""

LOADED = (
    "libvirt",
    "libvirt_natns.cli.commands",
    "libvirt_natns.hook",
    "libvirt_natns.documents.ownership",
    "libvirt_natns.documents.xml_sniff",
    "libvirt_natns.engine.events",
    "libvirt_natns.engine.host_forwarding",
    "libvirt_natns.service.client",
    # Later than the others in a hook: a change of a link, and the service itself.
    "libvirt_natns.kernel.route_socket",
    "libvirt_natns.service.daemon",
)

FLAGS = (os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_APPEND)

NOT_SERVED = "none"
"""Answer to a process that must do its work itself."""


class CommandServer:
    """The server's process, and its client; may be used by many threads at once.

    ``interpreter``: what ``virt-natns install`` writes into hooks; "" for what it chooses.
    """

    def __init__(self, checkout: Path) -> None:
        self.interpreter = ""
        self.path = tempfile.mktemp(prefix="natns-commands-")
        environment = {**os.environ, "PYTHONPATH": os.fspath(checkout)}
        self._process = subprocess.Popen(
            ["/usr/bin/python3", __file__, self.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it listens

    def run(self, arguments: tuple[str, ...], timeout: float) -> tuple[int, str, str] | None:
        """Return a command's exit status and what it wrote; None where the time is up."""
        with (
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
        ):
            connection.settimeout(timeout)
            connection.connect(self.path)
            words = [arguments, dict(os.environ), os.fspath(Path.cwd()), self.interpreter]
            request = json.dumps(words).encode()
            socket.send_fds(connection, [request], [out.fileno(), err.fileno()])
            try:
                status = connection.recv(16)
                # Until all of it is gone: a test looks at the processes next.
                while connection.recv(16):
                    continue
            except TimeoutError:
                return None
            out.seek(0)
            err.seek(0)
            texts = [file.read().decode(errors="replace") for file in (out, err)]
        return int(status or FAILED), texts[0], texts[1]

    def start(self, arguments: tuple[str, ...], directory: Path, log: BinaryIO) -> "Started":
        """Start a command that lasts, in a session of its own; ``log`` gets what it writes."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self.path)
        words = [arguments, dict(os.environ), os.fspath(directory), self.interpreter, True]
        with Path(os.devnull).open("wb") as nothing:
            files = [nothing.fileno(), log.fileno()]
            socket.send_fds(connection, [json.dumps(words).encode()], files)
        return Started(connection, int(connection.recv(16)))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(OSError):
            Path(self.path).unlink()


class Started:
    """A command that lasts, with the methods of ``subprocess.Popen`` that tests use.

    The server kills the command with the end of this process.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self._connection = connection
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status; None while the command runs."""
        with suppress(TimeoutError, BlockingIOError):
            return self.wait(0)
        return None

    def wait(self, timeout: float) -> int:
        """Return the exit status.  Raises TimeoutError where the command goes on."""
        if self._status is None:
            self._connection.settimeout(timeout)
            self._status = int(self._connection.recv(16) or FAILED)
            self._connection.close()
        return self._status

    def kill(self) -> None:
        """End the command by SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


# -- the server ----------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A command that runs for a client."""

    connection: socket.socket
    pid: int
    process: int
    """A descriptor that can be read when the command has ended."""


def serve(path: str) -> None:
    """Run commands for ever, each in a process of its own."""
    load()
    commands: dict[int, Running] = {}
    poll = select.poll()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        poll.register(listener, select.POLLIN)
        print("listening", flush=True)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == listener.fileno():
                    begun = begin(listener.accept()[0])
                    poll.register(begun.process, select.POLLIN)
                    # For its end alone: what it has to say is for the command.
                    poll.register(begun.connection, 0)
                    commands[begun.process] = commands[begun.connection.fileno()] = begun
                elif descriptor in commands:
                    attend(commands, poll, descriptor)


def begin(connection: socket.socket) -> Running:
    """Start the command of a client."""
    pid = os.fork()
    if not pid:
        # Those of other commands end with these.
        os.closerange(3, connection.fileno())
        os.closerange(connection.fileno() + 1, 1024)
        become(connection)
    return Running(connection, pid, os.pidfd_open(pid))


def attend(commands: dict[int, Running], poll: select.poll, descriptor: int) -> None:
    """Tell a client how its command has ended; kill a command whose client has gone."""
    running = commands[descriptor]
    if descriptor != running.process:
        del commands[descriptor]
        poll.unregister(descriptor)
        os.kill(running.pid, signal.SIGKILL)
        return
    for each in (running.process, running.connection.fileno()):
        if commands.pop(each, None):
            poll.unregister(each)
    os.close(running.process)
    status = os.waitstatus_to_exitcode(os.waitpid(running.pid, 0)[1])
    with suppress(OSError):
        running.connection.send(str(status).encode())
    running.connection.close()


def load() -> None:
    """Import what commands and hooks need."""
    for module in LOADED:
        importlib.import_module(module)
    # A fork that collects garbage would copy all of it.
    gc.collect()
    gc.freeze()


def command(data: bytes, descriptors: list[int], connection: socket.socket) -> Callable[[], int]:
    """Take the place of ``virt-natns ARGUMENTS``; returns its ``main``."""
    arguments, environment, directory, interpreter, *lasts = json.loads(data)
    if lasts:
        os.setsid()
        connection.send(str(os.getpid()).encode())
    surround([os.open(os.devnull, os.O_RDONLY), *descriptors], environment, directory)
    sys.argv = ["virt-natns", *arguments]
    from libvirt_natns.cli import commands, hook_files

    if interpreter:
        hook_files.interpreter = lambda: interpreter  # type: ignore[assignment]
    return commands.main


def stand_for(pid: int) -> Callable[[], int]:
    """Take the place of an interpreter with ``-c``: its files, environment and directory.

    Raises OSError and ValueError where that cannot be.
    """
    process = Path(f"/proc/{pid}")
    words = [os.fsdecode(word) for word in (process / "cmdline").read_bytes().split(b"\0")[:-1]]
    # perl, the script, and what the script was given.
    at = words.index("-c", 2)
    if any(not word.startswith("-") for word in words[2:at]):
        raise ValueError("a script, with its own -c")
    files = [os.open(process / "fd" / str(number), FLAGS[number]) for number in range(3)]
    entries = (process / "environ").read_bytes().split(b"\0")
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if entry)
    environment = {key: value for key, _, value in pairs}
    surround(files, environment, os.fspath((process / "cwd").readlink()))
    sys.argv = ["-c", *words[at + 2 :]]
    code = compile(words[at + 1], "<string>", "exec")

    def body() -> int:
        try:
            exec(code, {"__name__": "__main__"})
        except Exception:
            traceback.print_exc()
            return 1
        return 0

    return body


def surround(files: list[int], environment: dict[str, str], directory: str) -> None:
    """Take standard files, environment and directory."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115


def become(connection: socket.socket) -> None:
    """Be the command that a client asks for, and end."""
    status = FAILED
    try:
        data, descriptors, _, _ = socket.recv_fds(connection, 1 << 18, 2)
        if data.isdigit():
            try:
                body = stand_for(int(data))
            except (OSError, ValueError):
                connection.send(NOT_SERVED.encode())
                os._exit(0)
        elif data:
            body = command(data, descriptors, connection)
        else:
            os._exit(0)
        connection.close()
        status = body()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
