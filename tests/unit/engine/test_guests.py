# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is chosen for guests: addresses, ports; and which NICs are in networks of ours."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from libvirt_natns.addresses import Address, AddressRange
from libvirt_natns.daemons import guest_leases, lease_file
from libvirt_natns.documents import domain_edit, libvirt_xml
from libvirt_natns.engine.guests.nics import in_ours, may_name
from libvirt_natns.engine.publication.allocation import Allocation
from libvirt_natns.engine.publication.attachment import ANY, Attachment
from libvirt_natns.engine.publication.choices import AutoPortRequest
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel import address_probe, listening_ports
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.metadata import AddressRequest
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.model.publication import Forward, PortProtocol
from libvirt_natns.model.segment import BridgeSegment
from libvirt_natns.model.subnet import DhcpHost, Subnet
from libvirt_natns.model.transit_segment import HostSegment
from libvirt_natns.model.upstream import HOST_UPSTREAM, BridgeUpstream, Outside
from libvirt_natns.operations.operation import Operation
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store

MAC, OTHER = "52:54:00:00:00:05", "52:54:00:00:00:06"


def ip(number: int) -> IPv4Address:
    return IPv4Address(f"10.0.0.{number}")


@pytest.fixture
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocation]:
    """With the leases that ``lease`` writes, and nothing listening on the host."""
    monkeypatch.setattr(lease_file, "LIBVIRT_DIRECTORY", tmp_path)
    monkeypatch.setattr(
        listening_ports, "listeners", lambda proto: {(ANY, 20000)} if proto == "tcp" else set()
    )
    store = Store(tmp_path)
    yield Allocation(Config(auto_ports=(20000, 20002)), store, cast("Kernel", None))
    store.close()


def lease(directory: Path, number: int, mac: str, seconds: float = 600) -> None:
    entry = {
        "ip-address": str(ip(number)),
        "mac-address": mac,
        "expiry-time": int(time.time() + seconds),
    }
    (directory / "virbr10.status").write_text(json.dumps([entry]))


ON_HOST = HostSegment.of(HOST_UPSTREAM, "natns-host", IPv4Network("198.19.252.0/22"), None, None)


def attachment(*hosts: DhcpHost, mac: str = MAC, first: int = 100, last: int = 102) -> Attachment:
    ranges = (AddressRange(ip(first), ip(last)),) if last else ()
    subnet = Subnet(IPv4Interface("10.0.0.1/24"), ranges, hosts)
    network = Network("n", "a", "virbr10", subnets=(subnet,))
    return Attachment(Nic(mac, "a"), network, ON_HOST, Outside(IPv4Address("192.168.0.100")))


def target(choices: Allocation, owner: str, at: Attachment) -> Address:
    return choices.target(Domain(owner, owner), at, 4)


def test_host_of_the_xml_comes_first(choices: Allocation) -> None:
    assert target(choices, "web", attachment()) == ip(100)
    assert target(choices, "web", attachment(DhcpHost(ip(7), MAC))) == ip(7)
    # Nor is the address kept, which somebody else may have now.
    assert choices.store.reservations.all("n") == {}


@pytest.mark.parametrize(
    "changed",
    [
        attachment(DhcpHost(ip(100), OTHER)),
        attachment(DhcpHost(ip(100), name="printer")),
    ],
)
def test_reservation_that_became_somebody_elses(choices: Allocation, changed: Attachment) -> None:
    assert target(choices, "web", attachment()) == ip(100)
    assert target(choices, "web", changed) == ip(101)
    assert target(choices, "web", attachment()) == ip(101)


def test_reservation_in_a_subnet_that_is_gone(choices: Allocation) -> None:
    choices.store.reservations.reserve("n", MAC, "web", [IPv4Address("172.16.0.5")], lambda _: True)
    assert target(choices, "web", attachment()) == ip(100)


def test_leases_of_others_are_left_alone(choices: Allocation, tmp_path: Path) -> None:
    lease(tmp_path, 100, OTHER)
    assert target(choices, "web", attachment()) == ip(101)
    # Also where somebody got it before dnsmasq knew of the reservation.
    lease(tmp_path, 101, OTHER)
    assert target(choices, "web", attachment()) == ip(100)
    lease(tmp_path, 100, OTHER, seconds=-1)
    assert target(choices, "web", attachment()) == ip(100)


def test_its_own_lease_is_kept(choices: Allocation, tmp_path: Path) -> None:
    lease(tmp_path, 102, MAC)
    assert target(choices, "web", attachment()) == ip(102)


def test_no_address_left(choices: Allocation) -> None:
    assert target(choices, "web", attachment(last=100)) == ip(100)
    choices.store.guests.put("web", "web", b"<domain/>", published=False)
    with pytest.raises(ConflictError, match="network a: no DHCP address is left"):
        target(choices, "mail", attachment(mac=OTHER, last=100))
    with pytest.raises(ConflictError, match="network a has no DHCP range"):
        target(choices, "web", attachment(mac=OTHER, last=0))


def test_a_strangers_lease_yields_where_no_address_is_left(
    choices: Allocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest may lease all addresses under made-up MACs; that of a NIC there is stays."""
    lease(tmp_path, 100, OTHER)
    links = tmp_path / "links"
    (links / "virbr10" / "brif" / "vnet0").mkdir(parents=True)
    (links / "vnet0").mkdir()
    (links / "vnet0" / "address").write_text(f"fe:{OTHER[3:]}\n")
    monkeypatch.setattr(guest_leases, "LINKS", links)
    with pytest.raises(ConflictError, match="no DHCP address is left"):
        target(choices, "web", attachment(last=100))
    (links / "vnet0" / "address").write_text("fe:54:00:00:99:99\n")
    assert target(choices, "web", attachment(last=100)) == ip(100)
    # A MAC that its bridge knows alone on a port is a container's.
    choices.store.reservations.drop("n", MAC)
    mac = bytes.fromhex(OTHER.replace(":", ""))

    def entry(mac: bytes, port: int, local: int = 0) -> bytes:
        return mac + bytes([port, local]) + bytes(8)

    table = links / "virbr10" / "brforward"
    table.write_bytes(entry(mac, 1) + entry(mac[:5] + b"\xff", 1, local=1))
    with pytest.raises(ConflictError, match="no DHCP address is left"):
        target(choices, "web", attachment(last=100))
    table.write_bytes(entry(mac, 1) + entry(mac[:5] + b"\xfe", 1))
    assert target(choices, "web", attachment(last=100)) == ip(100)


def test_addresses_of_guests_that_are_gone_are_taken_over(
    choices: Allocation, tmp_path: Path
) -> None:
    """The longest unused first; none that is leased, and none outside the ranges."""
    macs = [f"52:54:00:00:01:{number:02x}" for number in range(5)]
    choices.store.reservations.reserve("n", macs[4], "far", [ip(200)], lambda _: True)
    for number, mac in enumerate(macs[:3]):
        assert target(choices, f"job{number}", attachment(mac=mac)) == ip(100 + number)
        choices.store.guests.put(f"job{number}", "job", b"<domain/>", published=True)
    for number in (1, 2, 0):
        choices.store.claims.set_published(f"job{number}", False)
        choices.store.guests.forget(f"job{number}")
    lease(tmp_path, 101, macs[1])
    assert target(choices, "late", attachment(mac=macs[3])) == ip(102)
    assert choices.store.reservations.get("n", macs[2]) is None
    # Who is back gets another, and the same ever after.
    assert target(choices, "job2", attachment(mac=macs[2])) == ip(100)
    assert target(choices, "job2", attachment(mac=macs[2])) == ip(100)


def test_a_trial_asks_no_neighbours(choices: Allocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take their time to answer, and a trial keeps the database locked."""
    asked: list[Address] = []

    def probe(bridge: str, addresses: Sequence[Address], seconds: float) -> set[Address]:
        asked.extend(addresses)
        return set()

    monkeypatch.setattr(address_probe, "probe", probe)
    own = IPv4Address("192.168.0.150")
    upstream = BridgeSegment.of(
        BridgeUpstream(name="provider", bridge="br0", subnet=IPv4Network("192.168.0.0/24"))
    )
    at = replace(attachment(), segment=upstream)
    addresses = SimpleNamespace(beyond_link=set)
    kernel = SimpleNamespace(host=SimpleNamespace(addresses=addresses))
    for asks in (False, True):
        choosing = replace(choices, kernel=cast("Kernel", kernel), asks=asks)
        with choices.store.transaction():
            assert choosing.address(AddressRequest(own), Domain("web", "web"), at, 4) == own
        assert bool(asked) == asks


def wish(
    owner: str,
    target: int = 22,
    proto: PortProtocol = "tcp",
    which: str = "",
    avoided: tuple[tuple[int, int], ...] = (),
) -> AutoPortRequest:
    key = PortKey(owner, "n", proto, which, target)
    return AutoPortRequest(key, f"guest {owner}", attachment(), (ANY,), avoided)


def test_automatic_ports(choices: Allocation) -> None:
    """20000 is a program's; each target has its own, and keeps it."""
    choices.store.guests.put("web", "web", b"<domain/>", published=True)
    assert choices.port(wish("web")) == 20001
    assert choices.port(wish("web", 80)) == 20002
    assert choices.port(wish("web")) == 20001
    assert choices.port(wish("web", proto="udp")) == 20000
    with pytest.raises(ConflictError, match="no tcp port from 20000 to 20002 is free"):
        choices.port(wish("mail"))


def test_automatic_ports_of_several_targets(choices: Allocation) -> None:
    assert choices.port(wish("web")) == 20001
    assert choices.port(wish("web", which="guestAddress=10.0.0.7")) == 20002
    assert choices.port(wish("web")) == 20001


def test_automatic_ports_of_who_is_gone_are_taken_over(choices: Allocation) -> None:
    """The longest unused first; those of recorded guests and networks never."""
    store = choices.store
    store.networks.put(record("a", state="down"))
    assert choices.port(wish("uuid-a")) == 20001
    assert choices.port(wish("gone", proto="udp")) == 20000
    assert choices.port(wish("here", proto="udp")) == 20001
    choices.store.guests.put("here", "here", b"<domain/>", published=True)
    assert choices.port(wish("left", proto="udp")) == 20002
    assert choices.port(wish("gone", proto="udp")) == 20000
    assert [choices.port(wish(name, proto="udp")) for name in ("x", "y")] == [20002, 20000]
    assert choices.port(wish("left")) == 20002
    assert choices.port(wish("x")) == 20002


class Told:
    """Keeps what the verbs tell."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, what: Operation | str) -> None:
        pass

    def changing(self, uuid: str) -> AbstractContextManager[None]:
        return nullcontext()

    def done(self, verb: str, name: str, changed: Sequence[str], seconds: float) -> None:
        """Look away."""

    def note(self, event: str, name: str, changed: Sequence[str]) -> None:
        self.lines += [f"{event} {name}: {what}" for what in changed]

    def failed(self, when: str, error: Exception) -> None:
        """Look away."""


def test_automatic_port_that_somebody_took(choices: Allocation) -> None:
    """Another one is chosen, and told of; not where the other one listens elsewhere."""
    told = Told()
    choices = replace(choices, observer=told)
    assert choices.port(wish("web")) == 20001
    taken = Forward("mail", "guest mail", "n", "tcp", ANY, 20001, 20001, ip(6), 25, 25)
    choices.store.claims.put(
        Claims("mail", (taken,)), {"n": ClaimScope("wan", False)}, published=True
    )
    assert choices.port(wish("web")) == 20001
    choices.store.claims.put(Claims("mail", (taken,)), {"n": ClaimScope("", True)}, published=True)
    assert [choices.port(wish("web")), choices.port(wish("web"))] == [20002, 20002]
    assert told.lines == ["choose a port a: guest web: tcp port 20001 is taken, 20002 instead"]


def test_automatic_port_that_a_program_took(
    choices: Allocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the forward was there first: then it stays."""
    assert choices.port(wish("web")) == 20001
    held = Forward("web", "guest web", "n", "tcp", ANY, 20001, 20001, ip(6), 22, 22)
    choices.store.claims.put(Claims("web", (held,)), {"n": ClaimScope("", True)}, published=True)
    monkeypatch.setattr(listening_ports, "listeners", lambda proto: {(ANY, 20000), (ANY, 20001)})
    assert choices.port(wish("web")) == 20001
    choices.store.claims.drop("web")
    assert choices.port(wish("web")) == 20002


def test_automatic_port_beside_fixed_ones_of_the_same_guest(choices: Allocation) -> None:
    assert choices.port(wish("web", avoided=((80, 80), (20001, 20001)))) == 20002
    # Also where the fixed one was written later.
    assert choices.port(wish("web", avoided=((20002, 20003),))) == 20001


def record(name: str, **changes: Any) -> NetworkRecord:  # noqa: ANN401
    plain = NetworkRecord(
        f"uuid-{name}", name, f"nat-{name}", f"virbr-{name}", "host", "host", (), True,
        "up", boot_id(), now(), b"<network/>",
    )  # fmt: skip
    return replace(plain, **changes)


def test_nics_in_networks_of_ours(choices: Allocation) -> None:
    store = choices.store
    for each in (
        record("a"),
        record("b", state="starting"),
        record("down", state="down"),
        record("old", boot="an earlier one"),
    ):
        store.networks.put(each)
    networks = ("old", "b", "down", "default")
    nics = (*(Nic(MAC, name) for name in networks), Nic(MAC, bridge="virbr-a"),
            Nic(MAC, bridge="br0"), Nic(MAC, "foreign", "virbr-a"))  # fmt: skip
    found = in_ours(store, Domain("u", "web", nics))
    assert [(nic, each.name) for nic, each in found] == [(nics[1], "b"), (nics[4], "a")]


def test_nics_that_come_and_go() -> None:
    """The recorded XML follows, so that nothing counts on a NIC that is gone."""
    xml = (
        f"<domain><name>web</name><devices><interface type='network'><mac address='{MAC}'/>"
        "<source network='a'/></interface></devices></domain>"
    ).encode()
    more = domain_edit.with_nic(xml, Nic(MAC, "b"))
    assert libvirt_xml.parse_domain_nics(more).nics == (Nic(MAC, "a"), Nic(MAC, "b"))
    less = domain_edit.without_nic(more, Nic(MAC, "a"))
    assert libvirt_xml.parse_domain_nics(less).nics == (Nic(MAC, "b"),)
    bare = domain_edit.with_nic(b"<domain><name>web</name></domain>", Nic(MAC, "a"))
    assert libvirt_xml.parse_domain_nics(bare).nics == (Nic(MAC, "a"),)


@pytest.mark.parametrize(
    ("name", "xml", "named"),
    [
        ("lab", b"<source network='lab'/>", True),
        ("lab", b"<source bridge='virbr7'/>", True),
        ("lab", b"<source network='other' bridge='virbr8'/>", False),
        ("r&d", b"<source network='r&amp;d'/>", True),
    ],
)
def test_a_document_that_names_no_network_is_not_parsed(name: str, xml: bytes, named: bool) -> None:
    network = cast("Network", SimpleNamespace(name=name, bridge="virbr7"))
    assert may_name(xml, network) == named
