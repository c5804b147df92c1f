# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests with several NICs: one default route, by the NIC that is their way out.

server 203.0.113.80  behind the host
    |
   host -- virbr-nat   libvirt's own NAT network, 192.168.121.0/24
    |
  nat-a, nat-b         10.0.0.0/24, virbr10 and 10.1.0.0/24, virbr11
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import (
    CHECKOUT,
    FastGuest,
    Host,
    RealGuest,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    virsh,
    wait_for,
    write_config,
)
from lab_boundary import on_a_link
from lab_documents import MARK, compare, steps
from lab_domains import (
    NAMESPACE,
    asked,
    create,
    define,
    destroy,
    dnsmasq_pid,
    domain,
    nat,
    networks,
    nic,
    nic_on,
    ports,
    uuid_of,
)

INTERNET, PORT = "203.0.113.80", 8080
HERE, THERE = "10.8.0.2", "10.8.0.1"
MANAGED, FIRST, SECOND = "52:54:00:00:01:00", "52:54:00:00:01:0a", "52:54:00:00:01:0b"
OTHER = "52:54:00:00:01:99"

FORWARD = Path("/proc/sys/net/ipv4/ip_forward")

MANAGEMENT = """<network><name>management</name><forward mode='nat'/>
  <bridge name='virbr-nat' stp='on' delay='0'/>
  <ip address='192.168.121.1' netmask='255.255.255.0'>
    <dhcp><range start='192.168.121.100' end='192.168.121.200'/></dhcp></ip></network>
"""
LONELY = """<network><name>lonely</name><metadata>
  <natns:nat xmlns:natns='urn:libvirt-natns:1' enabled='no'/></metadata>
  <bridge name='virbr-lonely' stp='on' delay='0'/>
  <ip address='192.168.131.1' netmask='255.255.255.0'/></network>
"""
ON_MANAGEMENT, ON_A, ON_B = nic("management", MANAGED), nic("a", FIRST), nic("b", SECOND)


def network_a(metadata: str = "") -> str:
    return isolated("a", "virbr10", metadata=metadata)


def network_b(metadata: str = "") -> str:
    return isolated("b", "virbr11", address="10.1.0.1", metadata=metadata)


@contextmanager
def world(*documents: str, served: bool = True, managed: str = MANAGEMENT) -> Iterator[None]:
    """These networks beside libvirt's NAT network ``managed``, and a server outside."""
    with ExitStack() as stack:
        # libvirt has the host forward for good.
        stack.callback(FORWARD.write_text, FORWARD.read_text())
        if served:
            stack.enter_context(Service())
        far = on_a_link(stack, "far", "p-far", HERE, THERE)
        run("ip", "-n", far.name, "address", "add", f"{INTERNET}/32", "dev", "lo")
        run("ip", "route", "add", "default", "via", THERE, "metric", "5")
        far.serve("tcp", PORT)
        stack.enter_context(networks(managed, *documents))
        stack.callback(destroy, "web")
        yield


def offered(bridge: str, mac: str) -> dict[str, str]:
    """The router and DNS servers that DHCP gives a NIC, and as whom it reaches a server."""
    with FastGuest(bridge, mac, name="nic") as guest:
        offer = guest.dhcp()
        routes = run("ip", "-n", "nic", "route").stdout
        assert ("router" in offer) == ("default via" in routes)
        return {
            "router": offer.get("router", "none"),
            "dns": offer.get("dns", "none"),
            "out": asked("nic", "tcp", INTERNET, PORT) or "none",
        }


YES = {"router": "10.0.0.1", "dns": "10.0.0.1", "out": HERE}
NO = {"router": "none", "dns": "none", "out": "none"}


@pytest.mark.parametrize("served", [True, False], ids=["service", "hooks"])
def test_a_guest_beside_the_management_network(served: bool, installed: None) -> None:
    """Every Vagrant box: libvirt's NAT network leads outside, ours does not."""
    with world(network_a(), LONELY, served=served):
        assert offered("virbr10", FIRST) == YES, "not known: as ever"
        before = dnsmasq_pid("a")
        for nics, expected in (
            ((ON_MANAGEMENT, ON_A), NO),
            ((ON_A, ON_MANAGEMENT), NO),
            ((ON_A, "<interface type='user'/>"), NO),
            # An isolated network of others is no way out.
            ((nic("lonely", MANAGED), ON_A), YES),
            ((ON_A,), YES),
        ):
            create(domain("web", *nics))
            assert offered("virbr10", FIRST) == expected, nics
            # Other guests of the network have a way out.
            assert offered("virbr10", OTHER)["out"] == HERE
            assert offered("virbr-nat", MANAGED)["out"] == HERE, "the control"
            assert natns("check").stdout == ""
            destroy("web")
            assert natns("check").stdout == ""
        assert dnsmasq_pid("a") == before, "restarted"


def router(bridge: str, mac: str) -> bool:
    """Whether DHCP gives a NIC a router."""
    with FastGuest(bridge, mac, name="nic") as guest:
        return "router" in guest.dhcp()


def routers() -> tuple[bool, bool]:
    """Whether DHCP gives the guest's NICs in the networks a and b a router."""
    return router("virbr10", FIRST), router("virbr11", SECOND)


def test_two_networks_of_ours_give_one_default_route(installed: None) -> None:
    with world(network_a(), network_b()):
        for nics, expected in (((ON_A, ON_B), (True, False)), ((ON_B, ON_A), (False, True))):
            create(domain("web", *nics))
            assert routers() == expected
            destroy("web")
        assert natns("check").stdout == ""


def test_a_network_that_goes_leaves_the_way_out_to_another(installed: None) -> None:
    with world(network_a(), network_b()):
        create(domain("web", ON_A, ON_B))
        virsh("net-destroy", "a")
        assert router("virbr11", SECOND)
        virsh("net-start", "a")
        assert routers() == (True, False)
        assert natns("check").stdout == ""


HOOK = Path("/etc/libvirt/hooks/network")
REFUSES_A = """#!/bin/sh
/etc/libvirt/hooks/ours "$@" || exit
[ "$1 $2" != "a started" ]
"""


@contextmanager
def started_is_refused() -> Iterator[None]:
    """After our hook another one fails, and libvirt gives the start of network a up."""
    ours = HOOK.rename(HOOK.with_name("ours"))
    HOOK.write_text(REFUSES_A)
    HOOK.chmod(0o755)
    try:
        yield
    finally:
        ours.replace(HOOK)


@pytest.mark.parametrize("served", [True, False], ids=["service", "hooks"])
def test_a_start_that_is_given_up_leaves_the_way_out_to_another(
    served: bool, installed: None
) -> None:
    with world(network_a(), network_b(), served=served):
        create(domain("web", ON_A, ON_B))
        virsh("net-destroy", "a")
        with started_is_refused():
            assert "hook script" in virsh("net-start", "a", check=False).stderr.lower()
        if not served:
            natns("sync")  # no hook tells of it
        wait_for(lambda: natns("check", check=False).stdout == "")
        assert router("virbr11", SECOND)


def asks_for(default_route: str) -> str:
    """Metadata about the guest's NIC in network a."""
    return f'<natns:interface network="a" defaultRoute="{default_route}"/>'


def test_what_metadata_and_configuration_say(installed: None) -> None:
    try:
        with world(network_a(nat("")), network_b(nat("").replace("<natns:nat", NO_ROUTE))):
            assert router("virbr10", OTHER)
            assert not router("virbr11", OTHER)
            for config, metadata, expected in (
                ("auto", nat("").replace("<natns:nat", YES_ROUTE), True),
                ("auto", nat(asks_for("yes")), True),
                ("auto", nat(asks_for("auto")), False),
                ("auto", nat(ports("start='2222' to='22'")), True),
                ("yes", "", True),
                ("no", "", False),
            ):
                write_config(f'default_route = "{config}"\n')
                natns("sync")
                create(domain("web", ON_MANAGEMENT, ON_A, metadata=metadata))
                assert router("virbr10", FIRST) == expected, (config, metadata)
                assert router("virbr10", OTHER) == (config != "no")
                assert natns("check").stdout == ""
                destroy("web")
    finally:
        remove_config()


YES_ROUTE = '<natns:nat defaultRoute="yes"'
NO_ROUTE = '<natns:nat defaultRoute="no"'
ENTRIES = {
    "a reservation": ("", asks_for("no") + ports("start='2222' to='22'")),
    "a name": ("<host name='web' ip='10.0.0.77'/>", ""),
    "a MAC": (f"<host mac='{FIRST}' ip='10.0.0.77'/>", ""),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_of_dhcp_stay_as_they_are(entry: str, installed: None) -> None:
    """dnsmasq neither hangs nor ends, whatever other entries its guests have."""
    host, published = ENTRIES[entry]
    xml = network_a().replace("</dhcp>", f"{host}</dhcp>")
    with world(xml):
        for _ in range(2):
            create(domain("web", ON_MANAGEMENT, ON_A, publishes=published))
            with FastGuest("virbr10", FIRST, name="nic") as guest:
                offer = guest.dhcp(hostname="web")
            assert "router" not in offer
            assert offer["ip"] == ("10.0.0.77" if host else offer["ip"])
            assert router("virbr10", OTHER)
            destroy("web")
            assert router("virbr10", FIRST)
            assert natns("check").stdout == ""


VIRTIO = "<model type='virtio'/><rom enabled='no'/></interface>"
LEASE = (
    "ip address flush dev eth0; udhcpc -i eth0 -n -q -f -t 5 -T 2 -s /bin/lease >/dev/null 2>&1;"
    " ip route"
)


def renewed(guest: RealGuest) -> str:
    """The guest's routes, once its client has asked DHCP again."""
    return guest.run(LEASE, timeout=60)


@pytest.mark.parametrize("served", [True, False], ids=["service", "hooks"])
def test_a_nic_of_a_real_guest_comes_and_goes(served: bool, installed: None) -> None:
    management = ON_MANAGEMENT.replace("</interface>", VIRTIO)
    with (
        world(network_a(), served=served),
        RealGuest("web", "a", FIRST, interfaces=[management]) as guest,
    ):
        guest.wait_ready()
        assert "default" not in guest.run("ip route")
        virsh("detach-interface", "web", "network", "--mac", MANAGED, "--live")
        wait_for(
            lambda: "default via 10.0.0.1" in renewed(guest),
            timeout=60, what="the way out by the NIC that is left",
        )  # fmt: skip
        assert natns("check").stdout == ""
        plug = ("attach-interface", "web", "network", "management", "--mac", MANAGED)
        virsh(*plug, "--live", "--model", "virtio")
        if not served:
            # Nothing was recorded of a guest with one NIC.
            assert "has other NICs than DHCP knows" in natns("check", check=False).stdout
            natns("sync")
        wait_for(lambda: "default" not in renewed(guest), timeout=60, what="the other way out")
        assert natns("check").stdout == ""


def test_the_status_of_a_network_that_stays_isolated(installed: None) -> None:
    """Before and after it had a router."""
    with world(network_a(), LONELY):
        for name in ("lonely", "a"):
            health = status_of(name)
            assert health == ("ok" if name == "a" else "isolated (enabled=no)")
        virsh("net-destroy", "a")
        assert status_of("a") == "down"
        disabled = nat("").replace("<natns:nat", '<natns:nat enabled="no"')
        define_network(isolated("a", "virbr10", metadata=disabled, uuid=uuid_of("a")))
        virsh("net-start", "a")
        assert status_of("a") == "isolated (enabled=no)"
        for command in (("exec", "a", "--", "true"), ("check", "a")):
            assert natns(*command, check=False).stderr == (
                "virt-natns: network a is not touched: its metadata says enabled='no'\n"
            )
        assert [json.loads(natns("status", "--json", "a").stdout)["networks"][0]["state"]] == [
            "isolated"
        ]
        assert natns("check").stdout == ""


def status_of(network: str) -> str:
    lines = natns("status").stdout.splitlines()
    (line,) = [line for line in lines if line.startswith(f"{network} ")]
    return re.split(r"  +", line)[-1]


def test_a_forward_of_a_guest_that_is_off(installed: None) -> None:
    """Refused if no NIC is ever in a network of ours; said with the network down as well."""
    with world(network_a(), LONELY), ExitStack() as stack:
        virsh("net-destroy", "a")
        for name, nics, arguments, network in (
            ("alone", (ON_MANAGEMENT,), (), ""),
            ("lonely", (nic("lonely", FIRST),), (), ""),
            ("nowhere", (nic("undefined", FIRST),), (), ""),
            ("both", (ON_MANAGEMENT, ON_A), ("--network", "management"), "management"),
        ):
            define(domain(name, *nics))
            stack.callback(virsh, "undefine", name)
            before = virsh("dumpxml", name).stdout
            done = natns("forward", "add", name, "2222:22", *arguments, check=False)
            assert done.returncode == 1
            which = f"network {network}" if network else "a network"
            remedy = f"see virt-natns plan {network}" if network else "see virt-natns status"
            assert done.stderr == (
                f"virt-natns: guest {name} has no NIC in {which} that libvirt-natns handles:"
                f" {remedy}\n"
            )
            assert virsh("dumpxml", name).stdout == before
        define(domain("bridged", nic_on("virbr10", SECOND)))
        stack.callback(virsh, "undefine", "bridged")
        for name in ("both", "bridged"):
            said = natns("forward", "add", name, "2222:22").stdout
            assert said == f"{name}: published when it starts\n"


@pytest.mark.parametrize("served", [True, False], ids=["service", "hooks"])
def test_a_network_that_ends_under_a_running_guest(served: bool, installed: None) -> None:
    """The guest publishes nothing there any more, and its port is free for others."""
    published = ports("start='2222' to='22'", more="network='a'")
    with world(network_b(), served=served):
        stack = networks(network_a())
        with stack:
            create(domain("web", ON_A, ON_B, publishes=published))
            assert "published" in natns("forward", "list", "web").stdout
            virsh("net-destroy", "a")
            virsh("net-undefine", "a")
            listed = natns("forward", "list").stdout
            assert "published" not in listed
            assert "# impossible: libvirt has no network a" in listed
            assert natns("check").stdout == ""
            other = nic("b", OTHER)
            create(domain("other", other, publishes=ports("start='2222' to='22'")))
            destroy("other")
            define_network(network_a())
            virsh("net-start", "a")
            wait_for(lambda: "published" in natns("forward", "list").stdout, what="the forward")
            assert natns("check").stdout == ""


XMLNS = f' xmlns:natns="{NAMESPACE}"'
PAGE = CHECKOUT / "docs" / "how-to" / "two-networks.md"


def block_of(language: str) -> str:
    """What stands inside the <metadata> of the page's block in that language."""
    block = PAGE.read_text().partition(f"```{language}\n<metadata>\n")[2]
    return block.partition("</metadata>")[0]


def cluster(metadata: str = "", uuid: str | None = None) -> str:
    hosts = [Host(FIRST, "10.0.0.101")]
    return isolated("cluster", "virbr10", hosts=hosts, metadata=metadata, uuid=uuid)


def lease_of_second(guest: RealGuest) -> str:
    """What DHCP tells the guest's second NIC by now."""
    ask = LEASE.replace("eth0", "eth1").removesuffix("ip route")
    return guest.run(f"ip link set eth1 up; {ask} cat /run/lease", timeout=60)


def test_the_page_about_two_networks(installed: None) -> None:
    """Typed as it stands; libvirt numbers taps on, and ssh is the guest's console."""
    host = f"<dhcp><host mac='{MANAGED}' ip='192.168.121.52'/>"
    vagrant = MANAGEMENT.replace("management", "vagrant-libvirt").replace("<dhcp>", host)
    second = nic("cluster", FIRST).replace("</interface>", VIRTIO)
    with world(cluster(), managed=vagrant):
        with RealGuest("box", "vagrant-libvirt", MANAGED, interfaces=[second]) as guest:
            guest.wait_ready()
            assert "router none dns none" in lease_of_second(guest)
            todo = steps(PAGE)
            for step in todo:
                # busybox's ip does not show who made a route.
                step.lines = [line.replace(" proto kernel", "") for line in step.lines]
            printed = ""
            for number, step in enumerate(todo):
                inside = step.command.removeprefix("ssh box ")
                typed = guest.run(inside) if inside != step.command else sh(inside)
                printed += f"{MARK}{number}\n{typed}"
            taps = {tap: f"vnet{n}" for n, tap in enumerate(re.findall(r"vnet\d+", printed))}
            compare(todo, re.sub(r"vnet\d+", lambda tap: taps[tap[0]], printed))
            # libvirt adds the namespace by itself.
            element = block_of("xml domain").replace(XMLNS, "").replace("natns:", "").strip()
            uri = ("--uri", NAMESPACE, "--key", "natns")
            virsh("metadata", "box", *uri, "--live", "--set", element)
            wait_for(lambda: "router 10.0.0.1" in lease_of_second(guest), what="the other way out")
        virsh("net-destroy", "cluster")
        define_network(cluster(block_of("xml network"), uuid_of("cluster")))
        virsh("net-start", "cluster")
        assert not router("virbr10", OTHER)


def sh(command: str) -> str:
    return run("sh", "-c", command).stdout
