# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a DHCP server says, and the script that writes it down: without a server."""

import os
import shlex
import shutil
import subprocess
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import cast

import pytest

from libvirt_natns import names
from libvirt_natns.daemons import dhcp_lease, udhcpc
from libvirt_natns.daemons.dhcp_lease import DhcpLease, parse
from libvirt_natns.daemons.udhcpc import Client
from libvirt_natns.errors import DhcpError
from libvirt_natns.model.subnet import StaticRoute
from libvirt_natns.upstream.router import nic_lease
from libvirt_natns.upstream.router.target import Target

OFFER = {
    "ip": "192.168.0.50",
    "mask": "24",
    "router": "192.168.0.1 192.168.0.254",
    "dns": "192.168.0.1 9.9.9.9",
    "mtu": "1400",
    "staticroutes": "",
    "serverid": "192.168.0.1",
    "lease": "3600",
}


def lease_of(**values: str) -> DhcpLease | None:
    return parse("".join(f"{name}={value}\n" for name, value in values.items()))


# -- parsing -------------------------------------------------------------------


def test_whole_lease() -> None:
    assert lease_of(
        ip="192.168.0.50", mask="24", router="192.168.0.1 192.168.0.254", mtu="1400",
        dns="192.168.0.1 9.9.9.9", server="192.168.0.2",
    ) == DhcpLease(
        IPv4Interface("192.168.0.50/24"),
        server=IPv4Address("192.168.0.2"),
        gateway=IPv4Address("192.168.0.1"),
        dns=(IPv4Address("192.168.0.1"), IPv4Address("9.9.9.9")),
        mtu=1400,
    )  # fmt: skip


def test_an_address_alone_is_a_lease() -> None:
    assert lease_of(ip="192.0.2.9", mask="", router="", mtu="") == DhcpLease(
        IPv4Interface("192.0.2.9/32")
    )


@pytest.mark.parametrize("ip", ["", "192.168.0", "2001:db8::1", "192.168.0.1/24"])
def test_without_an_address_there_is_no_lease(ip: str) -> None:
    assert lease_of(ip=ip, mask="24", router="192.168.0.1") is None


def test_nonsense_is_left_out() -> None:
    found = lease_of(
        ip="192.0.2.9", mask="24", router="0.0.0.0", dns="127.0.0.53 one 9.9.9.9",
        mtu="500", server="nobody",
    )  # fmt: skip
    assert found == DhcpLease(IPv4Interface("192.0.2.9/24"), dns=(IPv4Address("9.9.9.9"),))


@pytest.mark.parametrize(
    ("text", "mtu"), [("576", 576), ("575", None), ("65536", None), ("-1", None)]
)
def test_mtu(text: str, mtu: int | None) -> None:
    found = lease_of(ip="192.0.2.9", mtu=text)
    assert found is not None
    assert found.mtu == mtu


def test_classless_routes_replace_the_router() -> None:
    found = lease_of(
        ip="10.128.0.5",
        mask="32",
        router="10.9.9.9",
        routes="10.128.0.1/32 0.0.0.0 0.0.0.0/0 10.128.0.1 172.16.0.0/12 10.128.0.7",
    )
    assert found is not None
    assert found.gateway == IPv4Address("10.128.0.1")
    assert found.routes == (StaticRoute(IPv4Network("172.16.0.0/12"), IPv4Address("10.128.0.7")),)


def test_classless_routes_without_a_default() -> None:
    found = lease_of(ip="192.0.2.9", mask="24", router="192.0.2.1", routes="10.0.0.0/8 192.0.2.7 x")
    assert found is not None
    assert found.gateway is None
    assert found.routes == (StaticRoute(IPv4Network("10.0.0.0/8"), IPv4Address("192.0.2.7")),)


# -- the script ----------------------------------------------------------------


@pytest.fixture
def client(tmp_path: Path) -> Client:
    command = ("sh", "-c", f"echo >>{shlex.quote(str(tmp_path / 'told it'))}")
    made = Client("nat-a", "upstream", names.client_id("u"), tmp_path / "a b", command)
    udhcpc.write_files(made)
    return made


def told(client: Client) -> int:
    """How often ``on_change`` was run."""
    file = client.directory.parent / "told it"
    return len(file.read_text().splitlines()) if file.exists() else 0


def event(client: Client, *events: str, **values: str) -> None:
    """Run the script as one client does, for one event after the other."""
    # The listener is at the other end of the pipe; the last command keeps the shell from
    # being replaced by the script, and so its process id.
    lines = "; ".join(f"/bin/sh {each} 9>&1" for each in events)
    subprocess.run(
        ["sh", "-c", f"{{ {lines}; :; }} | while read -r _; do sh ./command; done"],
        env={"PATH": os.environ["PATH"], **values},
        cwd=client.directory,
        check=True,
        capture_output=True,
    )


def test_lease_is_written_down(client: Client) -> None:
    event(client, "bound", **OFFER)
    found = dhcp_lease.read(client.directory)
    assert found is not None
    assert found.address == IPv4Interface("192.168.0.50/24")
    assert (found.mtu, found.gateway) == (1400, IPv4Address("192.168.0.1"))
    assert found.until is not None
    assert told(client) == 1


def test_renewal_that_brings_nothing_new_is_not_told(client: Client) -> None:
    event(client, "bound", "renew", "renew", **OFFER)
    assert told(client) == 1
    event(client, "renew", **OFFER | {"router": "192.168.0.9"})
    assert told(client) == 2


def test_who_waits_for_a_lease_is_not_told_of_it(client: Client) -> None:
    (client.directory / "awaited").touch()
    event(client, "bound", **OFFER)
    assert told(client) == 0
    assert dhcp_lease.read(client.directory) is not None


def test_a_lease_is_lost_by_its_own_client_alone(client: Client) -> None:
    event(client, "deconfig", **OFFER)
    assert told(client) == 0, "each client begins so"
    event(client, "bound", **OFFER)
    event(client, "deconfig", **OFFER)
    assert dhcp_lease.read(client.directory) is not None, "of a client that was killed"
    event(client, "bound", "deconfig", **OFFER)
    assert dhcp_lease.read(client.directory) is None
    assert told(client) == 2


def test_a_lease_ends_where_nobody_answers_the_next_client(client: Client) -> None:
    event(client, "bound", **OFFER)
    event(client, "leasefail")
    assert dhcp_lease.read(client.directory) is not None, "it is valid still"
    (client.directory / "times").write_text("1 0 1\n")
    event(client, "leasefail")
    assert dhcp_lease.read(client.directory) is None
    assert told(client) == 2


@pytest.mark.parametrize("seconds", ["0", str(2**32 - 1)])
def test_lease_for_ever(client: Client, seconds: str) -> None:
    event(client, "bound", **OFFER | {"lease": seconds})
    found = dhcp_lease.read(client.directory)
    assert found is not None
    assert found.until is None


# -- identity ------------------------------------------------------------------


def test_client_id_is_a_networks_own() -> None:
    one, other = names.client_id("a"), names.client_id("b")
    assert one != other
    assert one == names.client_id("a")
    assert len(bytes.fromhex(one)) == 1 + 4 + 2 + 16
    assert one.startswith("ff000000010004")


def test_stop_without_a_client(tmp_path: Path) -> None:
    udhcpc.stop(tmp_path / "missing")
    (tmp_path / "a").mkdir()
    udhcpc.stop(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("content", [None, b"", b"none", b"0", b"\xff", b"1"])
@pytest.mark.parametrize("of", ["network", "router"])
def test_a_client_without_a_readable_pid_file_is_ended(
    of: str, content: bytes | None, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk its pid file stays empty."""
    monkeypatch.setattr(nic_lease, "client_directory", lambda _: client.directory)
    monkeypatch.setattr(names, "RUN_DIRECTORY", client.directory.parent)
    if content is not None:
        (client.directory / "pid").write_bytes(content)
    command = ["sh", "-c", "echo ready; read line", "sh", "-p", f"{client.directory}/pid"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stray:
        assert stray.stdout is not None
        assert stray.stdout.readline() == b"ready\n"
        if of == "network":
            udhcpc.stop(client.directory)
        else:
            nic_lease.end(cast("Target", None))
        assert stray.poll() is not None
    assert not client.directory.exists()


def test_waiting_leaves_nothing_of_a_client_that_was_not_started(client: Client) -> None:
    directory = client.directory.parent / "other"
    with udhcpc.awaiting(directory):
        assert (directory / "awaited").exists()
    assert not directory.exists()
    with udhcpc.awaiting(client.directory):
        event(client, "bound", **OFFER)
    assert told(client) == 0
    event(client, "renew", **OFFER | {"router": "192.168.0.9"})
    assert told(client) == 1


def test_no_client_is_a_difference(client: Client) -> None:
    assert udhcpc.differences(client) == ["DHCP client of nat-a is not running"]
    # A process id alone is nobody's.
    (client.directory / "pid").write_text(f"{os.getpid()}\n")
    assert udhcpc.differences(client) == ["DHCP client of nat-a is not running"]


# -- the program ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"udhcpc", "busybox"}, ["/sbin/udhcpc"]),
        ({"busybox"}, ["/sbin/busybox", "udhcpc"]),
        (set[str](), None),
    ],
)
def test_program(
    installed: set[str], expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def which(name: str, path: str) -> str | None:
        return f"/sbin/{name}" if name in installed else None

    monkeypatch.setattr(shutil, "which", which)
    if expected is not None:
        assert udhcpc.program() == expected
        return
    with pytest.raises(DhcpError, match="udhcpc is not installed: install the package udhcpc"):
        udhcpc.program()


def test_a_client_that_notes_its_process_id_has_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client("nat-a", "upstream", "ff", tmp_path, ("true",))
    leased = DhcpLease(IPv4Interface("192.168.0.50/24"))
    found = iter([None, None, None])
    pids = iter([None, 5, None])
    monkeypatch.setattr(dhcp_lease, "read", lambda directory: next(found, leased))
    monkeypatch.setattr(udhcpc, "running", lambda client: next(pids))
    assert udhcpc.await_lease(client, 5) == leased
    monkeypatch.setattr(dhcp_lease, "read", lambda directory: None)
    monkeypatch.setattr(udhcpc, "running", lambda client: None)
    with pytest.raises(DhcpError, match="the DHCP client of nat-a has ended"):
        udhcpc.await_lease(client, 5)
