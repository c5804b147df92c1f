# SPDX-License-Identifier: LGPL-2.1-or-later
"""The picture of networks that run: three networks on two upstreams, with guests and forwards.

docs/reference/diagram.svg is that picture. After a change of the drawing, with PICTURE=write in
the environment, this test writes the file anew: look at it.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab import CHECKOUT, FastGuest, isolated, natns, run
from lab_domains import create, destroy, domain, nat, networks, nic, ports, provider_world
from lab_sides import Command, in_process
from lxml import etree

LIBVIRT = Path("/run/libvirt/libvirt-sock-ro")
PICTURE = CHECKOUT / "docs" / "reference" / "diagram.svg"
WEB, DB, MAIL, BUILD = (f"52:54:00:00:00:0{number}" for number in range(5, 9))

LAB = isolated("lab", "virbr10")
SHOP = isolated("shop", "virbr11")
LAPTOP = isolated(
    "laptop", "virbr12", address="10.0.5.1", metadata=nat('<natns:upstream name="host"/>')
)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process(capsys)


@pytest.fixture(scope="module")
def world(installed: None) -> Iterator[None]:
    with provider_world(), networks(LAB, SHOP, LAPTOP), ExitStack() as cleanup:
        cleanup.callback(destroy, "web", "db", "mail", "build")
        create(
            domain("web", nic("shop", WEB), publishes=ports("start='80'", "start='2222' to='22'"))
        )
        create(domain("db", nic("shop", DB)))
        create(domain("mail", nic("lab", MAIL), publishes=ports("start='25'")))
        create(domain("build", nic("laptop", BUILD), publishes=ports("start='8022' to='22'")))
        # db alone publishes nothing, so its address is known by its lease.
        guest = cleanup.enter_context(FastGuest("virbr11", DB, "station"))
        guest.dhcp()
        yield


def drawn(command: Command, form: str) -> str:
    answer = command("diagram", "--format", form)
    assert (answer.status, answer.err) == (0, "")
    return answer.out


def test_text(world: None, command: Command) -> None:
    shown = command("diagram").out
    assert shown == drawn(command, "text")
    assert (
        shown
        == """\
     build 10.0.5.100
            |
          laptop
         virbr12
            |
+-----------+------------+
| nat-laptop: ok         |
| 10.0.5.1/24            |
| 198.19.252.2           |
| tcp *:8022 -> build:22 |
+-----------+------------+
            |
------------+------------- natns-host
   (upstream host, routed by the host, 198.19.252.0/22, gateway 198.19.252.1)

                             db 10.0.0.161
   mail 10.0.0.100           web 10.0.0.100
          |                        |
         lab                      shop
       virbr10                  virbr11
          |                        |
+---------+----------+  +----------+----------+
| nat-lab: ok        |  | nat-shop: ok        |
| 10.0.0.1/24        |  | 10.0.0.1/24         |
| 192.168.0.100      |  | 192.168.0.101       |
| tcp :25 -> mail:25 |  | tcp :80 -> web:80   |
|                    |  | tcp :2222 -> web:22 |
+---------+----------+  +----------+----------+
          |                        |
----------+------------------------+----------- br0
   (upstream provider, 192.168.0.0/24, gateway 192.168.0.1)
"""
    )


def test_the_picture_in_the_documentation(world: None, command: Command) -> None:
    shown = drawn(command, "svg")
    texts = {text.text for text in etree.fromstring(shown.encode()).iter("{*}text")}
    wanted = {
        "provider", "bridge br0", "host", "routed by the host",
        "lab", "nat-lab", "virbr10", "shop", "nat-shop", "virbr11", "laptop", "nat-laptop",
        "virbr12", "web", "db", "mail", "build", "10.0.0.1/24", "10.0.5.1/24",
        "192.168.0.100", "192.168.0.101", "tcp :80", "web:80", "tcp :2222", "web:22", "tcp :25",
        "mail:25", "tcp *:8022", "build:22", "ok",
    }  # fmt: skip
    assert wanted <= texts
    if os.environ.get("PICTURE") == "write":
        PICTURE.write_text(shown)
    assert shown == PICTURE.read_text()


def test_graphviz_draws_it(world: None, command: Command) -> None:
    done = subprocess.run(
        ["dot", "-Tsvg"], input=drawn(command, "dot"), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    texts = {text.text for text in etree.fromstring(done.stdout.encode()).iter("{*}text")}
    assert {"web", "db", "mail", "build", "tcp :2222 -> web:22"} <= texts


def test_mermaid(world: None, command: Command) -> None:
    assert "tcp :2222 -#62; web:22" in drawn(command, "mermaid")


def test_without_libvirt_leases_and_forwards_tell_the_guests(world: None, command: Command) -> None:
    socket, hidden = LIBVIRT, LIBVIRT.with_suffix(".hidden")
    socket.rename(hidden)
    try:
        shown = drawn(command, "text")
    finally:
        hidden.rename(socket)
    for part in ("web 10.0.0.", "tcp :2222 -> web:22", f"{DB} 10.0.0.", "mail 10.0.0."):
        assert part in shown


def test_health(world: None, command: Command) -> None:
    run("ip", "link", "set", "natns-private-lab", "down")
    try:
        assert "nat-lab: damaged (1)" in command("diagram").out
        root = etree.fromstring(drawn(command, "svg").encode())
        assert "damaged (1)" in {text.text for text in root.iter("{*}text")}
        assert len(root.findall("{*}rect[@class='f-card s-bad']")) == 1
        assert ":::fault" in drawn(command, "mermaid")
    finally:
        natns("sync")
    assert "damaged" not in command("diagram").out
