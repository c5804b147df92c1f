# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks beside firewalld, 1.x and 2.x: over its start, stop and reload.

The control is a guest of libvirt's own NAT network, which firewalld lets out by libvirt's zone.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab import (
    CHECKOUT,
    FastGuest,
    Provider,
    Service,
    isolated,
    natns,
    remove_config,
    run,
    virsh,
    wait_for,
    write_config,
)
from lab_boundary import FORWARDING, guest_on, nat_network, on_a_link, transit_address
from lab_documents import type_page
from lab_domains import asked, nat, networks, ports
from lab_hosts_firewalld import CONFIG, RELEASES, Firewalld, Release, SystemBus
from lab_hosts_resolvers import dns, resolvers
from lab_ipv6 import dual, static6
from lab_servers import Server

OUTSIDE, HERE = "192.168.7.1", "192.168.7.2"
OUTSIDE6, HERE6 = "2001:db8:7::1", "2001:db8:7::2"
PORT, PUBLISHED, CLOSED, SSH = 8080, 2222, 9090, 22
GATEWAY, GUEST, GUEST6 = "10.0.0.1", "10.0.0.5", "fd00:a::5"
BRIDGE = "natns-host"
PAGE = CHECKOUT / "docs" / "how-to" / "firewalld.md"
NAME, ANSWER = "www.example.test", "198.51.100.7"
BRIDGE_NF6 = Path("/proc/sys/net/bridge/bridge-nf-call-ip6tables")
HEALED = 20.0
"""Seconds that the service may take on a busy machine."""

NETWORK = dual(
    "a",
    "virbr10",
    address6="fd00:a::1",
    metadata=nat(
        ports(f"start='{PUBLISHED}' to='{PORT}'", more=f"guestAddress='{GUEST}'")
        + ports(f"start='{PUBLISHED}' to='{PORT}'", more=f"guestAddress='{GUEST6}'")
    ),
)
CONTROL = nat_network("control", "virbr52", "192.168.152")


@pytest.fixture(scope="module", autouse=True)
def bus(installed: None) -> Iterator[None]:
    with SystemBus():
        yield


@pytest.fixture(scope="module", params=["trixie"])
def daemon(request: pytest.FixtureRequest, bus: None) -> Iterator[Firewalld]:
    release: Release = request.param
    with Firewalld(release) as firewalld:
        yield firewalld


@pytest.fixture
def firewalld(daemon: Firewalld, nothing_left: None) -> Iterator[Firewalld]:
    """firewalld that runs, and whose files are as they were in the end."""
    kept = {file: file.read_text() for file in CONFIG.rglob("*.xml")}
    yield daemon
    for file in set(CONFIG.rglob("*.xml")) - set(kept):
        file.unlink()
    for file, text in kept.items():
        file.write_text(text)
    if not daemon.runs:
        daemon.start()
    # libvirt leaves links in its zone.
    daemon.reload()


class World:
    """A guest of ours and one of libvirt's, a machine outside, and services of the host."""

    def __init__(self, stack: ExitStack) -> None:
        # libvirt switches it on for a network with NAT, and leaves it.
        stack.callback(FORWARDING.write_text, FORWARDING.read_text())
        if BRIDGE_NF6.exists():
            # firewalld drops bridged frames of addresses that the host has no route to.
            stack.callback(BRIDGE_NF6.write_text, BRIDGE_NF6.read_text())
            BRIDGE_NF6.write_text("0")
        far = on_a_link(stack, "far", "p-far", HERE, OUTSIDE)
        run("ip", "address", "add", f"{HERE6}/64", "dev", "p-far", "nodad")
        static6(far, f"{OUTSIDE6}/64", HERE6)
        run("ip", "route", "add", "default", "via", OUTSIDE)
        run("ip", "-6", "route", "add", "default", "via", OUTSIDE6)
        for address in ("", "::"):
            far.serve("tcp", PORT, address=address)
        for port in (SSH, CLOSED):
            stack.callback(Server(None, "tcp", port).close)
        # The host's own resolver, which the host alone can ask.
        stack.enter_context(resolvers("127.0.0.1"))
        stack.enter_context(dns(None, ANSWER, address="127.0.0.1"))
        stack.enter_context(networks(NETWORK, CONTROL))
        guest = guest_on(stack, "guest", "virbr10", GUEST)
        self.guest = guest
        static6(guest, f"{GUEST6}/64", "fd00:a::1")
        for address in ("", "::"):
            guest.serve("tcp", PORT, address=address)
        guest_on(stack, "control", "virbr52", "192.168.152.5")

    @staticmethod
    def way_out() -> bool:
        """Whether our guest leaves in both families."""
        return (
            asked("guest", "tcp", OUTSIDE, PORT, 1.5),
            asked("guest", "tcp", OUTSIDE6, PORT, 1.5),
        ) == (HERE, HERE6)

    def check(self) -> None:
        """Out, in, and no farther than a guest of libvirt's."""
        # libvirt, too, needs a moment after firewalld has forgotten its zone.
        wait_for(lambda: asked("control", "tcp", OUTSIDE, PORT) == HERE, HEALED, "the control")
        assert self.way_out()
        open_ones = [("far", HERE, PUBLISHED), ("far", HERE6, PUBLISHED)]
        open_ones += [("control", HERE, PUBLISHED), ("guest", HERE, SSH), ("control", HERE, SSH)]
        closed = [("guest", HERE, CLOSED), ("control", HERE, CLOSED)]
        closed += [("far", transit_address("a"), PORT)]
        probes = [*open_ones, *closed]
        with ThreadPoolExecutor() as pool:
            answers = pool.map(lambda each: asked(each[0], "tcp", each[1], each[2], 1.5), probes)
        reached = [each for each, answer in zip(probes, answers, strict=True) if answer]
        assert reached == open_ones
        assert self.guest.dig(NAME, server=GATEWAY) == [ANSWER], "a name that the host alone knows"


@pytest.fixture
def world(firewalld: Firewalld) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


# The first, before a firewalld that the other tests share is started.
def test_a_strict_firewalld_is_told(bus: None) -> None:
    with Firewalld("trixie", "StrictForwardPorts=yes") as firewalld, ExitStack() as stack:
        world = World(stack)
        assert world.way_out()
        assert not asked("far", "tcp", HERE, PUBLISHED, 1.0)
        assert "StrictForwardPorts" in natns("doctor", check=False).stdout
        assert firewalld.zone_of(BRIDGE) == "natns"


@pytest.mark.parametrize("daemon", RELEASES, indirect=True)
def test_over_start_reload_and_stop_with_the_service(firewalld: Firewalld) -> None:
    firewalld.stop()
    with ExitStack() as stack:
        service = stack.enter_context(Service())
        world = World(stack)
        assert world.way_out()
        for happens in (firewalld.start, firewalld.reload, firewalld.restart):
            happens()
            wait_for(world.way_out, timeout=HEALED, what=f"the way out after {happens.__name__}")
            world.check()
            assert firewalld.zone_of(BRIDGE) == "natns"
            assert natns("check").stdout == ""
        firewalld.stop()
        assert world.way_out()
        assert natns("check").stdout == ""
        firewalld.start()
        wait_for(world.way_out, timeout=HEALED, what="the way out after another start")
        assert not service.logged("given up")
    assert firewalld.zone_of(BRIDGE) == ""


@pytest.mark.parametrize(
    ("daemon", "backend"),
    [("bookworm", "iptables"), ("trixie", "nftables")],
    indirect=["daemon"],
)
def test_without_the_service(backend: str, firewalld: Firewalld) -> None:
    with ExitStack() as stack:
        write_config(f'firewall = "{backend}"\n')
        stack.callback(remove_config)
        world = World(stack)
        world.check()
        firewalld.reload()
        assert f"firewalld: {BRIDGE} is in no zone" in natns("check", check=False).stdout
        natns("sync")
        world.check()
        assert natns("check").stdout == ""
        firewalld.restart()
        assert not world.way_out()
        with networks(isolated("b", "virbr11")):
            world.check()
        firewalld.stop()
        assert world.way_out()
        firewalld.start()
        natns("sync")
        world.check()


def test_a_firewalld_that_hangs_stops_no_event(firewalld: Firewalld) -> None:
    """libvirt itself answers nothing then: it asks firewalld, too.  So the hook is run by hand."""
    with ExitStack() as stack:
        world = World(stack)
        xml = virsh("net-dumpxml", "a").stdout

        def update() -> None:
            event = ("a", "updated", "begin", "-")
            done = run("/etc/libvirt/hooks/network", *event, input=f"<hookData>{xml}</hookData>")
            assert (done.stdout, done.stderr) == ("", "")

        def hang() -> None:
            firewalld.reload()
            with ExitStack() as frozen:
                firewalld.freeze()
                frozen.callback(firewalld.thaw)
                update()

        hang()
        update()
        assert world.way_out()
        service = stack.enter_context(Service())
        hang()
        wait_for(world.way_out, timeout=2 * HEALED, what="the way out")
        assert service.runs


def test_an_unknown_zone_is_told_with_the_remedy(firewalld: Firewalld) -> None:
    natns("uninstall")
    firewalld.reload()
    files = sorted(file.name for file in CONFIG.rglob("natns*"))
    assert files == []
    with ExitStack() as stack:
        natns("install")
        stack.callback(natns, "install")
        for file in CONFIG.rglob("natns*"):
            file.unlink()
        firewalld.reload()
        world = World(stack)
        assert not world.way_out()
        for command in ("status", "check", "doctor"):
            said = natns(command, check=False).stdout
            assert "does not know the zone natns" in said
            assert "virt-natns install, then firewall-cmd --reload" in said
        # A reload would cost the administrator this.
        firewalld.cmd("--zone=public", "--add-port=4711/tcp")
        assert "a reload drops changes that are not permanent" in natns("install").stdout
        assert firewalld.cmd("--zone=public", "--query-port=4711/tcp").stdout == "yes\n"
        firewalld.cmd("--zone=public", "--remove-port=4711/tcp")
        assert "told firewalld to read the zone natns" in natns("install").stdout
        world.check()


def test_an_administrators_changes_stay(firewalld: Firewalld, tmp_path: Path) -> None:
    """Those of the page about firewalld, typed as it stands, and one more."""
    firewalld.cmd("--permanent", "--zone=work", "--add-interface=natns-lan")
    write_config('[upstreams.lan]\nkind = "host"\n')
    lan = nat("<natns:upstream name='lan'/>")
    with ExitStack() as stack:
        stack.callback(remove_config)
        world = World(stack)
        type_page(PAGE, tmp_path)
        theirs = (CONFIG / "zones/natns.xml").read_text()
        wait_for(world.way_out, timeout=HEALED, what="the way out, without sync")
        stack.enter_context(networks(isolated("b", "virbr11", metadata=lan)))
        assert asked("control", "tcp", HERE, SSH)
        assert not asked("guest", "tcp", HERE, SSH, 1.0)
        assert firewalld.zone_of("natns-lan") == "work"
        natns("sync")
        assert firewalld.zone_of("natns-lan") == "work"
        assert "kept /etc/firewalld/zones/natns.xml" in natns("install").stdout
    assert firewalld.zone_of("natns-lan") == "work"
    assert "kept /etc/firewalld/zones/natns.xml" in natns("uninstall").stdout
    assert (CONFIG / "zones/natns.xml").read_text() == theirs
    # A rule was added to it.
    assert [file.name for file in CONFIG.rglob("natns-*.xml")] == ["natns-out.xml"]
    natns("install")


def test_the_service_goes_on_beside_a_bridge(firewalld: Firewalld, provider: Provider) -> None:
    """An upstream bridge asks nothing of firewalld; its rules with an owner are listed."""
    write_config(provider.config())
    # Where bridged frames pass the host's rules, the bridge needs a zone that forwards.
    firewalld.cmd("--permanent", "--zone=public", "--add-interface=br0")
    firewalld.reload()
    with ExitStack() as stack:
        stack.callback(remove_config)
        service = stack.enter_context(Service())
        pid = service.pid
        stack.enter_context(networks(isolated("a", "virbr10")))
        stack.enter_context(FastGuest("virbr10", name="guest")).dhcp()
        for happens in (firewalld.reload, firewalld.restart):
            happens()
            run("nft", "add", "table", "inet", "other")
            run("nft", "delete", "table", "inet", "other")
            service.idle()
            assert natns("check").stdout == ""
            assert run("curl", "-sf", "http://203.0.113.80/", namespace="guest").stdout
        assert service.pid == pid
        assert not service.logged("given up")
