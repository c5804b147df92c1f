# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which of a guest's NICs are its way out, by all that its networks and metadata say."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.facts.routed_nics import matters, routed_nics
from libvirt_natns.engine.guests import default_routes
from libvirt_natns.engine.guests.guest_context import GuestContext
from libvirt_natns.engine.host import libvirt_status
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.metadata import DefaultRoute
from libvirt_natns.model.network import Network
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store

GUEST = "6f3d6c1e-3f5f-4c3c-8d5e-0a3c1b1f8f11"
NAT = "urn:libvirt-natns:1"
NUMBERS = "0123456789"


def network_uuid(name: str) -> str:
    return f"00000000-0000-4000-8000-00000000000{NUMBERS['ab'.index(name) + 1]}"


def network(name: str, default_route: str = "") -> bytes:
    number = NUMBERS["ab".index(name) + 1]
    said = f"defaultRoute='{default_route}'" if default_route else ""
    return f"""<network><name>{name}</name>
        <uuid>{network_uuid(name)}</uuid>
        <metadata><natns:nat xmlns:natns='{NAT}' {said}/></metadata>
        <bridge name='virbr1{number}'/><ip address='10.0.0.1' netmask='255.255.255.0'>
        <dhcp><range start='10.0.0.100' end='10.0.0.200'/></dhcp></ip></network>""".encode()


NICS = {
    # In networks of ours
    "a": "<interface type='network'><mac address='{}'/><source network='a'/></interface>",
    "b": "<interface type='bridge'><mac address='{}'/><source bridge='virbr12'/></interface>",
    # In networks of others
    "nat": "<interface type='network'><mac address='{}'/><source network='nat'/></interface>",
    "defined": "<interface type='network'><mac address='{}'/><source network='old'/></interface>",
    "isolated": "<interface type='network'><mac address='{}'/><source network='lan'/></interface>",
    "unknown": "<interface type='network'><mac address='{}'/><source network='no'/></interface>",
    "br0": "<interface type='bridge'><mac address='{}'/><source bridge='br0'/></interface>",
    "virbr9": "<interface type='bridge'><mac address='{}'/><source bridge='virbr9'/></interface>",
    "user": "<interface type='user'><mac address='{}'/></interface>",
    "direct": "<interface type='direct'><mac address='{}'/><source dev='eth0'/></interface>",
    "ethernet": "<interface type='ethernet'><mac address='{}'/></interface>",
}


def guest(nics: str, metadata: str = "") -> bytes:
    devices = "".join(
        NICS[name].format(f"52:54:00:00:00:0{number}") for number, name in enumerate(nics.split())
    )
    inside = f"<metadata>{metadata}</metadata>" if metadata else ""
    return (
        f"<domain><name>web</name><uuid>{GUEST}</uuid>{inside}<devices>{devices}</devices></domain>"
    ).encode()


def says(default_route: str = "", interfaces: str = "") -> str:
    said = f"defaultRoute='{default_route}'" if default_route else ""
    return f"<natns:nat xmlns:natns='{NAT}' {said}>{interfaces}</natns:nat>"


FORWARD = "<natns:portForward {}><natns:range start='80'/></natns:portForward>"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """With networks of others: one that forwards, one that is not active, one isolated."""
    status, defined = tmp_path / "status", tmp_path / "defined"
    for directory, name, inside in (
        (status, "nat", "<forward mode='nat'/>"),
        (defined, "old", "<forward mode='route'/>"),
        (status, "lan", "<bridge name='virbr9'/>"),
    ):
        directory.mkdir(exist_ok=True)
        (directory / f"{name}.xml").write_text(f"<network><name>{name}</name>{inside}</network>")
    monkeypatch.setattr(libvirt_status, "LIBVIRT_STATUS", status)
    monkeypatch.setattr(libvirt_status, "LIBVIRT_NETWORKS", defined)
    store = Store(tmp_path)
    yield store
    store.close()


def put(store: Store, document: bytes, state: str = "up") -> Network:
    parsed = libvirt_xml.parse_network(document)
    record = NetworkRecord(
        parsed.uuid, parsed.name, f"nat-{parsed.name}", parsed.bridge, "host", "host", (), True,
        "up", boot_id(), now(), document,
    )  # fmt: skip
    store.networks.put(record if state == "up" else replace(record, state="down"))
    return parsed


def routed(
    store: Store, document: bytes, config: DefaultRoute = "auto", a: str = "", b: str = ""
) -> str:
    """The networks of ours in which the guest gets a default route."""
    networks = [put(store, network("a", a)), put(store, network("b", b))]
    store.guests.put(GUEST, "web", document, published=True)
    settings = Config(default_route=config)
    domain = libvirt_xml.parse_domain(document)
    found = []
    for each in networks:
        nics = routed_nics(store, settings, each)
        here = [nic for nic in domain.nics if each.name == nic.network or each.bridge == nic.bridge]
        found += [each.name for nic in here if nics.others != (nic.mac in nics.exceptions)]
    return " ".join(found)


@pytest.mark.parametrize(
    ("nics", "expected"),
    [
        ("a", "a"),
        ("nat a", ""),
        ("a nat", ""),
        ("a defined", ""),
        ("a isolated", "a"),
        ("a unknown", "a"),
        ("a br0", ""),
        ("b virbr9", "b"),
        ("user a", ""),
        ("a direct", ""),
        ("a ethernet", "a"),
        # The first of several.
        ("a b", "a"),
        ("b a", "b"),
        ("b a nat", ""),
    ],
)
def test_the_way_out_of_a_guest(nics: str, expected: str, store: Store) -> None:
    assert routed(store, guest(nics)) == expected


@pytest.mark.parametrize(
    ("nics", "metadata", "a", "b", "config", "expected"),
    [
        ("nat a", "", "yes", "", "auto", "a"),
        ("nat a", "", "", "", "yes", "a"),
        ("nat a", "", "no", "", "yes", ""),
        ("a", "", "no", "", "auto", ""),
        ("a", "", "", "", "no", ""),
        ("a", "", "auto", "", "no", "a"),
        # A NIC that is asked for is the way out, and one that is refused is none.
        ("a b", "", "", "yes", "auto", "b"),
        ("a b", "", "no", "", "auto", "b"),
        ("a b", "", "yes", "yes", "auto", "a b"),
        # The guest's own metadata decides.
        ("nat a", says("yes"), "no", "", "no", "a"),
        ("a", says("no"), "yes", "", "yes", ""),
        ("a b", says(interfaces="<natns:interface network='a' defaultRoute='no'/>"),
         "", "", "auto", "b"),
        ("a b", says(interfaces="<natns:interface mac='52:54:00:00:00:01' defaultRoute='yes'/>"),
         "", "", "auto", "b"),
        ("a b", says("no", "<natns:interface network='a' defaultRoute='auto'/>"),
         "no", "", "no", "a"),
        ("nat a", says("yes", "<natns:interface network='a' defaultRoute='auto'/>"),
         "", "", "auto", ""),
        # Answers of a published port need a way back.
        ("nat a b", says(interfaces=FORWARD.format("")), "", "", "auto", "a"),
        ("a b", says(interfaces=FORWARD.format("mac='52:54:00:00:00:01'")), "", "", "auto", "b"),
        ("a b", says(interfaces=FORWARD.format("") + "<natns:address mac='52:54:00:00:00:01'/>"),
         "", "", "auto", "a b"),
        ("nat a", says("no", FORWARD.format("network='a'")), "", "", "auto", ""),
    ],
)  # fmt: skip
def test_what_is_said(
    nics: str, metadata: str, a: str, b: str, config: DefaultRoute, expected: str, store: Store
) -> None:
    assert routed(store, guest(nics, metadata), config, a, b) == expected


def test_guests_that_do_not_run_and_networks_that_are_down_do_not_count(store: Store) -> None:
    second = put(store, network("b"))
    put(store, network("a"))
    store.guests.put(GUEST, "web", guest("a b"), published=True)
    assert len(routed_nics(store, Config(), second).exceptions) == 1
    put(store, network("a"), state="down")
    assert routed_nics(store, Config(), second).exceptions == ()
    put(store, network("a"))
    store.guests.put(GUEST, "web", guest("a b"), published=False)
    assert routed_nics(store, Config(), second).exceptions == ()


def test_networks_that_guests_share_are_looked_up_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start of a guest decides for all guests of its network."""
    a, number = put(store, network("a")), 300
    for each in range(number):
        uuid = GUEST[:-3] + format(each, "03x")
        document = guest("nat a").replace(GUEST.encode(), uuid.encode())
        macs = document.replace(
            b"52:54:00:00:", f"52:54:{each >> 8:02x}:{each & 255:02x}:".encode()
        )
        store.guests.put(uuid, f"web{each}", macs, published=True)
    assert len(routed_nics(store, Config(), a).exceptions) == number
    looks: list[str] = []
    forwards, holders = libvirt_status.forwards, store.networks.holders

    def counted_forwards(name: str) -> bool:
        looks.append(name)
        return forwards(name)

    def counted_holders(namespace: str = "", bridge: str = "") -> list[NetworkRecord]:
        looks.append(namespace or bridge)
        return holders(namespace, bridge)

    monkeypatch.setattr(libvirt_status, "forwards", counted_forwards)
    monkeypatch.setattr(store.networks, "holders", counted_holders)
    monkeypatch.setattr(libvirt_xml, "read_domain", lambda _: pytest.fail("parsed again"))
    assert len(routed_nics(store, Config(), a).exceptions) == number
    assert sorted(looks) == ["nat", "nat-a", "nat-nat"]


@pytest.mark.parametrize(
    ("document", "expected"),
    [(guest("a"), False), (guest("a b"), True), (guest("a", says("no")), True)],
)
def test_most_guests_are_not_parsed(document: bytes, expected: bool) -> None:
    assert matters(document) == expected


def test_trouble_in_another_network_stops_no_guest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, for example."""
    for name in ("a", "b"):
        put(store, network(name))
    told: list[str] = []

    def apply_to(_guests: GuestContext, networks: set[str]) -> list[str]:
        if networks == {network_uuid("a")}:
            raise OSError(28, "No space left on device")
        return ["dnsmasq of nat-b has other hosts"]

    observer = SimpleNamespace(failed=lambda when, error: told.append(f"{when}: {error}"))
    engine = cast("Engine", SimpleNamespace(store=store, observer=observer))
    monkeypatch.setattr(default_routes, "apply_to", apply_to)
    changed = default_routes.apply_routes(GuestContext(engine), [guest("a b")], set())
    assert changed == ["dnsmasq of nat-b has other hosts"]
    assert told == ["choosing a guest's way out: [Errno 28] No space left on device"]
