# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private network of two hosts, made by the very commands that the page about it shows."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from far import NAMESPACE, FarGuest, FarHost
from lab import (
    CHECKOUT,
    ECHO_PORT,
    INTERNET,
    PYTHON,
    FastGuest,
    Libvirtd,
    Node,
    Provider,
    Service,
    forward_at_once,
    natns,
    run,
    virsh,
    wait_for,
    write_config,
)
from lab_documents import Step, squeezed
from test_mtu import TCP_HEADERS, mss, mtu_of, transfers

PAGE = CHECKOUT / "docs" / "how-to" / "two-hosts-vxlan.md"
HOOK = Path("/etc/libvirt/hooks/network.d/10-vxlan-span")
BRIDGE = "virbr-span"
NEAR_MAC, FAR_MAC = "52:54:00:00:00:05", "52:54:00:00:00:06"
FAR_ADDRESS = "192.168.0.3/24"
LARGE, SMALL = 1500, 1450
AMOUNT = 1_000_000
COMMAND = f'virt-natns() {{ PYTHONPATH={CHECKOUT} {PYTHON} -m libvirt_natns "$@"; }}'
"""virt-natns, as a package would install it."""

SYN = "tcp[tcpflags] & tcp-syn != 0"


@dataclass
class Section:
    """The commands below a heading of the page."""

    heading: str
    steps: list[Step]


def sections() -> Iterator[Section]:
    for part in re.split(r"(?m)^## ", PAGE.read_text())[1:]:
        steps: list[Step] = []
        for indent, block in re.findall(r"(?ms)^( *)```console\n(.*?)^ *```$", part):
            for line in re.sub(rf"(?m)^{indent}", "", block).splitlines():
                if line.startswith("# "):
                    steps.append(Step(line[2:]))
                else:
                    steps[-1].lines.append(line)
        yield Section(part.partition("\n")[0], steps)


def hook_of_the_page() -> str:
    (script,) = re.findall(r"(?ms)^```\n(#!/bin/sh\n.*?)^```$", PAGE.read_text())
    return str(script)


def type_in(steps: list[Step], host: FarHost | None = None) -> None:
    """Type commands of the page on this host or the other; they say what the page says."""
    for step in steps:
        shell = ("bash", "-c", f"{COMMAND}\ncd {CHECKOUT} && exec 2>&1\n{step.command}")
        said = (host.run(*shell) if host else run(*shell)).stdout
        if step.lines:
            expected = "(?:.*\n)*?" + step.pattern + "(?:.*\n)*"
            assert re.fullmatch(expected, squeezed(said)), f"# {step.command}\n{said}"


def fragments(namespace: str | None) -> int:
    """How many packets a namespace has split, or could not."""
    counters = run("cat", "/proc/net/snmp", namespace=namespace).stdout.splitlines()
    names, values = (line.split() for line in counters if line.startswith("Ip:"))
    found = dict(zip(names, values, strict=True))
    return int(found["FragCreates"]) + int(found["FragFails"])


def exchange(one: Node, two: Node, address: str) -> None:
    """A lot of data from a server in ``two`` and back to it."""
    assert len(one.curl(f"http://{address}/bytes/{AMOUNT}")) == AMOUNT
    with one.connect(address, ECHO_PORT) as stream:
        stream.recv(100)
        sent = received = 0
        while sent < AMOUNT:
            sent += stream.send(b"x" * 20_000)
            while received < sent:
                received += len(stream.recv(65536))


def check_guests(provider: Provider, near: FastGuest, far: FarGuest) -> None:
    """Guests of both hosts are in one network, behind one namespace."""
    offer = far.dhcp()
    assert (offer["ip"], offer["router"], offer["serverid"]) == ("10.0.0.6",) + ("10.0.0.1",) * 2
    assert offer["mtu"] == str(SMALL)
    for node in (near, far):
        node.serve("http", 80)
        node.serve("tcp", ECHO_PORT)
    # Between guests, TCP fits before the nearer one has heard of the smaller MTU.
    assert mtu_of("eth0", near.name) == LARGE
    exchange(near, far, "10.0.0.6")
    assert near.dhcp(hostname="near")["mtu"] == str(SMALL)
    here = near.addresses()[0].partition("/")[0]
    assert far.dig("near.span") == [here]
    assert near.dig("far.span") == ["10.0.0.6"]
    assert far.dig("www.example.test") == [INTERNET]
    assert near.ping("10.0.0.6", "-s", str(SMALL - 28))
    assert far.ping(here, "-s", str(SMALL - 28))
    places = (None, NAMESPACE, "nat-span", near.name, far.name)
    before = [fragments(place) for place in places]
    exchange(near, far, "10.0.0.6")
    exchange(far, near, here)
    assert transfers(far, provider)
    assert transfers(near, provider)
    check_forward(provider, far)
    assert [fragments(place) for place in places] == before


def check_forward(provider: Provider, far: FarGuest) -> None:
    """Host B's guest is published by host A, and connections fit through the tunnel."""
    seen = far.curl(f"http://{INTERNET}/").partition(":")[0]
    client = provider.neighbour("client", "192.168.0.77/24")
    with far.sniff(SYN) as inside, client.sniff(SYN) as outside:
        assert client.curl(f"http://{seen}:8080/").startswith("192.168.0.77:")
        assert len(client.curl(f"http://{seen}:8080/bytes/{AMOUNT}")) == AMOUNT
        wait_for(lambda: len(mss(inside.lines())) >= 4, what="two handshakes")
        wait_for(lambda: len(mss(outside.lines())) >= 4, what="two handshakes")
        assert set(mss(inside.lines())) == {SMALL - TCP_HEADERS}
        assert set(mss(outside.lines())) == {LARGE - TCP_HEADERS, SMALL - TCP_HEADERS}


@pytest.mark.usefixtures("installed")
def test_two_hosts_as_written(provider: Provider) -> None:
    write_config(provider.config(firewall="nftables"))
    on_a, on_b, see = list(sections())[:3]
    assert (on_a.heading, on_b.heading) == ("On host A", "On host B")
    assert [len(each.steps) for each in (on_a, on_b, see)] == [7, 4, 2]
    with FarHost(provider.bridge, FAR_ADDRESS) as host_b:
        try:
            type_in(on_a.steps[:2])
            with FastGuest(BRIDGE, NEAR_MAC, "near") as near:
                assert "mtu" not in near.dhcp()
                stream = near.connect(provider.gateway, ECHO_PORT)
                stream.recv(100)
                type_in(on_a.steps[2:])
                type_in(on_b.steps, host_b)
                forward_at_once(BRIDGE)
                with FarGuest(BRIDGE, FAR_MAC, "far", mtu=SMALL) as far:
                    check_guests(provider, near, far)
                    type_in(see.steps)
                stream.sendall(b"still there?")
                assert stream.recv(100) == b"still there?"
                stream.close()
        finally:
            virsh("net-destroy", "span", check=False)
            virsh("net-undefine", "span", check=False)
            run("ip", "link", "del", "vxlan-span", check=False)


def test_service_and_hook(service: Service, provider: Provider, libvirtd: Libvirtd) -> None:
    """The port comes with each start by the page's hook, and the service follows."""
    HOOK.parent.mkdir(exist_ok=True)
    HOOK.write_text(hook_of_the_page())
    HOOK.chmod(0o755)
    libvirtd.reload()
    try:
        virsh("net-define", str(CHECKOUT / "xml" / "span.xml"))
        for _ in range(2):
            virsh("net-start", "span")
            port = json.loads(run("ip", "-j", "link", "show", "vxlan-span").stdout)[0]
            assert (port["master"], port["mtu"]) == (BRIDGE, SMALL)
            wait_for(lambda: natns("check", check=False).returncode == 0, timeout=20)
            route = natns("exec", "span", "--", "ip", "route", "show", "dev", BRIDGE).stdout
            assert "mtu 1450" in route
            virsh("net-destroy", "span")
    finally:
        HOOK.unlink()
        libvirtd.reload()
        virsh("net-undefine", "span", check=False)
        run("ip", "link", "del", "vxlan-span", check=False)
