# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains that are there for their events: paused, of 16 MiB, with nothing to boot.

Real libvirt, real qemu and real taps, but no machine: what a guest would send
comes from a ``FastGuest`` with the same MAC.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from lab import (
    Node,
    Provider,
    Result,
    Snapshot,
    define_network,
    forward_at_once,
    remove_config,
    run,
    snapshot,
    virsh,
    wait_for,
    write_config,
)

from libvirt_natns.kernel.netns import entered

NAMESPACE = "urn:libvirt-natns:1"
DIRECTORY = Path("/run/tmp")
STATE = Path("/var/lib/libvirt-natns")


def nic(network: str, mac: str) -> str:
    """A NIC in a network."""
    return (
        f"<interface type='network'><mac address='{mac}'/><source network='{network}'/></interface>"
    )


def nic_on(bridge: str, mac: str) -> str:
    """A NIC on a bridge, whatever network that may be."""
    return f"<interface type='bridge'><mac address='{mac}'/><source bridge='{bridge}'/></interface>"


def nat(inside: str) -> str:
    """A ``<natns:nat>`` with these elements."""
    return f'<natns:nat xmlns:natns="{NAMESPACE}">{inside}</natns:nat>'


def ports(*ranges: str, more: str = "") -> str:
    """A ``<natns:portForward>``; each range as its attributes, ``more`` its own."""
    inside = "".join(f"<natns:range {each}/>" for each in ranges)
    return f"<natns:portForward {more}>{inside}</natns:portForward>"


def domain(name: str, *nics: str, publishes: str = "", uuid: str = "", metadata: str = "") -> str:
    """The XML of a domain; ``publishes`` stands inside ``<natns:nat>``."""
    inside = metadata or (nat(publishes) if publishes else "")
    return f"""<domain type='qemu'>
  <name>{name}</name>
  {f"<uuid>{uuid}</uuid>" if uuid else ""}
  <metadata>{inside}</metadata>
  <memory unit='MiB'>16</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <controller type='usb' model='none'/><memballoon model='none'/>
    {"".join(nics)}
  </devices>
</domain>
"""


def file_of(xml: str) -> str:
    """A file with this XML, for virsh."""
    name = xml.partition("<name>")[2].partition("</name>")[0]
    file = DIRECTORY / f"domain-{name}.xml"
    file.write_text(xml)
    return os.fspath(file)


def create(xml: str, *, check: bool = True) -> Result:
    """Start a transient domain, paused."""
    __tracebackhide__ = True
    return virsh("create", "--paused", file_of(xml), check=check)


def define(xml: str) -> None:
    virsh("define", file_of(xml))


def start(name: str, *, check: bool = True) -> Result:
    """Start a defined domain, paused."""
    return virsh("start", "--paused", name, check=check)


def refusal(xml: str) -> str:
    """The line with which the start of a domain is refused; "" for none."""
    done = create(xml, check=False)
    return "" if done.returncode == 0 else reason(done)


def reason(done: Result) -> str:
    """The line of ours in what virsh says."""
    lines = [line for line in done.stderr.splitlines() if "libvirt-natns: " in line]
    assert len(lines) == 1, done.stderr
    return lines[0].partition("libvirt-natns: ")[2]


def asked(
    namespace: str | None,
    proto: Literal["tcp", "udp"],
    address: str,
    port: int,
    timeout: float = 3.0,
) -> str | None:
    """As whom a server behind a port sees somebody in a namespace; None for no answer.

    A first packet may be lost while neighbours look for each other, and TCP sends it
    again after a second.

    For servers of ``Node.serve`` with ``tcp`` and ``udp``, which say that first.
    """
    kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
    with entered(namespace):
        opened = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    with opened:
        opened.settimeout(timeout)
        try:
            opened.connect((address, port))
            if proto == "udp":
                opened.send(b"who am I?")
            return opened.recv(100).decode().rpartition(":")[0] or None
        except OSError:
            return None


def greeted(client: Node, address: str, port: int) -> socket.socket:
    """A connection to such a server, which has answered."""
    stream = client.connect(address, port)
    stream.settimeout(1.0)
    assert stream.recv(100)
    return stream


def carries(stream: socket.socket) -> bool:
    """Whether an open connection to such a server still does."""
    try:
        stream.sendall(b"still there?")
        return stream.recv(100) == b"still there?"
    except OSError:
        return False


def uuid_of(network: str) -> str:
    return virsh("net-uuid", network).stdout.strip()


def dnsmasq_pid(network: str) -> str:
    """The pid of the network's dnsmasq in its namespace."""
    return Path(f"/run/libvirt-natns/networks/{uuid_of(network)}/dnsmasq.pid").read_text().strip()


def tap_count(bridge: str) -> int:
    """How many ports of real domains a bridge has."""
    listed = run("ip", "-o", "link", "show", "master", bridge).stdout
    return sum(" vnet" in f" {line.split()[1]}" for line in listed.splitlines())


def settle(bridge: str) -> None:
    """Have a bridge up at once, not when STP has let its first port forward."""
    forward_at_once(bridge)
    state = Path("/sys/class/net", bridge, "operstate")
    wait_for(lambda: state.read_text() == "up\n", what=f"{bridge} to be up")


def unordered() -> Snapshot:
    """The host's state; where libvirtd starts again, its own rules come in any order."""
    found = snapshot()
    return Snapshot({**found.sections, "nftables": tuple(sorted(found["nftables"]))})


def upstream(address: str, more: str = "") -> str:
    return nat(f'<natns:upstream name="provider" address="{address}"/>{more}')


@contextmanager
def networks(*documents: str) -> Iterator[None]:
    """Networks that run for as long as the body does."""
    with ExitStack() as cleanup:
        for xml in documents:
            define_network(xml)
            name = xml.partition("<name>")[2].partition("</name>")[0]
            cleanup.callback(virsh, "net-undefine", name)
            cleanup.callback(virsh, "net-destroy", name, check=False)
            virsh("net-start", name)
        yield


def destroy(*names: str) -> None:
    for name in names:
        virsh("destroy", name, check=False)


@contextmanager
def provider_world(firewall: str = "auto", head: str = "") -> Iterator[Provider]:
    """The provider as upstream, and nothing kept from earlier tests."""
    with Provider() as provider:
        write_config(head + provider.config(firewall=firewall, more="probe = 0"))
        for file in STATE.glob("state.db*"):
            file.unlink()
        try:
            yield provider
        finally:
            remove_config()
