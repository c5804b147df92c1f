# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reloads of a host's whole ruleset heal each time; a program that removes ours alone wins."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from healing import PATIENCE, Parts
from lab import FastGuest, isolated, remove_config, run, wait_for, write_config
from lab_boundary import nothing_more
from lab_domains import networks, uuid_of
from lab_hosts_firewalls import CONF, libvirts_rules_kept, without_bridge_nf
from test_hosts import LAN, ROUTER, leaves_as, way_out

from libvirt_natns.engine.observer import HOST
from libvirt_natns.service import healer

RELOADS = 8

LEGACY = """*nat
:PREROUTING ACCEPT [0:0]
-A PREROUTING -p tcp --dport 7 -j ACCEPT
COMMIT
*mangle
:FORWARD ACCEPT [0:0]
COMMIT
*filter
:FORWARD ACCEPT [0:0]
COMMIT
"""
"""What netfilter-persistent loads."""


@pytest.fixture(autouse=True)
def nothing_left(installed: None) -> Iterator[None]:
    with nothing_more(ours=True), libvirts_rules_kept():
        yield


@contextmanager
def served(firewall: str) -> Iterator[Parts]:
    """A guest that leaves by a LAN, with watch and healer."""
    write_config(f'firewall = "{firewall}"\n')
    with ExitStack() as stack:
        stack.callback(remove_config)
        stack.enter_context(without_bridge_nf())
        stack.enter_context(
            way_out(f"route add default via {ROUTER}", name="lan", here=LAN, there=ROUTER)
        )
        stack.enter_context(networks(isolated("a", "virbr10")))
        parts = stack.enter_context(Parts())
        parts.watch.follow([uuid_of("a"), HOST])
        assert parts.watch.settled(PATIENCE)
        parts.healer.suspect(HOST)
        wait_for(parts.idle, timeout=PATIENCE)
        guest = stack.enter_context(FastGuest("virbr10", name="guest"))
        guest.dhcp()
        assert leaves_as(LAN)
        yield parts


def heals(parts: Parts, earlier: int) -> None:
    wait_for(
        lambda: len(parts.said("healed", "host")) > earlier and not parts.wrong(),
        timeout=PATIENCE,
        what=parts.log.getvalue(),
    )


RELOAD = {
    "nothing after it": ("nftables", ":"),
    "an administrator's": ("nftables", f"nft -f - <<'E'\n{CONF}E\n"),
    "another backend": (
        "iptables",
        f"iptables-legacy-restore <<'E'\n{LEGACY}E\n",
    ),
}


@pytest.mark.parametrize("kind", RELOAD)
def test_reloads_heal_each_time(kind: str, installed: None) -> None:
    firewall, load = RELOAD[kind]
    with served(firewall) as parts:
        try:
            for _ in range(RELOADS):
                earlier = len(parts.said("healed", "host"))
                # All rules of libvirt go, too: no chain of anybody's is there any more.
                run("sh", "-ec", f"nft flush ruleset\n{load}")
                heals(parts, earlier)
                assert leaves_as(LAN)
            assert parts.healer.health() == {}
            assert not parts.said("not healed")
        finally:
            run("nft", "delete", "table", "inet", "filter", check=False)


@contextmanager
def remover(command: str) -> Iterator[None]:
    """A program that removes something of ours all the time."""
    loop = f"while :; do {command} 2>/dev/null; sleep 0.05; done"
    process = subprocess.Popen(["sh", "-c", loop], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_fight_ends_and_begins_anew(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healer, "RECHECK", 0.5)
    with served("nftables") as parts:
        run("nft", "add table inet other")
        try:
            wait_for(parts.idle, timeout=PATIENCE)
            with remover("nft delete table inet natns"):
                wait_for(parts.healer.health, timeout=60, what="giving up")
                why = parts.healer.health()[HOST]
                assert "table inet natns is missing" in why
            # The program has gone, and the ruleset changes.
            run("nft", "add table inet another")
            run("nft", "delete table inet another")
            wait_for(lambda: not parts.healer.health() and not parts.wrong(), timeout=PATIENCE)
            assert leaves_as(LAN)
        finally:
            run("nft", "delete table inet other")
