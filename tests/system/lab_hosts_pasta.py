# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest whose namespace pasta joins to the host, beside the kernel's way.

pasta is in Debian's package passt.  ``NATNS_PASTA`` names another one, by its command.

    sock 10.0.0.5 -- br-joined -- joined -- tap -- pasta -- sockets of the host
"""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lab import FastGuest, LabError, Node, end_process, run, spawn, wait_for
from lab_base import Closing

BRIDGE, NAMESPACE, GUEST = "br-joined", "joined", "10.0.0.5"
TAP, INSIDE, GATEWAY = "outside", "198.19.0.2", "198.19.0.1"

RULES = f"""
table ip nat {{
  chain out {{ type nat hook postrouting priority 100; oifname "{TAP}" masquerade; }}
  chain in {{ type nat hook prerouting priority -100; iifname "{TAP}" dnat to {GUEST}; }}
}}
"""
"""As a namespace of ours has them: guests share its address, and published ports lead to one."""


PING_GROUPS = Path("/proc/sys/net/ipv4/ping_group_range")


def program() -> list[str]:
    """Return the command of pasta.  Raises LabError where there is none."""
    command = shlex.split(os.environ.get("NATNS_PASTA", "pasta"))
    if shutil.which(command[0]) is None:
        raise LabError(f"{command[0]} is missing: apt-get install passt")
    return command


def options(namespace: str, tcp: str = "none", udp: str = "none") -> list[str]:
    """Return the options that join a namespace; the ports are as its -t and -u have them.

    pasta would copy addresses and routes of the host, and not start without any.  Here they
    are given, and the link ``lo`` in place of the host's.
    """
    return [
        "-f", "-q", "--runas", "0", "--netns", f"/run/netns/{namespace}", "--config-net",
        "-i", "lo", "-I", TAP, "-a", INSIDE, "-n", "30", "-g", GATEWAY,
        "-M", "02:00:00:00:00:01", "-4", "--no-map-gw", "--no-dhcp", "-m", "1500",
        "-t", tcp, "-u", udp, "-T", "none", "-U", "none",
    ]  # fmt: skip


class Pasta(Closing):
    """pasta between a namespace and the host, with ports that it forwards."""

    def __init__(self, namespace: str, *, tcp: str = "none", udp: str = "none") -> None:
        self._namespace = namespace
        self.process = spawn(*program(), *options(namespace, tcp, udp))
        wait_for(self._joined, what="pasta to join a namespace to the host")

    def _joined(self) -> bool:
        if self.process.poll() is not None:
            raise LabError(f"pasta has ended: {self.process.communicate()[1]}")
        routes = run("ip", "-n", self._namespace, "route", "show", "default", check=False)
        return TAP in routes.stdout

    def memory(self) -> int:
        """Return the memory that belongs to this process alone, in kB."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        rows = [line.split() for line in text.splitlines() if line.startswith("Private_")]
        return sum(int(row[1]) for row in rows)

    def kill(self) -> None:
        """End it without a chance to say so."""
        self.process.kill()
        self.process.wait()

    def down(self) -> None:
        end_process(self.process)


class Joined(Closing):
    """The namespace, its guest ``sock``, and no pasta yet."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            run("ip", "link", "add", BRIDGE, "type", "bridge")
            stack.callback(run, "ip", "link", "del", BRIDGE, check=False)
            run("ip", "link", "set", BRIDGE, "up")
            router = stack.enter_context(Node(NAMESPACE, BRIDGE))
            router.add_address("10.0.0.1/24")
            router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
            run("nft", "-f", "-", namespace=NAMESPACE, input=RULES)
            self.guest = stack.enter_context(FastGuest(BRIDGE, name="sock"))
            self.guest.static(f"{GUEST}/24", "10.0.0.1")
            self._cleanup = stack.pop_all()

    def down(self) -> None:
        self._cleanup.close()


@contextmanager
def ping_allowed() -> Iterator[None]:
    """Let processes of all groups send echo requests, as a host's sysctl may."""
    before = PING_GROUPS.read_text()
    PING_GROUPS.write_text("0 2147483647")
    try:
        yield
    finally:
        PING_GROUPS.write_text(before)
