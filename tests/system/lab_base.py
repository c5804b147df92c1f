# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ground floor of the lab: paths, commands, waiting, and the sandbox's marks.

The lab stands outside libvirt-natns: it looks at the kernel with ip, nft and
plain sockets, so that it can judge what the code under test did.
"""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

from lab_commands import CommandServer

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".cache"
PYTHON = "/usr/bin/python3"
CONFIG_FILE = Path("/etc/libvirt-natns/config.toml")

MARKER = "LIBVIRT_NATNS_SANDBOX"
TEST_MACHINE = "libvirt-natns test machine"
"""What the firmware of tests/machine calls the hardware."""

Result = subprocess.CompletedProcess[str]
T = TypeVar("T")

command_server: CommandServer | None = None
patience = 1.0
"""Factor of all limits of time: a machine under emulation needs more."""
virsh_library: Callable[[tuple[str, ...], float], Result | None] | None = None
"""Does the commonest commands of virsh without a process (``lab_virsh.run``), in tests."""


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


class Closing:
    """A part of the lab that its ``__init__`` begins, and that ends with a ``with``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def down(self) -> None:
        """Remove all that belongs to it; missing is fine."""
        raise NotImplementedError


def require_sandbox() -> None:
    """Raise LabError unless this process runs inside contrib/sandbox, or in a test machine.

    The mark in the environment alone proves nothing: /run must be the sandbox's
    own, and no interface may belong to a real device.
    """
    if is_test_machine():
        return
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    private_run = any(line.startswith("sandbox /run tmpfs ") for line in mounts)
    real = [link for link in Path("/sys/class/net").iterdir() if (link / "device").exists()]
    if os.environ.get(MARKER) != "1" or not private_run or real:
        raise LabError("this changes networks and libvirt: run it with contrib/sandbox")


def is_test_machine() -> bool:
    """True on the emulated hardware of tests/machine, which no other machine has."""
    try:
        return Path("/sys/class/dmi/id/product_name").read_text().strip() == TEST_MACHINE
    except OSError:
        return False


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
            timeout=timeout * patience,
            env={**os.environ, **env} if env else None,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(words)}: not done after {error.timeout} s") from error
    if check and result.returncode != 0:
        raise CommandError(result)
    return result


def ip(
    *commands: str, namespace: str | None = None, check: bool = True, family: str = "any"
) -> Result:
    """Run commands of ip(8) in one process, in a namespace of ``ip netns``.

    Ends with a command that fails; without ``check`` runs all of them.  ``family``: of
    addresses and routes that a command names without one.
    """
    __tracebackhide__ = True
    where = ("-n", namespace) if namespace else ()
    options = ("-family", family) if family != "any" else ()
    force = () if check else ("-force",)
    return run(
        "ip", *where, *options, *force, "-batch", "-", input="\n".join(commands), check=check
    )


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
    timeout *= patience
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
    result = None
    if virsh_library is not None:
        try:
            result = virsh_library(arguments, timeout * patience)
        except TimeoutError as error:
            raise LabError(f"virsh {' '.join(arguments)}: not done after {timeout} s") from error
    if result is None:
        return run("virsh", "-q", *arguments, check=check, timeout=timeout)
    if check and result.returncode != 0:
        raise CommandError(result)
    return result


def write_config(toml_text: str) -> None:
    """Replace /etc/libvirt-natns/config.toml (the sandbox's)."""
    CONFIG_FILE.parent.mkdir(parents=True, exist_ok=True)
    CONFIG_FILE.write_text(toml_text)


def remove_config() -> None:
    """Go back to no configuration file at all."""
    CONFIG_FILE.unlink(missing_ok=True)


def natns(*arguments: str, check: bool = True, timeout: float = 60.0) -> Result:
    """Run ``virt-natns ARGUMENTS`` from the checkout, by the command server where one runs."""
    __tracebackhide__ = True
    if command_server is None:
        return natns_anew(*arguments, check=check, timeout=timeout)
    command = (PYTHON, "-m", "libvirt_natns", *arguments)
    answer = command_server.run(arguments, timeout)
    if answer is None:
        raise LabError(f"{' '.join(command)}: not done after {timeout} s")
    result = Result(list(command), *answer)
    if check and result.returncode != 0:
        raise CommandError(result)
    return result


def natns_anew(*arguments: str, check: bool = True, timeout: float = 60.0) -> Result:
    """Run ``virt-natns ARGUMENTS`` in an interpreter that loads everything itself."""
    __tracebackhide__ = True
    command = (PYTHON, "-m", "libvirt_natns", *arguments)
    env = {"PYTHONPATH": os.fspath(CHECKOUT)}
    return run(*command, check=check, timeout=timeout, env=env)


def start_command_server() -> CommandServer:
    """Have all later commands run by a server."""
    global command_server
    command_server = CommandServer(CHECKOUT)
    return command_server


def end_command_server() -> None:
    """End the server, if there is one."""
    global command_server
    if command_server is not None:
        command_server.end()
    command_server = None


def install_natns(*options: str) -> Result:
    """Install the hooks from the checkout, as ``virt-natns install`` does."""
    return natns("install", *options)


def uninstall_natns() -> Result:
    """Remove the hooks again."""
    return natns("uninstall")
