# SPDX-License-Identifier: LGPL-2.1-or-later
"""The peers: programs of others for the same purpose.

Each has ``up``, which is timed, and ``down``, which is not.  ``COMMANDS`` shows their commands;
the documents stand in bench/peers/.
"""

import json
import os
import shlex
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import lab
from lab_hosts_pasta import NAMESPACE, options

PEERS = Path(__file__).resolve().parent / "peers"
CNI = Path("/usr/lib/cni")
NETAVARK = Path("/usr/lib/podman/netavark")
NETAVARK_STATE = "/run/tmp/netavark"


def command(*words: str, env: dict[str, str] | None = None, text: str = "") -> str:
    """Run a command with no more around it than needed; return its output.

    Raises LabError where it fails.
    """
    done = subprocess.run(
        words, env={**os.environ, **(env or {})}, input=text, capture_output=True, text=True
    )
    if done.returncode:
        raise lab.LabError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout


class Recipe:
    """By hand, on a bridge of libvirt's that has the address 10.0.0.1/24."""

    def __init__(self, bridge: str) -> None:
        self.bridge = bridge

    def up(self) -> None:
        command(os.fspath(PEERS / "recipe-up"), self.bridge)

    def down(self) -> None:
        for end in ("i", "u"):
            command("ip", "link", "del", f"{self.bridge}-{end}")
        command("ip", "netns", "del", f"hand-{self.bridge}")
        command("ip", "address", "add", "10.0.0.1/24", "dev", self.bridge)


class Cni:
    """A container of CNI's plugins bridge and portmap, as a runtime calls them."""

    NAME = "bench-cni"

    def __init__(self) -> None:
        self.bridge = (PEERS / "cni-bridge.json").read_text()
        self.portmap = json.loads((PEERS / "cni-portmap.json").read_text())
        self._whole = ""

    def _plugin(self, name: str, verb: str, document: str) -> str:
        env = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": self.NAME,
            "CNI_NETNS": f"/run/netns/{self.NAME}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": os.fspath(CNI),
        }
        return command(os.fspath(CNI / name), env=env, text=document)

    def up(self) -> None:
        command("ip", "netns", "add", self.NAME)
        result = json.loads(self._plugin("bridge", "ADD", self.bridge))
        self._whole = json.dumps({**self.portmap, "prevResult": result})
        self._plugin("portmap", "ADD", self._whole)

    def down(self) -> None:
        self._plugin("portmap", "DEL", self._whole)
        self._plugin("bridge", "DEL", self.bridge)
        command("ip", "netns", "del", self.NAME)


class Netavark:
    """A container of Podman's; another one keeps the bridge there, as ours is."""

    NAME = "bench-netavark"
    OTHER = "bench-kept"

    def __init__(self) -> None:
        self.document = (PEERS / "netavark.json").read_text()
        other: dict[str, Any] = json.loads(self.document)
        other |= {"container_id": self.OTHER, "container_name": self.OTHER, "port_mappings": []}
        other["networks"]["bench"]["static_ips"] = ["10.89.0.3"]
        self._other = json.dumps(other)
        command("ip", "netns", "add", self.OTHER)
        self._run("setup", self.OTHER, self._other)

    def _run(self, verb: str, name: str, document: str) -> None:
        options = ("--config", NETAVARK_STATE)
        command(os.fspath(NETAVARK), *options, verb, f"/run/netns/{name}", text=document)

    def up(self) -> None:
        command("ip", "netns", "add", self.NAME)
        self._run("setup", self.NAME, self.document)

    def down(self) -> None:
        self._run("teardown", self.NAME, self.document)
        command("ip", "netns", "del", self.NAME)

    def close(self) -> None:
        self._run("teardown", self.OTHER, self._other)
        command("ip", "netns", "del", self.OTHER)


COMMANDS = {
    "the recipe": (PEERS / "recipe-up").read_text().partition("set -eu\n")[2].strip(),
    "CNI": "\n".join(
        [
            f"ip netns add {Cni.NAME}",
            f"export CNI_COMMAND=ADD CNI_CONTAINERID={Cni.NAME} CNI_IFNAME=eth0",
            f"export CNI_NETNS=/run/netns/{Cni.NAME} CNI_PATH={CNI}",
            f"{CNI}/bridge <bench/peers/cni-bridge.json >result",
            f"{CNI}/portmap <bench/peers/cni-portmap.json  # and result as its prevResult",
        ]
    ),
    "netavark": "\n".join(
        [
            f"ip netns add {Netavark.NAME}",
            f"{NETAVARK} --config {NETAVARK_STATE} setup /run/netns/{Netavark.NAME}"
            " <bench/peers/netavark.json",
        ]
    ),
    "native NAT": "virsh net-start NAME  # <forward mode='nat'/>, <ip> with <dhcp>",
    "pasta": shlex.join(["pasta", *options(NAMESPACE, tcp="192.168.0.2/9000:80")]),
    "iperf3": "iperf3 -c ADDRESS -t SECONDS [-P 8] [-R]",
    "sockperf": "sockperf ping-pong --tcp -i ADDRESS -p 11111 -t SECONDS",
}
"""The commands of each peer, for readers who want to check."""


def shown() -> dict[str, str]:
    """Return the commands with the documents, each on as few lines as possible."""
    files = {f"bench/peers/{file.name}": file.read_text() for file in sorted(PEERS.glob("*.json"))}
    return COMMANDS | {name: _narrow(json.loads(text)) for name, text in files.items()}


def _narrow(document: dict[str, Any]) -> str:
    return textwrap.fill(json.dumps(document), 110, break_on_hyphens=False)
