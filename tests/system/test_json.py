# SPDX-License-Identifier: LGPL-2.1-or-later
"""Output for programs: the shipped schema holds for it, and it has all there is to know."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

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
    virsh,
    write_config,
)
from lab_domains import define, destroy, domain, nic, ports, start
from lab_json import SCHEMA, valid

MAC, OFF_MAC, LOST_MAC, BAD_MAC = (f"52:54:00:00:00:0{number}" for number in range(5, 9))
DISABLED = '<natns:nat xmlns:natns="urn:libvirt-natns:1" enabled="no"/>'
OWN_PORT = (
    '<natns:nat xmlns:natns="urn:libvirt-natns:1">'
    '<natns:portForward guestAddress="10.0.0.9"><natns:range start="7777" to="22"/>'
    "</natns:portForward></natns:nat>"
)
NAT = (
    "<network><name>plain</name><forward mode='nat'/><bridge name='virbr19'/>"
    "<ip address='10.9.0.1' prefix='24'/></network>"
)


@pytest.fixture(scope="module")
def world(installed: None) -> Iterator[Service]:
    """Network a with a guest that publishes, and networks and guests of every other sort."""
    with ExitStack() as stack:
        provider = stack.enter_context(Provider())
        write_config(provider.config())
        stack.callback(remove_config)
        service = stack.enter_context(Service())
        define_network(isolated("a", "virbr10"))
        define_network(isolated("off", "virbr11", metadata=OWN_PORT))
        define_network(isolated("closed", "virbr12", address="10.2.0.1", metadata=DISABLED))
        define_network(NAT)
        for network in ("a", "closed", "plain"):
            virsh("net-start", network)
        more = ports("start='auto' to='22'") + '<natns:address address="192.168.0.150"/>'
        define(domain("web", nic("a", MAC), publishes=ports("start='8080' to='80'") + more))
        define(domain("idle", nic("a", OFF_MAC), publishes=ports("start='8081' to='80'") + more))
        define(domain("lost", nic("plain", LOST_MAC), publishes=ports("start='8082'")))
        define(domain("bad", nic("a", BAD_MAC)))
        # libvirt keeps any metadata, wrong metadata of ours included.
        wrong = '<nat><portForward><range start="http"/></portForward></nat>'
        key = ("--uri", "urn:libvirt-natns:1", "--key", "natns")
        virsh("metadata", "bad", "--config", *key, "--set", wrong)
        start("web")
        stack.callback(destroy, "web")
        stack.enter_context(FastGuest("virbr10", MAC)).dhcp()
        yield service


def status(*words: str) -> dict[str, Any]:
    return valid("status", natns("status", "--json", *words).stdout)


def named(entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = (entry for entry in entries if name in (entry.get("name"), entry.get("network")))
    return found


def rows(name: str) -> dict[Any, dict[str, Any]]:
    """The forwards of a guest by their target's port."""
    listed = valid("forward_list", natns("forward", "list", "--json").stdout)["forwards"]
    assert listed == status()["forwards"]
    return {row["target_first"]: row for row in listed if row["guest"] == name}


def test_every_network_of_libvirt_has_a_verdict(world: Service) -> None:
    listed = {each["name"]: each for each in status()["libvirt_networks"]}
    verdicts = {name: (each["handled"], each["reason"]) for name, each in listed.items()}
    assert verdicts == {
        "a": (True, "isolated"),
        "closed": (False, "its metadata says enabled='no'"),
        "off": (True, "annotated"),
        "plain": (False, "has <forward mode='nat'>"),
    }
    assert [listed[name]["active"] for name in ("a", "off")] == [True, False]
    assert listed["a"]["persistent"]
    assert not listed["a"]["autostart"]


def test_guests_and_their_leases(world: Service) -> None:
    told = status()
    web = named(told["domains"], "web")
    assert web["uuid"] == virsh("domuuid", "web").stdout.strip()
    assert (web["running"], web["error"]) == (True, None)
    (place,) = web["nics"]
    assert place["addresses"] == place["reserved"] == ["10.0.0.100"]
    (lease,) = named(told["networks"], "a")["dhcp_leases"]
    assert (lease["mac"], lease["address"], lease["guest"]) == (MAC, "10.0.0.100", "web")
    assert named(told["networks"], "a")["leases"] == 1
    assert not named(told["domains"], "idle")["running"]
    assert "<natns:range> has start='http'" in named(told["domains"], "bad")["error"]


def test_pools(world: Service) -> None:
    (pool,) = named(status()["upstreams"], "provider")["pools"]
    # Network a, and the address of guest web.
    assert (pool["kind"], pool["size"], pool["used"]) == ("ipv4", 100, 2)
    assert named(status()["upstreams"], "provider")["default"]
    assert named(status()["upstreams"], "host")["kind"] == "host"


def test_forwards_that_are_configured_and_not_in_force(world: Service) -> None:
    assert {row["state"] for row in rows("web").values()} == {"published"}
    idle = rows("idle")
    assert {row["state"] for row in idle.values()} == {"off"}
    assert (idle[80]["first"], idle[80]["address"], idle[80]["target"]) == (
        8081, "192.168.0.100", None
    )  # fmt: skip
    # Its port is chosen at its first start.
    assert idle[22]["first"] is None
    assert idle[None]["address"] == "192.168.0.150"
    lost = rows("lost")[8082]
    assert (lost["network"], lost["state"]) == ("plain", "impossible")
    assert "has <forward mode='nat'>" in lost["reason"]
    listed = json.loads(natns("forward", "list", "--json").stdout)["forwards"]
    (own,) = (row for row in listed if row["guest"] is None)
    assert (own["network"], own["first"], own["target"]) == ("off", 7777, "10.0.0.9")
    assert (own["state"], own["reason"]) == ("off", "the network is off: its start publishes it")


def test_the_list_of_a_guest_that_is_off(world: Service) -> None:
    told = natns("forward", "list", "idle").stdout
    assert "192.168.0.100:8081" in told
    assert "(by DHCP):80" in told
    assert "# off: the guest is off: its start publishes it" in told
    refused = natns("forward", "list", "bad", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "domain 'bad', line 7: <natns:range> has start='http'" in refused.stderr


def test_a_running_guests_definition_is_for_later(world: Service) -> None:
    key = ("--uri", "urn:libvirt-natns:1", "--key", "natns")
    more = '<nat><portForward><range start="9999"/></portForward></nat>'
    before = virsh("metadata", "web", "--config", "--uri", key[1]).stdout
    virsh("metadata", "web", "--config", *key, "--set", more)
    try:
        assert rows("web")[9999]["state"] == "later"
        assert rows("web")[80]["state"] == "published"
    finally:
        virsh("metadata", "web", "--config", *key, "--set", before)
    assert 9999 not in rows("web")


def test_check_and_the_status_of_one_network(world: Service) -> None:
    assert valid("check", natns("check", "--json").stdout)["differences"] == []
    one = status("a")
    assert [each["network"] for each in one["networks"]] == ["a"]
    assert [each["name"] for each in one["libvirt_networks"]] == ["a"]
    assert {each["name"] for each in one["domains"]} == {"web", "idle", "bad"}
    assert {row["network"] for row in one["forwards"]} == {"a"}


def test_check_tells_differences(world: Service) -> None:
    # It would repair the damage.
    world.stop()
    try:
        run("sysctl", "-w", "net.ipv4.icmp_echo_ignore_broadcasts=0", namespace="nat-a")
        told = natns("check", "--json", check=False)
        assert told.returncode == 1
        (found,) = valid("check", told.stdout)["differences"]
        assert found["name"] == "a"
        assert "icmp_echo_ignore_broadcasts" in found["difference"]
        assert named(status()["networks"], "a")["differences"] == [found["difference"]]
        assert status()["service"]["state"] == "absent"
        natns("sync")
    finally:
        world.start()


def test_plan(world: Service) -> None:
    told = valid("plan", natns("plan", "--json", "a").stdout)
    assert (told["network"], told["handled"]) == ("a", True)
    assert told["steps"] == natns("plan", "a").stdout.splitlines()
    refused = valid("plan", natns("plan", "--json", "closed").stdout)
    assert (refused["handled"], refused["steps"]) == (False, [])
    assert refused["reason"] in natns("plan", "closed").stdout


def test_doctor(world: Service) -> None:
    told = valid("doctor", natns("doctor", "--json", check=False).stdout)
    lines = natns("doctor", check=False).stdout.splitlines()
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines] == [
        each["check"] for each in told["checks"]
    ]


def test_without_libvirt(world: Service) -> None:
    """Lists of libvirt's are unknown, and the rest is there."""
    told = run(
        "unshare", "--mount", "sh", "-c",
        "mount -t tmpfs none /run/libvirt; cd / && exec \"$@\"", "sh",
        "/usr/bin/python3", "-c", WITHOUT_LIBVIRT,
    )  # fmt: skip
    document = valid("status", told.stdout)
    assert document["domains"] is document["libvirt_networks"] is None
    assert [each["network"] for each in document["networks"] if each["state"] == "up"] == ["a"]
    assert {row["guest"] for row in document["forwards"]} == {"web"}


WITHOUT_LIBVIRT = f"""
import sys
sys.path.insert(0, {str(__file__).rpartition("/tests/")[0]!r})
from libvirt_natns.cli import commands
sys.exit(commands.main(["status", "--json"]))
"""


def test_the_schema_names_each_command() -> None:
    told = " ".join(str(each.get("description")) for each in SCHEMA["$defs"].values())
    for command in ("status", "forward list", "check", "doctor", "plan", "router status", "watch"):
        assert f"virt-natns {command} --json" in told
