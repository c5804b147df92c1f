# SPDX-License-Identifier: LGPL-2.1-or-later
"""Uninstall gets the hooks and the host's rules out, whatever is broken."""

import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Result,
    Service,
    define_network,
    isolated,
    natns,
    natns_anew,
    remove_config,
    run,
    virsh,
    write_config,
)
from test_breakage import without
from views import namespaces

REAL_INTERPRETER = True
HOOKS = Path("/etc/libvirt/hooks")
DATABASE = Path("/var/lib/libvirt-natns/state.db")
MAC = "52:54:00:00:00:05"


def break_configuration() -> None:
    write_config("upstream = host\n")


def damage_database() -> None:
    remove_database()
    DATABASE.write_text("this is no database, as its first bytes show\n" * 100)


def remove_database() -> None:
    for file in DATABASE.parent.glob("state.db*"):
        file.unlink()


def make_database_newer() -> None:
    with sqlite3.connect(DATABASE, timeout=10) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()


def kill_service() -> None:
    resident = Service()
    resident.start()
    resident.kill()


BREAKAGES: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "configuration": break_configuration,
    "database": damage_database,
    "database of a later version": make_database_newer,
    "no database": remove_database,
    "service is dead": kill_service,
}


def rules() -> str:
    return run("nft", "list", "ruleset").stdout


def check_gone(done: Result) -> None:
    """No hook, no rule of ours in the host, and libvirt's network is as libvirt made it."""
    assert done.returncode == 0, done.stderr
    assert not any(file.is_file() for file in HOOKS.rglob("*"))
    assert "natns" not in rules()
    assert namespaces() == set()
    assert "10.0.0.1/24" in run("ip", "-br", "address", "show", "virbr10").stdout
    assert not any(DATABASE.parent.glob("*"))
    assert not Path("/run/libvirt-natns/networks").exists()
    with FastGuest("virbr10", MAC) as guest:
        guest.add_address("10.0.0.77/24")
        assert guest.ping("10.0.0.1")


@pytest.fixture
def installed_here() -> Iterator[None]:
    """A network behind the host, which has rules of ours for it."""
    natns("install")
    define_network(isolated("a", "virbr10"))
    virsh("net-start", "a")
    assert "natns" in rules()
    yield
    # A test that failed has left something.
    natns("uninstall", check=False)


@pytest.mark.parametrize("name", BREAKAGES)
def test_uninstall(name: str, installed_here: None) -> None:
    BREAKAGES[name]()
    try:
        check_gone(natns("uninstall", check=False))
    finally:
        remove_config()


def test_uninstall_beside_a_stuck_service(installed_here: None) -> None:
    with Service() as service:
        service.signal(signal.SIGSTOP)
        check_gone(natns("uninstall", check=False, timeout=90))
        assert not service.runs


@pytest.mark.parametrize("library", ["lxml", "pyroute2"])
def test_uninstall_without_a_library(library: str, installed_here: None) -> None:
    with without(library):
        done = natns_anew("uninstall", check=False)
        assert done.returncode == 1
        assert f"cannot load {library}: install it for " in done.stderr
        assert done.stderr.count("\n") == 1
        assert not any(file.is_file() for file in HOOKS.rglob("*"))
        assert "natns" not in rules()
    check_gone(natns("uninstall"))


def test_uninstall_with_a_hook_that_stays(installed_here: None) -> None:
    hook = HOOKS / "qemu"
    run("mount", "--bind", hook, hook)
    try:
        done = natns("uninstall", check=False)
        assert done.returncode == 1
        assert f"cannot remove {hook}" in done.stderr
        assert done.stderr.count("\n") == 1
        assert [file.name for file in HOOKS.rglob("*") if file.is_file()] == ["qemu"]
        assert "natns" not in rules()
    finally:
        run("umount", hook)
    check_gone(natns("uninstall"))
