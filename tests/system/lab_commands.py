# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands of virt-natns without a start of the interpreter each: forks of one that has all loaded.

The suite runs hundreds of commands, and most of a command's time is the import of its
modules.  A server, a process of one thread, has imported them and forks for each command.
Only what an interpreter does before ``main`` is not tested this way; test_commands and
test_install do that.
"""

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
from pathlib import Path

FAILED = 70
"""Exit status of a command that could not be run at all."""


class CommandServer:
    """The server's process, and its client; may be used by many threads at once."""

    def __init__(self, checkout: Path) -> None:
        self._path = tempfile.mktemp(prefix="natns-commands-")
        environment = {**os.environ, "PYTHONPATH": os.fspath(checkout)}
        self._process = subprocess.Popen(
            ["/usr/bin/python3", __file__, self._path],
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
            connection.connect(self._path)
            request = json.dumps([arguments, dict(os.environ), os.fspath(Path.cwd())]).encode()
            socket.send_fds(connection, [request], [out.fileno(), err.fileno()])
            try:
                status = connection.recv(16)
            except TimeoutError:
                return None
            out.seek(0)
            err.seek(0)
            texts = [file.read().decode(errors="replace") for file in (out, err)]
        return int(status or FAILED), texts[0], texts[1]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(OSError):
            Path(self._path).unlink()


# -- the server ----------------------------------------------------------------


def serve(path: str) -> None:
    """Run commands for ever, each in a process of its own."""
    import libvirt  # noqa: F401 - loaded for the commands

    from libvirt_natns.cli import commands

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
        print("listening", flush=True)
        while True:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                attend(connection, commands.main)
            connection.close()


def attend(connection: socket.socket, main: Callable[[], int]) -> None:
    """Run one command, and kill it where its client does not wait any longer."""
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 18, 2)
    if not data:
        os._exit(0)
    pid = os.fork()
    if not pid:
        connection.close()
        become(main, data, descriptors)
    ended = os.pidfd_open(pid)
    ready = select.select([ended, connection.fileno()], [], [])[0]
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):
        connection.send(str(status).encode())
    os._exit(0)


def become(main: Callable[[], int], data: bytes, descriptors: list[int]) -> None:
    """Be the command, and end."""
    status = FAILED
    try:
        arguments, environment, directory = json.loads(data)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), *descriptors)):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        sys.argv = ["virt-natns", *arguments]
        status = main()
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
