# SPDX-License-Identifier: LGPL-2.1-or-later
"""watch and status --watch: the state first, then each change, whoever made it."""

import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator

import pytest
from lab import (
    FastGuest,
    Provider,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    spawn,
    virsh,
    wait_for,
    write_config,
)
from lab_base import end
from lab_domains import define, domain, nic, ports, start
from lab_json import COMMAND, MEMBER, Watcher, valid
from views import upstream_address

MAC = "52:54:00:00:00:05"
URI = "urn:libvirt-natns:1"
FORWARD = '<nat><portForward><range start="2222" to="22"/></portForward></nat>'


@pytest.fixture
def world(installed: None, provider: Provider) -> Iterator[Service]:
    write_config(provider.config())
    try:
        with Service() as service:
            yield service
    finally:
        remove_config()


def is_the_whole_state(watcher: Watcher) -> None:
    """What a reader has put together is what status says."""
    __tracebackhide__ = True

    def same() -> bool:
        whole = valid("status", natns("status", "--json").stdout)
        return all(
            sorted(map(str, whole[part] or ())) == sorted(map(str, watcher.state[part] or ()))
            for part in ("networks", "domains", "forwards", "upstreams", "libvirt_networks")
        )

    assert same() or (watcher.next() and same())


@pytest.mark.parametrize("user", [(), MEMBER], ids=["root", "member"])
def test_changes_of_every_maker(world: Service, user: tuple[str, ...]) -> None:
    with Watcher(user) as watcher:
        assert watcher.state["networks"] == []
        define_network(isolated("a", "virbr10"))
        watcher.until("libvirt_networks", "a", active=False, handled=True)
        virsh("net-start", "a")
        watcher.until("networks", "a", state="up", health="ok")
        define(domain("web", nic("a", MAC)))
        watcher.until("domains", "web", running=False)
        start("web")
        watcher.until("domains", "web", running=True)
        with FastGuest("virbr10", MAC) as guest:
            guest.dhcp()
            (lease,) = watcher.until("networks", "a", leases=1)["dhcp_leases"]
            assert (lease["mac"], lease["guest"]) == (MAC, "web")
        # By virsh, of which no hook tells.
        virsh("metadata", "web", "--live", "--uri", URI, "--key", "natns", "--set", FORWARD)
        watcher.until("forwards", "web", first=2222, state="published")
        virsh("destroy", "web")
        watcher.until("domains", "web", running=False)
        virsh("undefine", "web")
        virsh("net-destroy", "a")
        watcher.until("networks", "a", state="down")
        virsh("net-undefine", "a")
        while watcher.state["libvirt_networks"]:
            watcher.next()
        assert [line["serial"] for line in watcher.lines] == list(range(1, len(watcher.lines) + 1))
        is_the_whole_state(watcher)


def test_an_obstacle_is_told(world: Service) -> None:
    """The service looks for what stops guests, and tells what comes and goes."""
    define_network(isolated("a", "virbr10"))
    virsh("net-start", "a")
    with Watcher() as watcher:
        watcher.until("networks", "a", health="ok")
        chain = "inet own forward { type filter hook forward priority 0; policy drop; }"
        run("nft", f"add table inet own; add chain {chain}")
        try:
            while not watcher.state["networks"][0]["obstacles"]:
                watcher.next()
            assert watcher.state["networks"][0]["obstacles"][0]["kind"] == "stopped"
            assert watcher.state["stops"]
        finally:
            run("nft", "delete table inet own")
        watcher.until("networks", "a", health="ok")
        assert watcher.state["stops"] == []


def test_a_broken_configuration_is_told_once(world: Service, provider: Provider) -> None:
    define_network(isolated("a", "virbr10"))
    virsh("net-start", "a")
    with Watcher() as watcher:
        before = watcher.state
        write_config("scope = 1\n")
        virsh("net-undefine", "a")
        assert "config.toml" in watcher.next("error")["error"]
        write_config(provider.config())
        watcher.next("state")
        assert watcher.state["networks"] == before["networks"]


def test_the_stream_goes_on_over_a_restart(world: Service) -> None:
    define_network(isolated("a", "virbr10"))
    with Watcher() as watcher, Watcher(MEMBER) as other:
        world.stop()
        virsh("net-start", "a")
        world.start()
        for each in (watcher, other):
            each.next("state")
            each.until("networks", "a", state="up")
            is_the_whole_state(each)


def test_it_ends_with_its_reader(world: Service) -> None:
    process = spawn(*COMMAND, "watch", "--json")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    wait_for(lambda: process.poll() is not None, timeout=10, what="the end of watch")
    assert process.wait() == 0


def test_lines_for_people(world: Service) -> None:
    define_network(isolated("a", "virbr10"))
    process = spawn(*COMMAND, "watch")
    try:
        assert process.stdout is not None
        assert process.stdout.readline().endswith(" service: running\n")
        virsh("net-start", "a")
        line = next(line for line in process.stdout if "network a: up" in line)
        address = upstream_address("a")
        assert line.endswith(f" network a: up, ok, {address}\n")
        virsh("net-destroy", "a")
        assert any(line.endswith(f" network a: down, {address}\n") for line in process.stdout)
    finally:
        end(process)


def test_status_is_drawn_anew_in_a_terminal(world: Service) -> None:
    define_network(isolated("a", "virbr10"))
    define(domain("web", nic("a", MAC), publishes=ports("start='2222' to='22'")))
    master, slave = pty.openpty()
    with subprocess.Popen([*COMMAND, "status", "--watch"], stdout=slave, stderr=slave) as process:
        os.close(slave)
        try:
            shown = Terminal(master)
            shown.until("no network has been handled yet")
            virsh("net-start", "a")
            shown.until("nat-a")
            start("web")
            shown.until(f"web: tcp {upstream_address('a')}:2222 -> 10.0.0.100:22")
            plain = natns("status").stdout
            assert shown.text.replace("\r\n", "\n").rpartition("\x1b[3J")[2] == plain
            virsh("destroy", "web")
        finally:
            process.terminate()
            os.close(master)


class Terminal:
    """What a program has written to a terminal."""

    def __init__(self, master: int) -> None:
        self.text = ""
        self._master = master

    def until(self, words: str) -> None:
        """Read until the latest picture has these words, and is whole."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self._master], [], [], 0.2)
            if ready:
                self.text += os.read(self._master, 65536).decode()
            elif words in self.text.rpartition("\x1b[3J")[2]:
                return
        raise AssertionError(f"{words!r} is never shown:\n{self.text}")


def test_wrong_usage() -> None:
    done = natns("status", "--watch", "--json", check=False)
    assert done.returncode == 2
    assert "not allowed with" in done.stderr
