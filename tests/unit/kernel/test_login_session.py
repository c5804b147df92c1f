# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ports by which a session came in, from the files of its processes."""

import os
from ipaddress import ip_address
from pathlib import Path

import pytest

from libvirt_natns.kernel import listening_ports, login_session
from libvirt_natns.kernel.login_session import Entrance
from libvirt_natns.model.publication import PortProtocol

HEADER = "  sl  local_address rem_address   st\n"
SERVER = "0A6433C6"
"""198.51.100.10 as a little-endian machine shows it."""


def entrance(proto: PortProtocol, address: str, port: int) -> Entrance:
    return Entrance(proto, ip_address(address), port)


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four processes: the caller, a shell, a login daemon, and the machine's first one."""
    monkeypatch.setattr(login_session, "PROCESSES", tmp_path)
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    for module in (login_session, listening_ports):
        monkeypatch.setattr(module, "PORTS", tmp_path / "net")
    monkeypatch.setattr(os, "getpid", lambda: 40)
    (tmp_path / "net").mkdir()
    for pid, name in ((40, "virt-natns"), (30, "a) (b"), (20, "sshd"), (1, "init")):
        directory = tmp_path / str(pid)
        (directory / "fd").mkdir(parents=True)
        (directory / "stat").write_text(f"{pid} ({name}) S {pid - 10 if pid > 20 else 1} 0 0\n")
        (directory / "environ").write_bytes(b"")
        (directory / "comm").write_text(f"{name}\n")
    return tmp_path


def line(local: str, state: str, inode: int) -> str:
    return f"   0: {local} 0A000001:C350 {state} 0:0 0:0 0 0 0 {inode} 1\n"


def test_a_console(proc: Path) -> None:
    assert login_session.entrances() == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.9 50000 198.51.100.10 2222", entrance("tcp", "198.51.100.10", 2222)),
        ("::ffff:192.0.2.9 5 ::ffff:198.51.100.10 2222", entrance("tcp", "198.51.100.10", 2222)),
        ("fe80::9%ens3 5 fe80::1%ens3 22", entrance("tcp", "fe80::1", 22)),
        ("nonsense", None),
        ("a b c d", None),
    ],
)
def test_the_variable_of_a_parent(proc: Path, text: str, expected: Entrance | None) -> None:
    (proc / "30/environ").write_bytes(b"A=1\0SSH_CONNECTION=" + text.encode() + b"\0B=2\0")
    assert login_session.entrances() == ({expected} if expected else set())


def test_the_variable_of_the_caller(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.9 50000 198.51.100.10 2222")
    assert login_session.entrances() == {entrance("tcp", "198.51.100.10", 2222)}


def test_a_connection_that_a_parent_holds(proc: Path) -> None:
    (proc / "20/fd/3").symlink_to("socket:[77]")
    (proc / "20/fd/4").symlink_to("/dev/null")
    (proc / "1/fd/3").symlink_to("socket:[88]")
    held = line(f"{SERVER}:08AE", "01", 77)
    (proc / "net/tcp").write_text(HEADER + held)
    assert login_session.entrances() == set(), "the parent is the client"
    listened = line("00000000:08AE", "0A", 99) + line(f"{SERVER}:0017", "01", 88)
    (proc / "net/tcp").write_text(HEADER + held + listened)
    assert login_session.entrances() == {entrance("tcp", "198.51.100.10", 2222)}


def test_a_session_by_datagrams(proc: Path) -> None:
    (proc / "20/fd/3").symlink_to("socket:[77]")
    (proc / "net/udp").write_text(HEADER + line("00000000:EA61", "07", 77))
    assert login_session.entrances() == set()
    (proc / "20/comm").write_text("mosh-server\n")
    assert login_session.entrances() == {entrance("udp", "0.0.0.0", 60001)}
