# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fork servers of python-iptables: each request in its namespace, and no server in its way."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from lab import run, wait_for

from libvirt_natns import names
from libvirt_natns.errors import FirewallError, KernelError
from libvirt_natns.firewall import iptables, iptables_server
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset

NAMESPACES = ("fork-a", "fork-b")


def rules(address: str) -> tuple[object, ...]:
    policy = Policy(
        inner="inner",
        upstream=names.UPSTREAM_LINK,
        subnets=(IPv4Network("10.0.0.0/24"),),
        gateways=(IPv4Address("10.0.0.1"),),
        address=IPv4Address(address),
    )
    return tuple(ruleset(policy))


@pytest.fixture(autouse=True)
def _namespaces() -> Iterator[None]:
    with ExitStack() as stack:
        for name in NAMESPACES:
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "delete", name)
        yield


def servers() -> list[iptables_server.IptablesServer]:
    return iptables_server._spare.get(os.getpid(), [])


def saved(namespace: str) -> str:
    return run("ip", "netns", "exec", namespace, "iptables-legacy-save").stdout


def test_one_server_serves_all_namespaces() -> None:
    iptables.apply("fork-a", rules("192.0.2.1"))  # type: ignore[arg-type]
    first = servers()[0].process.pid
    iptables.apply("fork-b", rules("192.0.2.2"))  # type: ignore[arg-type]
    assert [server.process.pid for server in servers()] == [first]
    for name, own, other in (
        ("fork-a", "192.0.2.1", "192.0.2.2"),
        ("fork-b", "192.0.2.2", "192.0.2.1"),
    ):
        assert own in saved(name)
        assert other not in saved(name)
        assert own in iptables.listing(name)
    assert iptables.digest("fork-a") != iptables.digest("fork-b")
    iptables.clear("fork-a")
    assert iptables.listing("fork-a") == ""
    assert "192.0.2.2" in iptables.listing("fork-b")


def test_a_request_as_long_as_thousands_of_forwards() -> None:
    one = rules("192.0.2.1")
    iptables.apply("fork-a", one * 200)  # type: ignore[arg-type]
    assert len(iptables.listing("fork-a")) > 1 << 16


def test_a_refusal_names_its_reason_and_the_server_goes_on() -> None:
    with pytest.raises(FirewallError, match="iptables refused the rules"):
        iptables.call(
            "fork-a",
            "replace",
            tables=[{"name": "nowhere", "family": 4, "policies": {}, "chains": {}}],
        )
    with pytest.raises(FirewallError, match="iptables refused the rules"):
        iptables.call("fork-a", "nonsense")
    with pytest.raises(KernelError):
        iptables.call("no-such-namespace", "list")
    iptables.apply("fork-a", rules("192.0.2.1"))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_has_ended_is_replaced(number: signal.Signals) -> None:
    iptables.apply("fork-a", rules("192.0.2.1"))  # type: ignore[arg-type]
    (server,) = servers()
    os.kill(server.process.pid, number)
    assert "192.0.2.1" in iptables.listing("fork-a")
    assert servers()[0].process.pid != server.process.pid


def test_a_server_does_not_outlive_its_usefulness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iptables.listing("fork-a")
    iptables.apply("fork-a", rules("192.0.2.1"))  # type: ignore[arg-type]
    first = servers()[0].process.pid
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "another.lock"))
    assert "192.0.2.1" in iptables.listing("fork-a")
    second = servers()[0].process.pid
    assert second != first
    monkeypatch.setattr(iptables_server, "LIFETIME", 0.0)
    assert "192.0.2.1" in iptables.listing("fork-a")
    assert servers()[0].process.pid != second
    assert not any(Path(f"/proc/{pid}").exists() for pid in (first, second))


def test_who_waits_for_a_lock_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    iptables.apply("fork-b", rules("192.0.2.1"))  # type: ignore[arg-type]
    with lock.open("w") as held, ThreadPoolExecutor(1) as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = pool.submit(
            iptables.call, "fork-a", "own", families=[4], prefix="NATNS-", tables=[]
        )
        time.sleep(0.3)
        assert "192.0.2.1" in iptables.listing("fork-b")
        assert not waiting.done()
        fcntl.flock(held, fcntl.LOCK_UN)
        assert waiting.result(20) == ""


def test_a_lock_that_is_never_released_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the fork, and once: the server is well, and no other one waits anew."""
    lock = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    monkeypatch.setattr(iptables_server, "FORK_LIMIT", 1)
    iptables.listing("fork-a")
    iptables.apply("fork-a", rules("192.0.2.1"))  # type: ignore[arg-type]
    (server,) = servers()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(FirewallError, match=f"longer than 1 s: fuser -v {lock}"):
            iptables.call("fork-a", "own", families=[4], prefix="NATNS-", tables=[])
    assert servers() == [server]
    assert "192.0.2.1" in iptables.listing("fork-a")


def test_many_threads_get_their_own_answers() -> None:
    for number, name in enumerate(NAMESPACES):
        iptables.apply(name, rules(f"192.0.2.{number}"))  # type: ignore[arg-type]
    wrong: list[str] = []

    def ask(number: int) -> None:
        for _ in range(5):
            text = iptables.listing(NAMESPACES[number % 2])
            if f"192.0.2.{number % 2}" not in text:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(servers()) <= iptables_server.SPARE


def test_servers_end_with_their_process(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    pid = os.fork()
    if not pid:
        try:
            iptables.apply("fork-a", rules("192.0.2.1"))  # type: ignore[arg-type]
            note.write_text(str(servers()[0].process.pid))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    status = Path("/proc") / note.read_text() / "status"

    def has_ended() -> bool:
        # A zombie has ended.
        return not status.exists() or "State:\tZ" in status.read_text()

    wait_for(has_ended, timeout=10, what="the end of the server")
    assert "192.0.2.1" in iptables.listing("fork-a")
