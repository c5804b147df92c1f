# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host with networks that are not ours, and how far guests get on it.

    ours, in lab on virbr10     \\                     / world, by br0
    control (libvirt's NAT)      >-- the host ------- {  mgmt 172.30.0.5, by a NIC of its own
    victim (libvirt's NAT)      /                     \\ box 172.17.0.2, a container on docker0
    secret (isolated, enabled="no")
    twin, in a network like lab, with the same addresses

Every probe goes from our guest, from the control and from the host at the same time: the
host shows that a victim answers.
"""

import io
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from lab import (
    INTERNET,
    FastGuest,
    LabError,
    Libvirtd,
    Node,
    Provider,
    isolated,
    remove_config,
    run,
    snapshot,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from lab_chains import by_chain
from lab_firewalls import KINDS
from lab_servers import WEB_PORT
from lab_sides import Answer

from libvirt_natns.cli import commands

QUIET = 0.7
"""Seconds of waiting for what should not come."""

HOST = "192.168.0.2"
MGMT, BOX, SECRET, VICTIM = "172.30.0.5", "172.17.0.2", "10.9.0.5", "192.168.150.5"
TWIN_PORT = 84
NOT_OURS = '<natns:nat xmlns:natns="urn:libvirt-natns:1" enabled="no"/>'


def _forward(port: int, to: int, guest: str, clients: str = "") -> str:
    return (
        f"<natns:portForward guestAddress='{guest}' {clients}>"
        f"<natns:range start='{port}' to='{to}'/></natns:portForward>"
    )


def _nat(*forwards: str) -> str:
    return f"<natns:nat xmlns:natns='urn:libvirt-natns:1'>{''.join(forwards)}</natns:nat>"


PUBLISHED = _nat(
    _forward(8080, WEB_PORT, "10.0.0.5"),
    _forward(8081, WEB_PORT, "10.0.0.5", "address='127.0.0.1'"),
    _forward(8082, WEB_PORT, "10.0.0.5", "source='192.168.152.0/24'"),
    _forward(8083, WEB_PORT, "10.0.0.5", f"source='{HOST}'"),
)
TWINS = _nat(_forward(8084, TWIN_PORT, "10.0.0.7"))

Target = tuple[str, int]

BRIDGE_NF = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def command(*arguments: str) -> Answer:
    """``virt-natns`` in this very process, which is quicker."""
    said = io.StringIO()
    with redirect_stdout(said):
        status = commands.main(list(arguments))
    return Answer(status, said.getvalue(), "")


def sync() -> None:
    """Put all rules of ours in place."""
    assert command("sync").status == 0


class Reached(NamedTuple):
    """The names of what each client reaches."""

    ours: set[str]
    control: set[str]
    host: set[str]


def nat_network(name: str, bridge: str, subnet: str) -> str:
    """The XML of a stock NAT network of libvirt's; ``subnet`` are its first three octets."""
    return (
        f"<network><name>{name}</name><forward mode='nat'/><bridge name='{bridge}' delay='0'/>"
        f"<ip address='{subnet}.1' netmask='255.255.255.0'><dhcp>"
        f"<range start='{subnet}.50' end='{subnet}.99'/></dhcp></ip></network>"
    )


def use_iptables(which: str) -> None:
    """Let iptables be iptables-nft or iptables-legacy, for all programs of the sandbox."""
    for name in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            link = Path(f"/etc/alternatives/{name}{suffix}")
            link.unlink(missing_ok=True)
            link.symlink_to(f"/usr/sbin/{name}-{which}{suffix}")


def on_a_link(stack: ExitStack, name: str, link: str, here: str, there: str) -> Node:
    """A machine behind a NIC of the host's, or a container behind a bridge."""
    bridge = f"h-{name}"
    run("ip", "link", "add", bridge, "type", "bridge")
    stack.callback(run, "ip", "link", "del", bridge, check=False)
    node = stack.enter_context(Node(name, bridge))
    run("ip", "link", "set", f"p-{name}", "nomaster")
    run("ip", "link", "del", bridge)
    if link == "docker0":
        run("ip", "link", "add", link, "type", "bridge")
        stack.callback(run, "ip", "link", "del", link, check=False)
        run("ip", "link", "set", f"p-{name}", "master", link)
        run("ip", "link", "set", link, "up")
    elif link != f"p-{name}":
        run("ip", "link", "set", f"p-{name}", "down")
        run("ip", "link", "set", f"p-{name}", "name", link)
        # The node does not know this name, and the kernel ends a namespace's links late.
        stack.callback(run, "ip", "link", "del", link, check=False)
        run("ip", "link", "set", link, "up")
    run("ip", "address", "add", f"{here}/24", "dev", link)
    node.add_address(f"{there}/24")
    node.add_route("default", here)
    return node


def transit_address(network: str) -> str:
    """The address of a network's namespace on the transit bridge."""
    shown = run("ip", "-o", "-4", "-n", f"nat-{network}", "address", "show", "upstream").stdout
    return shown.split()[3].partition("/")[0]


def guest_on(stack: ExitStack, name: str, bridge: str, address: str) -> FastGuest:
    """A guest whose gateway is the first address of its subnet."""
    guest = stack.enter_context(FastGuest(bridge, name=name))
    guest.static(f"{address}/24", f"{address.rpartition('.')[0]}.1")
    return guest


class House:
    """Everything above; guests ``ours`` and ``control`` and the host itself probe."""

    def __init__(self, stack: ExitStack, firewall: str) -> None:
        self.firewall = firewall
        self.provider = stack.enter_context(Provider())
        write_config(f'firewall = "{firewall}"\n')
        stack.callback(remove_config)
        self._start_networks(stack)
        self.ours = guest_on(stack, "ours", "virbr10", "10.0.0.5")
        self.control = guest_on(stack, "control", "virbr52", "192.168.152.5")
        self.targets = self._published(stack) | self._victims(stack)

    @staticmethod
    def _start_networks(stack: ExitStack) -> None:
        def started(name: str, xml: str) -> None:
            stack.callback(virsh, "net-undefine", name, check=False)
            stack.callback(virsh, "net-destroy", name, check=False)
            start_network(xml)

        started("control", nat_network("control", "virbr52", "192.168.152"))
        started("victim", nat_network("victim", "virbr50", "192.168.150"))
        started("secret", isolated("secret", "virbr51", address="10.9.0.1", metadata=NOT_OURS))
        started("lab", isolated("lab", "virbr10", metadata=PUBLISHED))
        started("twin", isolated("twin", "virbr11", metadata=TWINS))

    def _published(self, stack: ExitStack) -> dict[str, Target]:
        """Ports of ours and of a twin's, who has the address of ours, too."""
        self.ours.serve("http", WEB_PORT)
        twin = guest_on(stack, "twin", "virbr11", "10.0.0.7")
        twin.add_address("10.0.0.5/24")
        twin.serve("http", TWIN_PORT)
        transit = transit_address("lab")
        ports = {"published": 8080, "for 127.0.0.1": 8081, "for control": 8082, "for host": 8083}
        return {
            "twin": ("10.0.0.7", TWIN_PORT),
            "published by twin": (HOST, 8084),
            "published by twin, transit": (transit_address("twin"), 8084),
            **{name: (HOST, port) for name, port in ports.items()},
            **{f"{name}, transit": (transit, port) for name, port in ports.items()},
        }

    @staticmethod
    def _victims(stack: ExitStack) -> dict[str, Target]:
        """What is no business of guests'; and the outside, which is."""
        victim = guest_on(stack, "victim", "virbr50", VICTIM)
        secret = guest_on(stack, "secret", "virbr51", SECRET)
        mgmt = on_a_link(stack, "mgmt", "p-mgmt", "172.30.0.1", MGMT)
        box = on_a_link(stack, "box", "docker0", "172.17.0.1", BOX)
        box.serve("http", 443)
        for node in (victim, secret, mgmt, box):
            node.serve("http", WEB_PORT)
        return {
            "world": (INTERNET, WEB_PORT),
            "victim": (VICTIM, WEB_PORT),
            "secret": (SECRET, WEB_PORT),
            "mgmt": (MGMT, WEB_PORT),
            "container": (BOX, WEB_PORT),
            "published container": (HOST, 8443),
        }

    def reached(self) -> Reached:
        """What our guest, the control and the host itself reach."""
        by_loopback = {
            f"{name}, loopback": ("127.0.0.1", port)
            for name, (address, port) in self.targets.items()
            if address == HOST
        }
        with ThreadPoolExecutor(3 * len(self.targets) + len(by_loopback)) as pool:
            ours, control, host = (
                {name: pool.submit(reaches, client, *target) for name, target in targets.items()}
                for client, targets in (
                    (self.ours, self.targets),
                    (self.control, self.targets),
                    (None, self.targets | by_loopback),
                )
            )
            return Reached(
                *(
                    {n for n, done in each.items() if done.result()}
                    for each in (ours, control, host)
                )
            )

    @contextmanager
    def firewalled(self, kind: str) -> Iterator[None]:
        """The host's FORWARD chain as that kind of host has it, ours in its place."""
        # ufw closes IPv6, too.
        saved = {each: run(f"{each}-save").stdout for each in ("iptables", "ip6tables")}
        bridge_nf = BRIDGE_NF.read_text() if BRIDGE_NF.exists() else ""
        try:
            if bridge_nf:
                # Docker switches it on.
                BRIDGE_NF.write_text(f"{kind.startswith('docker'):d}")
            run("sh", "-ec", KINDS[kind])
            sync()
            yield
        finally:
            if kind.startswith("ufw"):
                run("sh", "-c", "ufw --force reset; ufw --force disable")
            for program, rules in saved.items():
                run(f"{program}-restore", input=without_ours(rules))
            if bridge_nf:
                BRIDGE_NF.write_text(bridge_nf)
            # It puts ours back, and networks ask the DNS relay again, which ufw had closed.
            sync()


def without_ours(saved: str) -> str:
    """Rules as they were before, but for ours, which come back by themselves."""
    return "\n".join([line for line in saved.splitlines() if "NATNS-" not in line] + [""])


def reaches(client: Node | None, address: str, port: int) -> bool:
    """Whether a connection comes about, from the host itself where ``client`` is None."""
    try:
        if client:
            client.connect(address, port, timeout=QUIET).close()
        else:
            socket.create_connection((address, port), QUIET).close()
    except OSError:
        return False
    return True


@contextmanager
def house(tables: str, firewall: str) -> Iterator[House]:
    """A whole house on a host whose iptables are the "nft" or "legacy" ones.

    Nothing of it is left afterwards.
    """
    daemon = Libvirtd()
    with ExitStack() as stack:
        if tables != "nft":
            use_iptables(tables)
            stack.callback(daemon.restart)
            stack.callback(use_iptables, "nft")
            daemon.restart()
            # libvirt's chains stay.
            daemon.prime()
        stack.enter_context(nothing_more(ours=True))
        # libvirt switches it on for a network with NAT, and leaves it.
        stack.callback(FORWARDING.write_text, FORWARDING.read_text())
        yield House(stack, firewall)


@contextmanager
def nothing_more(*, ours: bool) -> Iterator[None]:
    """The host is the same afterwards; with ``ours`` so are our rules."""
    before = by_chain(snapshot(), ours=ours)
    yield
    try:
        wait_for(lambda: by_chain(snapshot(), ours=ours) == before, timeout=5.0)
    except LabError:
        pytest.fail(f"left behind:\n{before.diff(by_chain(snapshot(), ours=ours))}", pytrace=False)


def chain(name: str) -> list[str]:
    """The rules of a chain of filter, as iptables prints them."""
    return re.findall(rf"^-A {name} (.*)$", run("iptables", "-S", name).stdout, re.MULTILINE)
