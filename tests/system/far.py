# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another host on the provider's network: a sandbox in the sandbox, with a libvirt of its own."""

import subprocess
from pathlib import Path

from lab import CHECKOUT, FastGuest, LabError, Result, forward_at_once, run
from lab_base import Closing, ip
from lab_nodes import INTERFACE

from libvirt_natns.kernel.netns import entered

NAMESPACE = "host-b"
"""Under which its network namespace is known here."""

PORT = "p-host-b"


class FarHost(Closing):
    """A host with ``eth0`` on a bridge of this one; ends with the ``with``."""

    def __init__(self, bridge: str, address: str) -> None:
        # It ends with its standard input.
        self._process = subprocess.Popen(
            [CHECKOUT / "contrib" / "sandbox", "--libvirt", "--", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._connect(bridge, address)
        except LabError:
            self.down()
            raise

    def _connect(self, bridge: str, address: str) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("there\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "there\n":
            raise LabError("the other host does not come up")
        self._pid = _innermost(self._process.pid)
        run("ip", "netns", "attach", NAMESPACE, str(self._pid))
        ip(
            f"link add {PORT} master {bridge} type veth peer name {INTERFACE} netns {NAMESPACE}",
            f"link set {PORT} up",
        )
        ip(
            f"address add {address} dev {INTERFACE}",
            f"link set {INTERFACE} up",
            namespace=NAMESPACE,
        )

    def run(self, *command: str) -> Result:
        """Run a command there, in the checkout."""
        inside = ("nsenter", "--target", str(self._pid), "--all", f"--wd={CHECKOUT}")
        return run(*inside, *command)

    def down(self) -> None:
        """Pull the plug; all that runs there ends."""
        ip(f"link del {PORT}", f"netns del {NAMESPACE}", check=False)
        self._process.communicate(timeout=30)


def _innermost(pid: int) -> int:
    """The last of a line of processes, each of which has started the next."""
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found = [
            int(child)
            for child in children
            if Path(f"/proc/{child}/comm").read_text().strip() in ("sandbox", "unshare", "cat")
        ]
        if not found:
            return pid
        (pid,) = found


class FarGuest(FastGuest):
    """A guest on a bridge of the other host."""

    def __init__(self, bridge: str, mac: str, name: str, *, mtu: int) -> None:
        super().__init__(bridge, mac, name, mtu=mtu, stp=True)

    def _connect(self, mac: str | None, mtu: int | None) -> None:
        ip(
            f"netns add {self.name}",
            f"link add {self.port} mtu {mtu} type veth"
            f" peer name {INTERFACE} address {mac} mtu {mtu} netns {self.name}",
            f"link set {self.port} netns {NAMESPACE}",
        )
        ip(f"link set {self.port} master {self.bridge} up", namespace=NAMESPACE)
        ip("link set lo up", f"link set {INTERFACE} up", namespace=self.name)
        with entered(NAMESPACE):
            forward_at_once(self.bridge)
