# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host with networks that are not ours, and how far guests get on it.

    ours  (lab, virbr10)        \\                     / world, by br0
    control (libvirt's NAT)      >-- the host ------- {  mgmt 172.30.0.5, by a NIC of its own
    victim (libvirt's NAT),     /                     \\ box 172.17.0.2, a container on docker0
    secret (isolated, enabled="no")

Every probe goes from our guest and from the control at the same time.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lab import (
    INTERNET,
    FastGuest,
    Libvirtd,
    Node,
    Provider,
    isolated,
    natns,
    run,
    start_network,
    virsh,
    write_config,
)
from lab_servers import WEB_PORT

QUIET = 0.7
"""Seconds of waiting for what should not come."""

MGMT, BOX, SECRET = "172.30.0.5", "172.17.0.2", "10.9.0.5"
NOT_OURS = '<natns:nat xmlns:natns="urn:libvirt-natns:1" enabled="no"/>'

REJECT = "iptables -I FORWARD -d 172.30.0.0/24 -j REJECT"

DOCKER_NAT = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8443 -j DNAT --to-destination 172.17.0.2:443
COMMIT
"""
DOCKER_20 = f"""{DOCKER_NAT}*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-I FORWARD -i docker0 -o docker0 -j ACCEPT
-I FORWARD -i docker0 ! -o docker0 -j ACCEPT
-I FORWARD -o docker0 -j DOCKER
-I FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-I FORWARD -j DOCKER-ISOLATION-STAGE-1
-I FORWARD -j DOCKER-USER
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 443 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""
DOCKER_28 = f"""{DOCKER_NAT}*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-INTERNAL - [0:0]
:DOCKER-USER - [0:0]
-I FORWARD -j DOCKER-FORWARD
-I FORWARD -j DOCKER-USER
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 443 -j ACCEPT
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-INTERNAL
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
COMMIT
"""
RESTORE = "iptables-restore --noflush <<'END'\n{}END\n"

UFW = """sed -i 's/^IPT_SYSCTL=.*/IPT_SYSCTL=/; s/^IPV6=.*/IPV6=no/' /etc/default/ufw
sed -i 's/^DEFAULT_FORWARD_POLICY=.*/DEFAULT_FORWARD_POLICY="{policy}"/' /etc/default/ufw
ufw --force enable; ufw route reject to 172.30.0.0/24
"""
"""The program itself, with the rule that stands for all of an administrator's."""

KINDS = {
    "plain": REJECT,
    "drops": f"iptables -P FORWARD DROP; {REJECT}",
    "rejects": f"{REJECT}; iptables -A FORWARD -m comment --comment 'the rest' -j REJECT",
    "docker-20.10": RESTORE.format(DOCKER_20) + REJECT,
    "docker-28": RESTORE.format(DOCKER_28) + REJECT,
    "ufw": UFW.format(policy="DROP"),
    "ufw-reject": UFW.format(policy="REJECT"),
}
"""What hosts have in their FORWARD chain, as commands."""


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
    run("ip", "address", "add", f"{here}/24", "dev", link)
    node.add_address(f"{there}/24")
    node.add_route("default", here)
    return node


class House:
    """Everything above; ``ours`` and ``control`` are the guests that probe."""

    def __init__(self, stack: ExitStack, firewall: str) -> None:
        self.firewall = firewall
        self.provider = stack.enter_context(Provider())
        write_config(f'firewall = "{firewall}"\n')
        start_network(nat_network("control", "virbr52", "192.168.152"))
        start_network(nat_network("victim", "virbr50", "192.168.150"))
        start_network(isolated("secret", "virbr51", address="10.9.0.1", metadata=NOT_OURS))
        start_network(isolated("lab", "virbr10"))
        guests = [("ours", "virbr10"), ("control", "virbr52"), ("victim", "virbr50")]
        self.ours, self.control, victim = (
            stack.enter_context(FastGuest(bridge, name=name)) for name, bridge in guests
        )
        for guest in (self.ours, self.control, victim):
            guest.dhcp()
        secret = stack.enter_context(FastGuest("virbr51", name="secret"))
        secret.static(f"{SECRET}/24", "10.9.0.1")
        mgmt = on_a_link(stack, "mgmt", "p-mgmt", "172.30.0.1", MGMT)
        box = on_a_link(stack, "box", "docker0", "172.17.0.1", BOX)
        box.serve("http", 443)
        for node in (victim, secret, mgmt, box):
            node.serve("http", WEB_PORT)
        self.targets = {
            "world": (INTERNET, WEB_PORT),
            "victim": (victim.addresses()[0].partition("/")[0], WEB_PORT),
            "secret": (SECRET, WEB_PORT),
            "mgmt": (MGMT, WEB_PORT),
            "container": (BOX, WEB_PORT),
            "published container": ("192.168.0.2", 8443),
        }

    def reached(self) -> tuple[set[str], set[str]]:
        """What our guest reaches, and what the control does."""
        with ThreadPoolExecutor(2 * len(self.targets)) as pool:
            asked = [
                {
                    name: pool.submit(reaches, guest, *target)
                    for name, target in self.targets.items()
                }
                for guest in (self.ours, self.control)
            ]
            ours, control = ({n for n, done in each.items() if done.result()} for each in asked)
        return ours, control

    @contextmanager
    def firewalled(self, kind: str) -> Iterator[None]:
        """The host's FORWARD chain as that kind of host has it, ours in its place."""
        saved = run("iptables-save").stdout
        try:
            run("sh", "-ec", KINDS[kind])
            natns("sync")
            yield
        finally:
            if kind.startswith("ufw"):
                run("sh", "-c", "ufw --force reset; ufw --force disable")
            # The next sync puts ours back.
            run("iptables-restore", input=without_ours(saved))


def without_ours(saved: str) -> str:
    """Rules as they were before, but for ours, which come back by themselves."""
    return "\n".join([line for line in saved.splitlines() if "NATNS-" not in line] + [""])


def reaches(client: Node, address: str, port: int) -> bool:
    """Whether a connection comes about."""
    try:
        client.connect(address, port, timeout=QUIET).close()
    except OSError:
        return False
    return True


@contextmanager
def house(tables: str, firewall: str) -> Iterator[House]:
    """A whole house on a host whose iptables are the "nft" or "legacy" ones."""
    daemon = Libvirtd()
    with ExitStack() as stack:
        if tables != "nft":
            use_iptables(tables)
            daemon.restart()
            stack.callback(daemon.restart)
            stack.callback(use_iptables, "nft")
        try:
            yield House(stack, firewall)
        finally:
            for network in ("lab", "secret", "victim", "control"):
                virsh("net-destroy", network, check=False)
                virsh("net-undefine", network, check=False)


def chain(name: str) -> list[str]:
    """The rules of a chain of filter, as iptables prints them."""
    return re.findall(rf"^-A {name} (.*)$", run("iptables", "-S", name).stdout, re.MULTILINE)
