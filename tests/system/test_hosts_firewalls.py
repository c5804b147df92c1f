# SPDX-License-Identifier: LGPL-2.1-or-later
"""Firewalls of an administrator's own: what they drop stays dropped, and is said."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from lab import (
    FastGuest,
    Node,
    Provider,
    Service,
    isolated,
    natns,
    remove_config,
    run,
    wait_for,
    write_config,
)
from lab_boundary import on_a_link, reaches
from lab_domains import asked, create, destroy, domain, networks, nic, ports
from lab_hosts_firewalls import (
    CONF,
    KILL_SWITCH,
    health,
    listed,
    loaded,
    stops,
    suggested,
    without_bridge_nf,
)
from test_hosts import HERE, INTERNET, LAN, PORT, ROUTER, TABLE, leaves_as, way_out

MAC = "52:54:00:00:00:05"
CLIENT, BANNED, HOST = "192.168.0.77", "192.168.0.66", "192.168.0.2"


@pytest.fixture(autouse=True)
def routed_alone() -> Iterator[None]:
    with without_bridge_nf():
        yield


@pytest.fixture(params=["nftables", "iptables"])
def backend(request: pytest.FixtureRequest, installed: None) -> Iterator[str]:
    write_config(f'firewall = "{request.param}"\n')
    yield str(request.param)
    remove_config()


def lan() -> "ExitStack":
    """A LAN that the host leaves by when it has nothing better."""
    stack = ExitStack()
    stack.enter_context(
        way_out(f"route add default via {ROUTER} metric 9", name="lan", here=LAN, there=ROUTER)
    )
    return stack


def guest_of_a(stack: ExitStack) -> FastGuest:
    guest = stack.enter_context(FastGuest("virbr10", name="guest"))
    guest.dhcp()
    return guest


def test_a_kill_switch_holds(backend: str, served: bool) -> None:
    """The tunnel goes, and guests stay within: the guard is never changed."""
    with ExitStack() as stack:
        stack.enter_context(lan())
        stack.enter_context(loaded(KILL_SWITCH, "inet vpnguard"))
        resident = stack.enter_context(Service()) if served else None
        with way_out(*TABLE, name="tun"):
            stack.enter_context(networks(isolated("a", "virbr10")))
            guest_of_a(stack)
            assert leaves_as(HERE)
            assert health("a") == "ok"
            assert stops() == []
        if not served:
            natns("sync")
        assert asked(None, "tcp", INTERNET, PORT) == LAN, "the host itself is not guarded"
        wait_for(lambda: health("a") != "ok", timeout=20)
        assert health("a") == "stopped by nftables: inet vpnguard forward (reject)"
        assert not leaves_as(LAN)
        (line,) = stops()
        assert line.startswith("nftables: inet vpnguard forward (reject) stops packets of the")
        if resident:
            told = 'libvirt_natns_network_obstacle{network="a",obstacle="stopped"} 1.0'
            wait_for(lambda: told in natns("metrics").stdout, timeout=20)
            assert "event=obstacle network=a obstacle=stopped reason=" in resident.log()
        natns("sync")
        assert not leaves_as(LAN)


GUARDS = {
    "policy": "policy drop;",
    "drop": 'policy accept; oifname != "wg0" drop',
    "called": "policy accept; jump inner",
}


@pytest.mark.parametrize(("kind", "family"), zip(GUARDS, ("inet", "ip", "inet"), strict=True))
def test_the_lines_that_are_suggested_help(kind: str, family: str, installed: None) -> None:
    inner = 'set s { type ifname; elements = { "wg0" } }; chain inner { oifname != @s reject; }'
    rules = f"type filter hook forward priority -5; {GUARDS[kind]}"
    table = f"{family} guard"
    with ExitStack() as stack:
        stack.enter_context(lan())
        stack.enter_context(networks(isolated("a", "virbr10")))
        guest_of_a(stack)
        assert leaves_as(LAN)
        run("nft", "-f", "-", input=f"table {table} {{ {inner}; chain forward {{ {rules}; }}; }}")
        stack.callback(run, "nft", "delete", "table", *table.split())
        before = listed(table)
        natns("sync")
        assert listed(table) == before
        assert not leaves_as(LAN)
        how = {"policy": "policy drop", "drop": "drop", "called": "reject in inner"}[kind]
        assert health("a") == f"stopped by nftables: {table} forward ({how})"
        (line,) = stops()
        for rule in suggested(line):
            run("nft", f"insert rule {table} forward {rule}")
        assert leaves_as(LAN)
        assert health("a") == "ok"
        assert stops() == []


def test_what_an_administrator_rejects_stays_rejected(backend: str) -> None:
    with ExitStack() as stack:
        stack.enter_context(lan())
        peer = on_a_link(stack, "peer", "p-peer", "192.168.9.1", "192.168.9.5")
        peer.serve("http", 80)
        stack.enter_context(loaded(CONF, "inet filter"))
        stack.enter_context(networks(isolated("a", "virbr10")))
        guest = guest_of_a(stack)
        natns("sync")
        assert leaves_as(LAN)
        assert reaches(None, "192.168.9.5", 80), "the control"
        assert not reaches(guest, "192.168.9.5", 80)
        assert health("a") == "ok"
        assert stops() == []


def test_a_forward_chain_of_iptables_is_its_administrators(backend: str) -> None:
    """Explicit rules hold.  They are named with a command of iptables."""
    with ExitStack() as stack:
        stack.enter_context(lan())
        stack.enter_context(networks(isolated("a", "virbr10")))
        guest_of_a(stack)
        assert leaves_as(LAN)
        rule = "FORWARD -i natns-host ! -o wg0 -j REJECT"
        run("sh", "-ec", f"iptables -A {rule}")
        stack.callback(run, "sh", "-ec", f"iptables -D {rule}")
        natns("sync")
        assert not leaves_as(LAN)
        (line,) = stops()
        assert line.startswith("nftables: ip filter FORWARD (reject) stops packets of the networks")
        for command in line.rpartition("networks: ")[2].split("; "):
            assert command.startswith("iptables -I FORWARD ")
            run("sh", "-ec", command)
            stack.callback(run, "sh", "-ec", command.replace("-I", "-D"))
        assert leaves_as(LAN)
        assert stops() == []


EMPTY = "nft delete chain ip nat PREROUTING"
"""iptables-nft leaves the chain, empty."""

# -- bans --------------------------------------------------------------------

BANS = {
    "FORWARD": f"iptables {{}} FORWARD -s {BANNED} -j DROP",
    "translated": f"iptables -t nat {{}} PREROUTING -s {BANNED} -p tcp --dport 2222"
    " -j REDIRECT --to-ports 9",
}
OWN_BAN = f"""table ip own {{ chain pre {{ type nat hook prerouting priority dstnat;
ip saddr {BANNED} tcp dport 2222 redirect to :9; }}; }}"""
UNDO = (
    "nft delete table inet natns",
    "iptables -D FORWARD -m comment --comment libvirt-natns -j NATNS-FORWARD",
    "iptables-legacy -t nat -F NATNS-DNAT",
)
"""Damage that a heal repairs, by loading our rules anew."""


def test_bans_hold(backend: str) -> None:
    """A heal puts nothing of ours ahead of an administrator's rules."""
    legacy = backend == "iptables"
    published = domain("web", nic("a", MAC), publishes=ports("start='2222' to='22'"))
    with ExitStack() as stack:
        provider = stack.enter_context(Provider())
        client = provider.neighbour("client", f"{CLIENT}/24")
        banned = provider.neighbour("banned", f"{BANNED}/24")
        stack.enter_context(networks(isolated("a", "virbr10")))
        stack.callback(destroy, "web")
        create(published)
        guest = stack.enter_context(FastGuest("virbr10", MAC, "web"))
        guest.dhcp()
        guest.serve("tcp", 22)

        def served(node: Node) -> bool:
            return asked(node.name, "tcp", HOST, 2222, timeout=1.0) is not None

        def heal() -> None:
            for command in UNDO:
                run("sh", "-c", command, check=False)
            natns("sync")
            assert natns("check").stdout == ""

        assert served(client)
        assert served(banned)
        for ban in BANS.values():
            program = ban.replace("iptables", "iptables-legacy") if legacy else ban
            if "nat" not in ban:
                program = ban
            run("sh", "-ec", program.format("-I"))
            heal()
            assert served(client)
            assert not served(banned), ban
            before = run("iptables", "-S", "FORWARD").stdout
            natns("sync")
            assert run("iptables", "-S", "FORWARD").stdout == before
            run("sh", "-ec", program.format("-D"))
            assert served(banned), ban
        if not legacy:
            run("sh", "-ec", EMPTY)
        if not legacy:
            run("nft", "-f", "-", input=OWN_BAN)
            stack.callback(run, "nft", "delete table ip own")
            heal()
            assert not served(banned)
            assert served(client)
