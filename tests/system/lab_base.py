# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ground floor of the lab: paths, commands, waiting, and the sandbox's marks.

The lab stands outside libvirt-natns: it looks at the kernel with ip, nft and
plain sockets, so that it can judge what the code under test did.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".cache"
PYTHON = "/usr/bin/python3"
CONFIG_FILE = Path("/etc/libvirt-natns/config.toml")

MARKER = "LIBVIRT_NATNS_SANDBOX"

FORKED = frozenset({"check", "sync", "status"})
"""Commands that tests run often, and that end by themselves."""

Result = subprocess.CompletedProcess[str]
T = TypeVar("T")


class LabError(Exception):
    """The lab itself could not do what a test or the demo asked for."""


class CommandError(LabError):
    """A command failed; carries all of its output.

    ``result`` is the finished process: returncode, stdout, stderr.
    """

    def __init__(self, result: Result) -> None:
        command = " ".join(result.args)
        output = (result.stdout + result.stderr).strip()
        super().__init__(f"{command}: exit status {result.returncode}\n{output}")
        self.result = result


def require_sandbox() -> None:
    """Raise LabError unless this process runs inside contrib/sandbox.

    The mark in the environment alone proves nothing: /run must be the sandbox's
    own, and no interface may belong to a real device.
    """
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    private_run = any(line.startswith("sandbox /run tmpfs ") for line in mounts)
    real = [link for link in Path("/sys/class/net").iterdir() if (link / "device").exists()]
    if os.environ.get(MARKER) != "1" or not private_run or real:
        raise LabError("this changes networks and libvirt: run it with contrib/sandbox")


def inside(namespace: str | None, command: tuple[str, ...]) -> tuple[str, ...]:
    """The command that runs ``command`` in a namespace; None means right here."""
    return ("ip", "netns", "exec", namespace, *command) if namespace else command


def run(
    *command: str | Path,
    namespace: str | None = None,
    check: bool = True,
    timeout: float = 30.0,
    input: str | None = None,  # noqa: A002 - named as in subprocess
    env: dict[str, str] | None = None,
) -> Result:
    """Run a command to its end and return it with its output as text.

    ``namespace`` is a name known to ``ip netns``; ``timeout`` is in seconds;
    ``env`` is added to the environment.  Raises CommandError for a non-zero exit
    status where ``check`` is true, and LabError when the time is up.
    """
    __tracebackhide__ = True  # for pytest: show the caller's line
    words = inside(namespace, tuple(os.fspath(word) for word in command))
    try:
        result = subprocess.run(
            words,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env={**os.environ, **env} if env else None,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(words)}: not done after {timeout} s") from error
    if check and result.returncode != 0:
        raise CommandError(result)
    return result


def spawn(*command: str | Path, namespace: str | None = None) -> subprocess.Popen[str]:
    """Start a command that goes on running; its caller ends it with ``end``."""
    words = inside(namespace, tuple(os.fspath(word) for word in command))
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def end(process: subprocess.Popen[str], timeout: float = 5.0) -> tuple[str, str]:
    """End a spawned command (TERM, then KILL) and return its stdout and stderr."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def wait_for(
    predicate: Callable[[], T],
    timeout: float = 5.0,
    what: str = "",
    interval: float = 0.02,
) -> T:
    """Call ``predicate`` until it returns something true, and return that.

    Raises LabError naming ``what`` after ``timeout`` seconds.
    """
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise LabError(f"waited {timeout} s in vain for {what or predicate}")
        time.sleep(interval)


def virsh(*arguments: str, check: bool = True, timeout: float = 60.0) -> Result:
    """Run virsh on the sandbox's libvirtd; its error line is in ``.stderr``."""
    __tracebackhide__ = True
    return run("virsh", "-q", *arguments, check=check, timeout=timeout)


def write_config(toml_text: str) -> None:
    """Replace /etc/libvirt-natns/config.toml (the sandbox's)."""
    CONFIG_FILE.parent.mkdir(parents=True, exist_ok=True)
    CONFIG_FILE.write_text(toml_text)


def remove_config() -> None:
    """Go back to no configuration file at all."""
    CONFIG_FILE.unlink(missing_ok=True)


def natns(*arguments: str, check: bool = True, timeout: float = 60.0) -> Result:
    """Run ``virt-natns ARGUMENTS`` from the checkout."""
    __tracebackhide__ = True
    command = (PYTHON, "-m", "libvirt_natns", *arguments)
    if not FORKED.intersection(arguments[:1]) or threading.active_count() > 1:
        env = {"PYTHONPATH": os.fspath(CHECKOUT)}
        return run(*command, check=check, timeout=timeout, env=env)
    result = _forked(command, arguments, timeout)
    if check and result.returncode != 0:
        raise CommandError(result)
    return result


def _forked(command: tuple[str, ...], arguments: tuple[str, ...], timeout: float) -> Result:
    """Run a command of virt-natns in a copy of this process, without another interpreter."""
    from libvirt_natns.cli import commands  # once, where it is needed

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            _become(partial(commands.main, list(arguments)), out.fileno(), err.fileno())
        deadline = time.monotonic() + timeout
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise LabError(f"{' '.join(command)}: not done after {timeout} s")
            time.sleep(0.002)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
        return Result(list(command), os.waitstatus_to_exitcode(ended[1]), *said)


def _become(command: Callable[[], int], out: int, err: int) -> NoReturn:
    """Be the command, and end."""
    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        status = command()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def install_natns(*options: str) -> Result:
    """Install the hooks from the checkout, as ``virt-natns install`` does."""
    return natns("install", *options)


def uninstall_natns() -> Result:
    """Remove the hooks again."""
    return natns("uninstall")
