# SPDX-License-Identifier: LGPL-2.1-or-later
"""A damaged state database: what runs goes on, and ``sync`` rebuilds it from what runs."""

import os
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Node,
    isolated,
    natns,
    remove_config,
    run,
    virsh,
    write_config,
)
from lab_domains import (
    STATE,
    carries,
    create,
    destroy,
    domain,
    greeted,
    nat,
    networks,
    nic,
    ports,
    unordered,
    uuid_of,
)
from lab_ipv6 import GATEWAY6, DualProvider, dual, route_to_host, static6
from views import rules_of

FILE = STATE / "state.db"
CLIENT, CLIENT6 = "192.168.0.77", "2001:db8:77::77"
WEB, MAIL, REST = "52:54:00:00:00:05", "52:54:00:00:00:06", "52:54:00:00:00:07"
REST_UUID = "11111111-2222-4333-8444-555555555555"
OWN6 = "2001:db8:77::180"
RANGE6 = ("fd00:10::100", "fd00:10::1ff")
ON_HOST = nat('<natns:upstream name="host"/>')
OF_NETWORK = nat(
    ports("start='auto' to='25'", "start='4444' to='22'", more="guestAddress='10.0.0.9'")
)
OF_WEB = (
    ports("start='2222' to='22'", "start='auto' to='22'", "start='8000' end='8010'")
    + ports("start='auto' to='22'", more="proto='udp' source='192.168.0.0/24'")
    + f'<natns:address address="{OWN6}"/><natns:address address="auto"/>'
)  # fmt: skip
OF_MAIL = ports("start='auto' to='25'") + ports("start='auto' to='25'", more="address='127.0.0.1'")
AT_REST = domain("rest", nic("a", REST), publishes=ports("start='auto' to='1'"), uuid=REST_UUID)

LASTING = {
    "network": "uuid, name, namespace, bridge, upstream, kind, subnets, taken_over, state",
    "lease": "upstream, segment, kind, address, network",
    "transit": "*",
    "transit6": "*",
    "host_part": "network, part",
    "guest": "uuid, name, published",
    "forward": "*",
    "static_nat": "*",
    "reservation": "network, mac, family, address, owner",
    "chosen_port": "owner, network, proto, selector, target_port, port",
}
"""Each table with its columns, but for the times at which rows were used."""

pytestmark = pytest.mark.usefixtures("installed")


@dataclass
class World:
    client: Node
    web: FastGuest


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, installed: None) -> Iterator[World]:
    """Networks on two upstreams with guests; a network and a guest are at rest."""
    with DualProvider() as provider, ExitStack() as cleanup:
        write_config(provider.config6(firewall=request.param, prefixes6=["2001:db8:100::/56"]))
        cleanup.callback(remove_config)
        for file in STATE.glob("state.db*"):
            file.unlink()
        route_to_host(provider)
        cleanup.callback(forget_damaged)
        cleanup.enter_context(
            networks(
                # Not in the order of their names, which that of their addresses would be.
                dual("c", "virbr12", dhcp6=RANGE6, metadata=ON_HOST),
                isolated("b", "virbr11", metadata=OF_NETWORK),
                isolated("rest", "virbr13"),
                dual("a", "virbr10", dhcp6=RANGE6),
            )
        )
        virsh("net-destroy", "rest")
        cleanup.callback(destroy, "web", "mail")
        create(domain("mail", nic("c", MAIL), publishes=OF_MAIL))
        create(AT_REST)
        create(domain("web", nic("a", WEB), publishes=OF_WEB))
        destroy("rest")
        client = provider.neighbour("client", f"{CLIENT}/24")
        static6(client, f"{CLIENT6}/64", GATEWAY6)
        web = cleanup.enter_context(FastGuest("virbr10", WEB, "web"))
        web.static(f"{reserved(WEB)}/24", "10.0.0.1")
        web.serve("tcp", 22)
        checked()
        yield World(client, web)


def forget_damaged() -> None:
    for file in STATE.glob("state.db.damaged-*"):
        file.unlink()


def rows(table: str, columns: str = "*", where: str = "1") -> set[tuple[object, ...]]:
    with closing(sqlite3.connect(FILE)) as db:
        return set(db.execute(f"SELECT {columns} FROM {table} WHERE {where}"))


def state() -> dict[str, set[tuple[object, ...]]]:
    """All that is recorded."""
    return {table: rows(table, columns) for table, columns in LASTING.items()}


def reserved(mac: str) -> str:
    (found,) = rows("reservation", "address", f"mac = '{mac}' AND family = 4")
    return socket.inet_ntoa(int(str(found[0])).to_bytes(4))


def checked() -> None:
    __tracebackhide__ = True
    done = natns("check", check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def inside(network: str) -> str:
    """What could change of a namespace: links, addresses, rules, processes."""
    commands = (
        ("ip", "-d", "link"),
        ("ip", "address"),
        ("ip", "route"),
    )
    pids = run("ip", "netns", "pids", f"nat-{network}").stdout
    texts = [run(*command, namespace=f"nat-{network}").stdout for command in commands]
    texts.append(rules_of(network))
    lines = [line for text in texts for line in text.splitlines()]
    kept = [line for line in lines if "valid_lft" not in line and not line.startswith((":", "#"))]
    inode = Path(f"/run/netns/nat-{network}").stat().st_ino
    return "\n".join([*kept, pids, str(inode)])


# -- damage --------------------------------------------------------------------


def close() -> None:
    """Have all of the database in one file."""
    with closing(sqlite3.connect(FILE)) as db:
        db.execute("PRAGMA wal_checkpoint (TRUNCATE)")


def overwrite(where: int, octets: bytes) -> None:
    with FILE.open("r+b") as stream:
        stream.seek(where)
        stream.write(octets)


def remove() -> None:
    for file in STATE.glob("state.db*"):
        if "damaged" not in file.name:
            file.unlink()


def page_of(table: str) -> int:
    with closing(sqlite3.connect(FILE)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,))
        return int(page[0])


def break_table(table: str) -> None:
    close()
    overwrite((page_of(table) - 1) * 4096, os.urandom(4096))


def garble() -> None:
    remove()
    FILE.write_text("this is no database\n" * 100)


def zero() -> None:
    close()
    FILE.write_bytes(bytes(FILE.stat().st_size))


def empty() -> None:
    remove()
    FILE.touch()


def truncate() -> None:
    close()
    os.truncate(FILE, 8192)


def nonsense() -> None:
    with closing(sqlite3.connect(FILE)) as db, db:
        db.execute("UPDATE network SET subnets = 'x'")


DAMAGES: dict[str, Callable[[], object]] = {
    "garbage": garble,
    "zeros": zero,
    "missing": remove,
    "empty": empty,
    "truncated": truncate,
    "leases": lambda: break_table("lease"),
    "networks": lambda: break_table("network"),
    "nonsense": nonsense,
}


# -- rebuilt -------------------------------------------------------------------


CASES = [("nftables", damage) for damage in DAMAGES] + [("iptables", "garbage")]


@pytest.mark.parametrize(("world", "damage"), CASES, indirect=["world"], scope="module")
def test_sync_rebuilds_it_and_nothing_that_runs_is_interrupted(damage: str, world: World) -> None:
    before, host = state(), unordered()
    kept = {network: inside(network) for network in ("a", "b", "c")}
    own = run("ip", "-o", "-4", "-n", "nat-a", "address", "show", "upstream").stdout.split()[3]
    with greeted(world.client, own.partition("/")[0], 2222) as stream:
        DAMAGES[damage]()
        told = natns("sync")
        assert carries(stream)
        assert told.stdout.startswith("state database: is "), told.stdout
        aside = [file for file in STATE.glob("state.db.damaged-*") if file.name[-1] not in "ml"]
        assert len(aside) == (damage not in ("missing", "empty"))
        assert all(str(file) in told.stdout for file in aside)
        forget_damaged()
        checked()
        assert not natns("sync").stdout
        assert carries(stream)
    after = state()
    salvaged = damage in ("leases", "nonsense", "networks")
    for table in LASTING:
        assert {row for row in before[table] if runs(row)} == {
            row for row in after[table] if runs(row)
        }, table
    assert {network: inside(network) for network in kept} == kept
    assert not host.diff(unordered())
    if salvaged:
        # What is at rest, too, as far as the damage leaves it.
        assert after["reservation"] == before["reservation"]
        assert after["chosen_port"] == before["chosen_port"]
    else:
        anew_at_rest()


def runs(row: tuple[object, ...]) -> bool:
    """Whether a row belongs to something that runs."""
    return not {REST, REST_UUID, uuid_of("rest")}.intersection(row)


@pytest.mark.parametrize("world", ["nftables"], indirect=True)
def test_a_later_format_is_never_put_aside(world: World) -> None:
    with closing(sqlite3.connect(FILE)) as db:
        db.execute("PRAGMA user_version = 99")
        db.execute("INSERT OR REPLACE INTO writer VALUES (99, '7.1.0')")
        db.commit()
    told = f"state database {FILE}: has format 99, written by version 7.1.0 "
    remedy = ": install version 7.1.0 again, or move the file away and run virt-natns sync\n"
    try:
        for command in ("sync", "status", "check"):
            done = natns(command, check=False)
            assert done.returncode == 1
            assert done.stderr.startswith(f"virt-natns: {told}"), done.stderr
            assert done.stderr.endswith(remedy)
        assert f"broken  state database: {told}" in natns("doctor", check=False).stdout
        assert not list(STATE.glob("state.db.*"))
    finally:
        with closing(sqlite3.connect(FILE)) as db:
            db.execute("PRAGMA user_version = 3")
            db.execute("DELETE FROM writer WHERE format = 99")
            db.commit()
    checked()


def anew_at_rest() -> None:
    """Have the network and the guest at rest known again, for the next case."""
    virsh("net-start", "rest")
    virsh("net-destroy", "rest")
    create(AT_REST)
    destroy("rest")
