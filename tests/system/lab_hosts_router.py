# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rented servers as providers hand them out, and how they talk to the outside.

Each is the ``Vps`` of ``lab_vps`` with other addresses and routes, from lines of ip(8).
"""

import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lab_vps
from lab_base import CHECKOUT, PYTHON, Result, end, ip, run, spawn, wait_for
from lab_nodes import INTERNET
from lab_servers import ECHO_PORT, Server
from lab_vps import INTERNET6, NAMESPACE, NIC, SWITCH, Vps, greeting, provider

SSH = 22
ADDRESS, FLOATING, THIRD = "198.51.100.10", "198.51.100.60", "198.51.100.61"
FAR = tuple(f"203.0.113.{last}" for last in (80, 81, 82, 83))
"""Servers beyond the provider's router; the first is INTERNET."""

FAR6 = (INTERNET6, "2001:db8:ffff::81")


@contextmanager
def server(*lines: str, provided: tuple[str, ...] = ()) -> Iterator[Vps]:
    """A server with one NIC, configured by these lines; ``provided`` are lines of its provider."""
    with ExitStack() as stack:
        world = stack.enter_context(Vps(configured=False))
        ip(
            *(f"address add {address}/32 dev lo" for address in FAR[1:]),
            f"address add {FAR6[1]}/128 dev lo nodad",
            *provided,
            namespace=NAMESPACE,
        )
        for address in (*FAR[1:], FAR6[1]):
            served = Server(NAMESPACE, "tcp", ECHO_PORT, address=address)
            stack.callback(served.close)
        run("ip", "link", "set", NIC, "up")
        for line in lines:
            run("ip", *line.split())
            if "rule add" in line:
                rule = line.replace("rule add", "rule del").split()
                stack.callback(run, "ip", *rule, check=False)
        yield world


def sources(namespace: str | None = None) -> dict[str, str]:
    """The address by which each server beyond sees who asks: the host, or a namespace."""
    return {far: greeting(far, ECHO_PORT, namespace) for far in FAR}


def seen6(addresses: tuple[str, ...]) -> dict[str, str]:
    """The host in IPv6: as whom it leaves, by each of its addresses, and who gets in by each."""
    seen = {f"to {far}": greeting(far, ECHO_PORT) for far in FAR6}
    for own in addresses:
        seen[f"by {own}"] = greeting(INTERNET6, ECHO_PORT, source=own)
        with_outside = greeting(own, SSH, NAMESPACE, source=INTERNET6)
        seen[f"into {own}"] = with_outside
    return seen


@contextmanager
def dhcp_server(*options: str, leases: str | Path = "/dev/null") -> Iterator[None]:
    """A DHCP server at the provider's, with these options of dnsmasq(8)."""
    process = spawn(
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--port=0",
        "--user=root", "--bind-interfaces", f"--interface={SWITCH}", "--no-ping",
        f"--dhcp-leasefile={leases}", "--dhcp-authoritative", *options, namespace=NAMESPACE,
    )  # fmt: skip
    try:
        wait_for(lambda: ":0043 " in provider("cat", "/proc/net/udp"), what="the DHCP server")
        yield
    finally:
        end(process)


SESSION = f"""\
    import os, socket, subprocess, sys
    listener = socket.create_server(("", int(sys.argv[1])))
    print("ready", flush=True)
    connection, _ = listener.accept()
    done = subprocess.run(sys.argv[2:], env={{"PATH": os.environ["PATH"], "PYTHONPATH":
        "{CHECKOUT}"}}, capture_output=True, text=True)
    print(done.returncode, done.stderr, flush=True)
"""
"""A login daemon: it takes one client, and runs a command for it as sudo(8) would."""

COMMAND = (PYTHON, "-m", "libvirt_natns")


def typed_over(port: int, address: str, client: str | None, *arguments: str) -> str:
    """virt-natns, typed over a connection from ``client`` to a port; returns status and stderr."""
    daemon = spawn(PYTHON, "-c", textwrap.dedent(SESSION), str(port), *COMMAND, *arguments)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == "ready\n"
    with lab_vps.dialled(address, port, client):
        said = daemon.stdout.read()
    end(daemon)
    return said


def typed_by_ssh(variable: str, *arguments: str) -> Result:
    """virt-natns, typed in a session with this SSH_CONNECTION, by sudo(8)."""
    inner = ("env", "-u", "SSH_CONNECTION", *COMMAND, *arguments)
    # With a command behind it, the shell does not become the command itself.
    return run(
        "sh", "-c", '"$@"; exit $?', "sh", *inner, check=False,
        env={"SSH_CONNECTION": variable, "PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip


def lease_of_networkd(client_id: str, address: str = ADDRESS) -> Path:
    """The file of systemd-networkd that notes the lease of the NIC."""
    index = Path("/sys/class/net", NIC, "ifindex").read_text().strip()
    file = Path("/run/systemd/netif/leases", index)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "# This is private data. Do not parse.\n"
        f"ADDRESS={address}\nNETMASK=255.255.255.0\nSERVER_ADDRESS=198.51.100.1\n"
        f"LIFETIME=120\nCLIENTID={client_id}\n"
    )
    return file


assert FAR[0] == INTERNET
