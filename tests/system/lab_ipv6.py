# SPDX-License-Identifier: LGPL-2.1-or-later
"""The provider's network in both families, and networks whose guests have both."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab_base import run, wait_for
from lab_libvirt import Host
from lab_nodes import INTERFACE, FastGuest, Node, Provider
from lab_servers import ECHO_PORT, WEB_PORT

SUBNET6 = "2001:db8:77::/64"
GATEWAY6 = "2001:db8:77::1"
HOST6 = "2001:db8:77::2"
PREFIXES6 = "2001:db8:100::/56"
BRIDGE_MAC = "52:54:00:ff:00:01"
INTERNET6 = "2001:db8:ffff::80"
"""A server beyond the provider's router."""


class DualProvider(Provider):
    """``Provider`` with IPv6 on the same wire: a router, the same servers, a name.

    ``advertised``: the router tells of itself and of the prefix.  Without ``host6``
    the host has no global address there.
    """

    def __init__(self, *, advertised: bool = False, host6: bool = True) -> None:
        self._advertised = advertised
        self._host6 = host6
        super().__init__()

    def _up(self, dhcp: tuple[str, str] | None, mtu: int | None) -> None:
        super()._up(dhcp, mtu)
        self.link_local = link_local(self.router)

    def _start_dns(self, dhcp: tuple[str, str] | None) -> None:
        # As a bridge with a NIC of its own: else it would change with each new port.
        run("ip", "link", "set", self.bridge, "address", BRIDGE_MAC)
        self.dns_records["www6.example.test"] = INTERNET6
        settle(self.router)
        for address, link in ((f"{GATEWAY6}/64", INTERFACE), (f"{INTERNET6}/128", "lo")):
            run("ip", "-n", "upstream", "address", "add", address, "dev", link, "nodad")
        self.router.run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
        if self._host6:
            run("ip", "address", "add", f"{HOST6}/64", "dev", self.bridge, "nodad")
            run("ip", "-6", "route", "add", "default", "via", GATEWAY6)
        self.web6 = self.router.serve("http", WEB_PORT, address="::")
        self.tcp6 = self.router.serve("tcp", ECHO_PORT, address="::")
        self.udp6 = self.router.serve("udp", ECHO_PORT, address="::")
        super()._start_dns(dhcp)

    def _advertising(self) -> list[str]:
        if not self._advertised:
            return []
        subnet = SUBNET6.partition("/")[0]
        return ["--enable-ra", f"--dhcp-range={subnet},ra-only,64,1h", "--ra-param=*,4,600"]

    def config6(
        self,
        *,
        ipv4: bool = True,
        pool6: str | None = "2001:db8:77::100-2001:db8:77::1ff",
        prefixes6: Sequence[str] = (),
        gateway6: str | None = GATEWAY6,
        firewall: str = "auto",
        more: str = "",
    ) -> str:
        """``config`` with IPv6; ``ipv4`` False leaves all of IPv4 out."""
        lines = [f'subnet6 = "{SUBNET6}"', "probe = 0.05"]
        lines += [f'gateway6 = "{gateway6}"'] if gateway6 else []
        lines += [f'pool6 = ["{pool6}"]'] if pool6 else []
        lines += [f"prefixes6 = {json.dumps(list(prefixes6))}"] if prefixes6 else []
        text = self.config(firewall=firewall, more="\n".join([*lines, more]))
        if ipv4:
            return text
        gone = ("subnet =", "gateway =", "pool =", "dns =")
        kept = [line for line in text.splitlines() if not line.startswith(gone)]
        kept.insert(kept.index(f'subnet6 = "{SUBNET6}"'), f'dns = ["{GATEWAY6}"]')
        return "\n".join(kept)


def settle(node: Node) -> None:
    """Have a machine's addresses usable at once: nobody else has them."""
    for key in ("accept_dad=0", "dad_transmits=0", "router_solicitation_delay=0"):
        node.run("sysctl", "-qw", f"net.ipv6.conf.{INTERFACE}.{key}")
    run("ip", "-n", node.name, "link", "set", INTERFACE, "down")
    run("ip", "-n", node.name, "link", "set", INTERFACE, "up")
    wait_for(lambda: link_local(node), what=f"the link-local address of {node.name}")


def addresses6(node: Node, scope: str = "global") -> list[str]:
    """IPv6 addresses of a machine's eth0 that can be used, without prefix."""
    told = node.run("ip", "-j", "-6", "address", "show", INTERFACE, "scope", scope).stdout
    found = [entry for link in json.loads(told or "[]") for entry in link.get("addr_info", [])]
    return [str(entry["local"]) for entry in found if "local" in entry and "tentative" not in entry]


def link_local(node: Node) -> str:
    """A machine's own address on its link; "" while it has none."""
    return next(iter(addresses6(node, "link")), "")


def static6(node: Node, address: str, gateway: str | None = None) -> None:
    """Give a machine an address with prefix, and a default route; it makes none itself."""
    node.run("sysctl", "-qw", f"net.ipv6.conf.{INTERFACE}.accept_ra=0")
    run("ip", "-n", node.name, "address", "add", address, "dev", INTERFACE, "nodad")
    if gateway:
        run("ip", "-n", node.name, "-6", "route", "replace", "default", "via", gateway,
            "dev", INTERFACE)  # fmt: skip


def slaac(guest: FastGuest, prefix: str) -> str:
    """Have a guest make itself an address from what its router advertises."""
    guest.run("sysctl", "-qw", f"net.ipv6.conf.{INTERFACE}.accept_ra=1")
    settle(guest)

    def own() -> str:
        return next((each for each in addresses6(guest) if each.startswith(prefix)), "")

    return wait_for(own, timeout=10, what=f"an address in {prefix} of {guest.name}")


def leased6(node: Node, limit: int = 15) -> dict[str, str]:
    """What DHCPv6 gives, in the words of dhclient's environment; the address is set."""
    client = ("timeout", str(limit), "dhclient", "-6", "-1", "-v", "-D", "LL")
    directory = Path(tempfile.mkdtemp(prefix="dhcpv6-"))
    script = directory / "script"
    script.write_text('#!/bin/sh\n[ "$reason" != BOUND6 ] || env >"${0%/*}/env"\n')
    script.chmod(0o755)
    files = ("-lf", str(directory / "leases"), "-pf", str(directory / "pid"))
    try:
        node.run(*client, "-sf", script, *files, "eth0")
        node.run("dhclient", "-6", "-x", *files, "eth0", check=False)
        lines = (directory / "env").read_text().splitlines()
        found = dict(line.split("=", 1) for line in lines if line.startswith("new_"))
    finally:
        shutil.rmtree(directory)
    node.run("ip", "address", "replace", f"{found['new_ip6_address']}/128", "dev", "eth0")
    return found


def dual(
    name: str,
    bridge: str,
    *,
    address6: str = "fd00:10::1",
    prefix: int = 64,
    hosts: Sequence[Host] = (),
    dhcp6: tuple[str, str] | None = None,
    ipv4: bool = True,
    metadata: str = "",
) -> str:
    """The XML of an isolated network with both families, or IPv6 alone."""
    from lab_libvirt import isolated

    served = f'<dhcp><range start="{dhcp6[0]}" end="{dhcp6[1]}"/></dhcp>' if dhcp6 else ""
    six = f'  <ip family="ipv6" address="{address6}" prefix="{prefix}">{served}</ip>'
    if not ipv4:
        return isolated(name, bridge, address=None, metadata=metadata, more=six)
    return isolated(name, bridge, hosts=hosts, metadata=metadata, more=six)


def route_to_host(provider: DualProvider, prefix: str = PREFIXES6) -> None:
    """Have the provider's router lead a prefix to the host."""
    told = run("ip", "-j", "-6", "address", "show", provider.bridge, "scope", "link").stdout
    found = [entry for link in json.loads(told) for entry in link.get("addr_info", [])]
    host = next(entry["local"] for entry in found if "local" in entry)
    run("ip", "-n", "upstream", "-6", "route", "replace", prefix, "via", host, "dev", INTERFACE)
