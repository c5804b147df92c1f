# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machines of the lab: network namespaces with one interface on a bridge.

``Provider`` is the world outside: the bridge, its router with web, echo and DNS
servers, and any neighbours.  ``FastGuest`` is a guest without a machine: a
namespace whose veth is a port of libvirt's bridge.
"""

import json
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Literal

from lab_base import Closing, LabError, Result, end, ip, run, spawn, wait_for
from lab_servers import ECHO_PORT, WEB_PORT, Server

from libvirt_natns.kernel.netns import entered

INTERFACE = "eth0"
INTERNET = "203.0.113.80"
"""A server beyond the provider's router, reached by a default route only."""

ETH_P_ALL = 3


def forward_at_once(bridge: str) -> None:
    """Let all ports of a bridge forward now, and ports to come from the start.

    libvirt's bridges run the spanning tree, which keeps a new port silent for
    4 s.  While it runs, the kernel refuses to set a port's state by hand, so it
    is turned off: nothing but those delays depends on it in the lab.
    """
    run("ip", "link", "set", bridge, "type", "bridge", "stp_state", "0")
    for port in json.loads(run("bridge", "-j", "link").stdout or "[]"):
        if port.get("master") == bridge and port.get("state") != "forwarding":
            run("bridge", "link", "set", "dev", port["ifname"], "state", "3", check=False)


class Capture:
    """What tcpdump has seen so far, one line a packet (no names, no times)."""

    def __init__(self, namespace: str | None, interface: str, expression: str) -> None:
        words = expression.split()
        options = ("-n", "-e", "-l", "-t", "--immediate-mode")
        self._file = tempfile.NamedTemporaryFile("r", prefix="capture-")  # noqa: SIM115
        self._process = spawn(
            "sh", "-c", 'out=$1; shift; exec tcpdump "$@" >"$out"', "sh", self._file.name,
            *options, "-i", interface, *words, namespace=namespace,
        )  # fmt: skip
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "listening on" in line:
                return
        raise LabError(f"tcpdump refused: {expression}")

    def lines(self) -> list[str]:
        """All packets so far."""
        return Path(self._file.name).read_text(errors="replace").splitlines()

    def close(self) -> None:
        end(self._process)
        self._file.close()


class Node(Closing):
    """A network namespace with ``eth0``, whose other end is a port of ``bridge``.

    ``name`` is the namespace's; the port is called ``p-NAME``, so at most 13
    characters.  Use it as a context manager, or call ``down`` yourself.
    """

    def __init__(
        self, name: str, bridge: str, *, mac: str | None = None, mtu: int | None = None
    ) -> None:
        self.name = name
        self.bridge = bridge
        self.port = f"p-{name}"
        self._servers: list[Server] = []
        try:
            self._connect(mac, mtu)
        except LabError:
            self.down()
            raise

    def _connect(self, mac: str | None, mtu: int | None) -> None:
        size = f"mtu {mtu}" if mtu else ""
        address = f"address {mac}" if mac else ""
        ip(
            f"netns add {self.name}",
            f"link add {self.port} {size} type veth"
            f" peer name {INTERFACE} {address} {size} netns {self.name}",
            f"link set {self.port} master {self.bridge} up",
        )
        ip("link set lo up", f"link set {INTERFACE} up", namespace=self.name)

    def down(self) -> None:
        """Remove the namespace, its servers and its port; missing is fine."""
        while self._servers:
            self._servers.pop().close()
        ip(f"link del {self.port}", f"netns del {self.name}", check=False)

    # --- configuration

    @property
    def mac(self) -> str:
        """The MAC address of eth0."""
        shown = run("ip", "-n", self.name, "-j", "link", "show", INTERFACE)
        return str(json.loads(shown.stdout)[0]["address"])

    def addresses(self) -> list[str]:
        """IPv4 addresses of eth0 with their prefix."""
        links = json.loads(self.run("ip", "-j", "-4", "address", "show", INTERFACE).stdout)
        found = [entry for link in links for entry in link.get("addr_info", [])]
        return [f"{entry['local']}/{entry['prefixlen']}" for entry in found]

    def add_address(self, address: str) -> None:
        """Give eth0 an address with prefix: also to squat on somebody else's."""
        run("ip", "-n", self.name, "address", "add", address, "dev", INTERFACE)

    def add_route(self, destination: str, via: str) -> None:
        """Add or replace a route ("default" included)."""
        run("ip", "-n", self.name, "route", "replace", destination, "via", via)

    def add_neighbour(self, address: str, mac: str) -> None:
        """Fix the MAC address of a neighbour instead of asking by ARP."""
        run("ip", "-n", self.name, "neighbour", "replace", address, "lladdr", mac,
            "dev", INTERFACE)  # fmt: skip

    # --- clients

    def run(self, *command: str | Path, check: bool = True, timeout: float = 30.0) -> Result:
        """Run a command inside, as ``lab.run`` does."""
        return run(*command, namespace=self.name, check=check, timeout=timeout)

    def curl(self, url: str, *options: str, check: bool = True, timeout: float = 5.0) -> str:
        """The body of ``url`` without its last newline; "" for a failure unless ``check``."""
        limit = ("--max-time", str(timeout))
        words = ("curl", "-sS", "--noproxy", "*", *limit, *options, url)
        return self.run(*words, check=check, timeout=timeout + 5).stdout.removesuffix("\n")

    def dig(self, name: str, *options: str, server: str | None = None) -> list[str]:
        """The answers to a DNS question, short form; [] for none or no server.

        Without ``server`` the resolver that ``dhcp`` was given.
        """
        at = (f"@{server}",) if server else ()
        result = self.run("dig", "+short", "+time=1", "+tries=2", *at, *options, name, check=False)
        return [line for line in result.stdout.splitlines() if not line.startswith(";")]

    def ping(self, address: str, *options: str, timeout: int = 1) -> bool:
        """Whether one ICMP echo is answered within ``timeout`` seconds.

        ``options`` are those of busybox: ``-s SIZE``, ``-I ADDRESS``, ``-t TTL``.
        """
        words = ("busybox", "ping", "-c", "1", "-W", str(timeout), *options, address)
        return self.run(*words, check=False).returncode == 0

    def open_socket(
        self,
        protocol: Literal["tcp", "udp"],
        port: int = 0,
        *,
        address: str = "",
        timeout: float = 3.0,
    ) -> socket.socket:
        """A socket in this namespace, bound to a source port; the caller closes it."""
        kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
        with entered(self.name):
            opened = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.settimeout(timeout)
        opened.bind((address, port))
        return opened

    def connect(
        self, address: str, port: int, source_port: int = 0, *, timeout: float = 3.0
    ) -> socket.socket:
        """A TCP connection from a given source port; raises OSError as connect does."""
        here = "::" if ":" in address else ""
        opened = self.open_socket("tcp", source_port, address=here, timeout=timeout)
        try:
            opened.connect((address, port))
        except OSError:
            opened.close()
            raise
        return opened

    def packet_socket(self, timeout: float = 3.0) -> socket.socket:
        """A raw socket on eth0: sends and receives whole Ethernet frames."""
        with entered(self.name):
            opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            opened.bind((INTERFACE, 0))
        opened.settimeout(timeout)
        return opened

    @contextmanager
    def sniff(self, expression: str = "", interface: str = INTERFACE) -> Iterator[Capture]:
        """Capture packets that match a tcpdump expression while the body runs."""
        capture = Capture(self.name, interface, expression)
        try:
            yield capture
        finally:
            capture.close()

    # --- servers

    def serve(
        self, protocol: Literal["http", "tcp", "udp"], port: int, *, address: str = ""
    ) -> Server:
        """Start a server here (see ``Server``); it ends with the node at the latest."""
        server = Server(self.name, protocol, port, address=address, name=self.name)
        self._servers.append(server)
        return server


class FastGuest(Node):
    """A guest as libvirt's bridge sees it, without a machine behind it.

    Its port forwards at once (see ``forward_at_once``) unless ``stp`` is true,
    which leaves the bridge as libvirt made it and costs 4 s.
    """

    def __init__(
        self,
        bridge: str,
        mac: str | None = None,
        name: str = "guest",
        *,
        mtu: int | None = None,
        stp: bool = False,
    ) -> None:
        if not stp:
            forward_at_once(bridge)
        super().__init__(name, bridge, mac=mac, mtu=mtu)
        if not stp:
            forward_at_once(bridge)

    def dhcp(
        self, *, hostname: str | None = None, timeout: float = 10.0, apply: bool = True
    ) -> dict[str, str]:
        """Take a lease and return what was offered, by busybox's names.

        Keys: ip, mask (prefix length), subnet, router, dns, domain, hostname,
        mtu, serverid, lease, staticroutes, ...; absent what was not offered.  With ``apply`` the
        address, router, MTU and resolver are put into force.  Raises LabError
        when nobody offers anything.  The client ends with the lease: no renewal.
        """
        offer = Path(tempfile.mkdtemp(prefix="dhcp-"))
        script = offer / "script"
        script.write_text('#!/bin/sh\n[ "$1" != bound ] || env -0 >"${0%/*}/offer"\n')
        script.chmod(0o755)
        name = ("-x", f"hostname:{hostname}") if hostname else ()
        tries = ("-t", str(max(2, int(timeout))), "-T", "1", "-A", "1")
        wanted = ("-O", "mtu", "-O", "staticroutes", "-O", "search")
        result = self.run(
            "busybox", "udhcpc", "-i", INTERFACE, "-n", "-q", "-f", *tries, *wanted, *name,
            "-s", script, check=False, timeout=timeout + 15,
        )  # fmt: skip
        try:
            if not (offer / "offer").exists():
                raise LabError(f"{self.name}: no DHCP lease: {result.stderr.strip()}")
            values = _offered((offer / "offer").read_text())
        finally:
            for file in offer.iterdir():
                file.unlink()
            offer.rmdir()
        if apply:
            self._apply(values)
        return values

    def _apply(self, offer: dict[str, str]) -> None:
        commands = [
            f"address flush dev {INTERFACE}",
            f"address add {offer['ip']}/{offer['mask']} dev {INTERFACE}",
        ]
        if "mtu" in offer:
            commands.append(f"link set {INTERFACE} mtu {offer['mtu']}")
        for router in offer.get("router", "").split()[:1]:
            commands.append(f"route replace default via {router}")
        ip(*commands, namespace=self.name, family="inet")
        self.resolve_with(*offer.get("dns", "").split(), domain=offer.get("domain"))

    def resolve_with(self, *servers: str, domain: str | None = None) -> None:
        """Make ``servers`` the resolvers of commands that run in this guest."""
        directory = Path("/etc/netns") / self.name
        directory.mkdir(parents=True, exist_ok=True)
        search = [f"search {domain}\n"] if domain else []
        lines = [f"nameserver {server}\n" for server in servers]
        (directory / "resolv.conf").write_text("".join(search + lines))

    def static(self, address: str, gateway: str | None = None) -> None:
        """Set an address with prefix, and a default route, without asking DHCP."""
        commands = [f"address add {address} dev {INTERFACE}"]
        if gateway:
            commands.append(f"route replace default via {gateway}")
        ip(*commands, namespace=self.name)

    def down(self) -> None:
        """Remove the guest with all that belongs to it."""
        super().down()
        (Path("/etc/netns") / self.name / "resolv.conf").unlink(missing_ok=True)


def _offered(environment: str) -> dict[str, str]:
    """The DHCP values in the environment that udhcpc gives its script."""
    pairs = (entry.partition("=") for entry in environment.split("\0") if entry)
    inherited = set(os.environ) | {"interface", "PWD", "SHLVL", "OLDPWD", "_"}
    return {name: value for name, _, value in pairs if name not in inherited}


class Provider(Closing):
    """The provider network: bridge ``br0`` in the host, a router, servers.

    * ``bridge``, with ``host_address`` (with prefix; None for a bridge without
      an address) and the host's default route by ``gateway``;
    * ``router``: the node "upstream" that owns ``gateway`` and, behind it,
      INTERNET.  On both it serves HTTP (``web``, port 80), echo (``tcp`` and
      ``udp``, port 7) and DNS (names in ``dns_records``; a query log);
    * ``dhcp``, two addresses, makes its DNS server hand out leases as well;
    * /etc/resolv.conf of the host names the router.

    Neighbours made with ``neighbour`` go down with the provider.
    """

    def __init__(
        self,
        *,
        bridge: str = "br0",
        subnet: str = "192.168.0.0/24",
        gateway: str = "192.168.0.1",
        host_address: str | None = "192.168.0.2/24",
        dhcp: tuple[str, str] | None = None,
        mtu: int | None = None,
    ) -> None:
        self.bridge = bridge
        self.subnet = IPv4Network(subnet)
        self.gateway = gateway
        self.host_address = host_address
        self.dns_records = {
            "www.example.test": INTERNET,
            "router.example.test": gateway,
        }
        self._nodes: list[Node] = []
        self._dns: subprocess.Popen[str] | None = None
        self._queries = Path(tempfile.mkdtemp(prefix="provider-")) / "queries"
        try:
            self._up(dhcp, mtu)
        except Exception:
            self.down()
            raise

    def _up(self, dhcp: tuple[str, str] | None, mtu: int | None) -> None:
        size = f"mtu {mtu}" if mtu else ""
        ip(
            f"link add {self.bridge} {size} type bridge stp_state 0",
            f"link set {self.bridge} up",
        )
        prefix = self.subnet.prefixlen
        self.router = self.neighbour("upstream", f"{self.gateway}/{prefix}", default=None, mtu=mtu)
        run("ip", "-n", "upstream", "address", "add", f"{INTERNET}/32", "dev", "lo")
        self.router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        if self.host_address:
            ip(
                f"address add {self.host_address} dev {self.bridge}",
                f"route add default via {self.gateway}",
            )
        self.web = self.router.serve("http", WEB_PORT)
        self.tcp = self.router.serve("tcp", ECHO_PORT)
        self.udp = self.router.serve("udp", ECHO_PORT)
        self._start_dns(dhcp)
        self._resolv_conf()

    def _start_dns(self, dhcp: tuple[str, str] | None) -> None:
        records = [f"--host-record={name},{to}" for name, to in self.dns_records.items()]
        lease = []
        if dhcp:
            lease = [f"--dhcp-range={dhcp[0]},{dhcp[1]},1h", "--dhcp-leasefile=/dev/null",
                     "--dhcp-authoritative", "--no-ping"]  # fmt: skip
        self._dns = spawn(
            "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=",
            "--user=root", "--no-resolv", "--no-hosts", "--bind-interfaces", "--log-queries",
            f"--interface={INTERFACE}", "--except-interface=lo",
            f"--log-facility={self._queries}", *records, *lease, *self._advertising(),
            namespace="upstream",
        )  # fmt: skip
        wait_for(lambda: "started" in self._log(), what="the provider's dnsmasq")

    def _advertising(self) -> list[str]:
        """What makes its router tell of itself in IPv6: nothing here."""
        return []

    def _log(self) -> str:
        if self._dns and self._dns.poll() is not None:
            raise LabError(f"the provider's dnsmasq: {end(self._dns)[1]}")
        return self._queries.read_text() if self._queries.exists() else ""

    def _resolv_conf(self) -> None:
        file = Path("/etc/resolv.conf")
        file.unlink(missing_ok=True)  # often a link into another directory
        file.write_text(f"nameserver {self.gateway}\n")

    def queries(self) -> list[tuple[str, str]]:
        """DNS questions that reached the provider: (name, address of the asker)."""
        return re.findall(r"query\[\w+\] (\S+) from (\S+)", self._log())

    def neighbour(
        self,
        name: str,
        address: str | None = None,
        *,
        default: str | None = "gateway",
        mac: str | None = None,
        mtu: int | None = None,
    ) -> Node:
        """Another machine on the provider's bridge.

        ``address`` comes with its prefix; None for a machine that only listens.
        ``default``: its router; None for no default route.
        """
        node = Node(name, self.bridge, mac=mac, mtu=mtu)
        self._nodes.append(node)
        if address:
            node.add_address(str(IPv4Interface(address)))
        if address and default:
            node.add_route("default", self.gateway if default == "gateway" else default)
        return node

    @property
    def address(self) -> str | None:
        """The host's own address on the bridge, without prefix."""
        return self.host_address.partition("/")[0] if self.host_address else None

    def config(
        self,
        *,
        firewall: str = "auto",
        pool: str = "192.168.0.100-192.168.0.199",
        scope: str = "isolated",
        more: str = "",
    ) -> str:
        """A configuration whose default upstream, "provider", is this network.

        ``more`` is added to ``[upstreams.provider]`` and may go on with tables.
        """
        return "\n".join(
            [
                f'scope = "{scope}"',
                f'firewall = "{firewall}"',
                'upstream = "provider"',
                "[upstreams.provider]",
                'kind = "bridge"',
                f'bridge = "{self.bridge}"',
                f'subnet = "{self.subnet}"',
                f'gateway = "{self.gateway}"',
                f'pool = ["{pool}"]',
                f'dns = ["{self.gateway}"]',
                more,
                "",
            ]
        )

    def down(self) -> None:
        """Remove everything again; missing is fine."""
        if self._dns:
            end(self._dns)
            self._dns = None
        while self._nodes:
            self._nodes.pop().down()
        run("ip", "link", "del", self.bridge, check=False)
        self._queries.unlink(missing_ok=True)
        if self._queries.parent.exists():
            self._queries.parent.rmdir()
