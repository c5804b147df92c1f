# SPDX-License-Identifier: LGPL-2.1-or-later
"""A verb reads each fact once: the network's row, its upstream, its leases, a guest's XML.

The state database is real.  The kernel is a machine that has everything already, so the
verbs compare every operation of a plan and change nothing.
"""

import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange
from libvirt_natns.daemons.dhcp_lease import DhcpLease
from libvirt_natns.documents import libvirt_xml, xml_tree
from libvirt_natns.engine import down, shared_host, start, up
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_context import GuestContext
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.prebuilt import Built
from libvirt_natns.errors import KernelError, LeaseError
from libvirt_natns.firewall import backends, nftables
from libvirt_natns.kernel import listening_ports
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.segment import DhcpSegment
from libvirt_natns.model.upstream import BridgeUpstream, DhcpUpstream, HostUpstream, Upstream
from libvirt_natns.operations.addressing import Addresses
from libvirt_natns.operations.daemon_operations import Dnsmasq
from libvirt_natns.operations.firewall_operations import Firewall
from libvirt_natns.operations.namespaces import Namespace
from libvirt_natns.operations.neighbour_operations import Announcement
from libvirt_natns.operations.operation import Operation
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import dhcp, selection, transit

UUID = "6f3d6c1e-3f5f-4c3c-8d5e-0a3c1b1f8f10"
GUEST = "6f3d6c1e-3f5f-4c3c-8d5e-0a3c1b1f8f11"
MAC = "52:54:00:00:00:05"
NATNS = 'xmlns:natns="urn:libvirt-natns:1"'
XML = f"""<network><name>a</name><uuid>{UUID}</uuid><metadata><natns:nat {NATNS}>
<natns:ip address="10.0.0.1" prefix="24"><natns:dhcp><natns:range start="10.0.0.100"
 end="10.0.0.200"/></natns:dhcp></natns:ip>%s</natns:nat></metadata>
<bridge name="virbr10"/></network>"""
PLAIN = XML.replace("%s", "").encode()
OWN_FORWARD = """<natns:portForward proto="tcp" guestAddress="10.0.0.7">
<natns:range start="9000" to="90"/></natns:portForward>"""
PUBLISHING = XML.replace("%s", OWN_FORWARD).encode()

SERVERS = (IPv4Address("9.9.9.9"),)
FIRST, SECOND = (IPv4Address(f"192.168.0.{number}") for number in (100, 101))
SUBNET = IPv4Network("192.168.0.0/24")
UPSTREAMS: dict[str, Upstream] = {
    "bridge": BridgeUpstream(
        name="u", bridge="br0", subnet=SUBNET, pool=(AddressRange(FIRST, SECOND),), dns=SERVERS
    ),
    "host": HostUpstream(name="u", dns=SERVERS),
    "dhcp": DhcpUpstream(name="u", bridge="br0", dns=SERVERS),
}
LEASE = DhcpLease(
    IPv4Interface("192.168.0.50/24"), IPv4Address("192.168.0.1"), IPv4Address("192.168.0.1")
)


class Machine:
    """A kernel session over a machine that has all links, and no addresses of its own."""

    def work(self) -> AbstractContextManager[None]:
        return nullcontext()

    looking = work

    def forget(self) -> None:
        """Forget nothing."""

    def namespace_owner(self, _: str) -> None:
        """Return the owner of a namespace: there is none yet."""

    host = SimpleNamespace(
        links=SimpleNamespace(
            get=lambda _: SimpleNamespace(mtu=1500), mtu=lambda _: 1500, mac=lambda _: None
        ),
        bridges=SimpleNamespace(foreign_mtu=lambda *_: None),
        sysctls=SimpleNamespace(get=lambda _: "0"),
        addresses=SimpleNamespace(beyond_link=set),
        routes=SimpleNamespace(destinations=lambda **_: set()),
    )

    def at(self, _: str | None) -> SimpleNamespace:
        """Return the view of a namespace, which is like the host's."""
        return self.host


@dataclass
class Counts:
    """How often a verb asked for each fact, and the kinds of operations that it compared."""

    facts: Counter[str] = field(default_factory=Counter)
    compared: set[type] = field(default_factory=set)

    def of(self, verb: Callable[[], object]) -> Counter[str]:
        """Return the counts of one verb."""
        libvirt_xml._parsed_network.cache_clear()
        self.facts.clear()
        self.compared.clear()
        verb()
        return Counter(self.facts)

    def counted(self, fact: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is counted."""

        def call(*arguments: Any, **more: Any) -> Any:  # noqa: ANN401
            self.facts[fact] += 1
            return function(*arguments, **more)

        return call

    def statement(self, sql: str) -> None:
        """Count a statement of SQLite."""
        if re.search(r"FROM network WHERE uuid =", sql) and sql.startswith("SELECT"):
            self.facts["row"] += 1
        if sql.startswith("SELECT kind, address FROM lease WHERE upstream"):
            self.facts["leases"] += 1


def kinds_of(base: type) -> set[type]:
    """Return all classes below a class."""
    below: set[type] = set(base.__subclasses__())
    return below.union(*map(kinds_of, below))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    counts = Counts()
    for module, name, fact in (
        (selection, "upstream_of", "upstream"),
        (transit, "choose", "completed"),
        (dhcp, "complete", "completed"),
    ):
        monkeypatch.setattr(module, name, counts.counted(fact, getattr(module, name)))
    parse = xml_tree.parse

    def counted_parse(data: bytes, *more: Any, **options: Any) -> Any:  # noqa: ANN401
        counts.facts["guest XML" if b"<domain" in data else "network XML"] += 1
        counts.facts[data.decode()] += 1
        return parse(data, *more, **options)

    monkeypatch.setattr(libvirt_xml, "parse", counted_parse)

    def differs(operation: Operation, _: object) -> list[str]:
        counts.compared.add(type(operation))
        return []

    for kind in kinds_of(Operation):
        monkeypatch.setattr(kind, "differs", differs)
        monkeypatch.setattr(kind, "ensure", lambda *_: None)
    monkeypatch.setattr(shared_host, "adjust", counts.counted("host", lambda *_: None))
    return counts


@pytest.fixture(params=UPSTREAMS)
def engine(
    request: pytest.FixtureRequest, counts: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(names, "NETNS_DIRECTORY", tmp_path / "netns")
    monkeypatch.setattr(start, "check", lambda *_: None)
    monkeypatch.setattr(start, "remove", lambda *_: None)
    monkeypatch.setattr("libvirt_natns.daemons.libvirt_dnsmasq.stop", lambda *_, **__: None)
    monkeypatch.setattr("libvirt_natns.daemons.dnsmasq.check_started", lambda *_: None)
    monkeypatch.setattr("libvirt_natns.kernel.address_probe.probe", lambda *_: set())
    monkeypatch.setattr(backends, "choose", lambda *_, **__: nftables)
    monkeypatch.setattr(listening_ports, "listeners", lambda _: set())
    monkeypatch.setattr(listening_ports, "check_free", lambda _: None)
    monkeypatch.setattr("libvirt_natns.kernel.conntrack.cut", lambda *_: None)
    monkeypatch.setattr("libvirt_natns.kernel.conntrack.cut_on_host", lambda *_, **__: None)
    monkeypatch.setattr(dhcp, "await_lease", lambda *_: None)
    monkeypatch.setattr(dhcp, "held", lambda _: LEASE)
    connect = sqlite3.connect

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:  # noqa: ANN401
        connection: sqlite3.Connection = connect(*arguments, **options)
        connection.set_trace_callback(counts.statement)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    store = Store(tmp_path)
    config = Config(upstreams={"u": UPSTREAMS[request.param]}, upstream="u")
    yield Engine(config, store, cast("Kernel", Machine()), built=Built())
    store.close()


def recorded(engine: Engine, state: NetworkState, xml: bytes = PLAIN) -> None:
    """Record a network with its leases."""
    segment = engine.planner.segment(libvirt_xml.parse_network(xml))
    engine.store.networks.put(
        NetworkRecord(
            UUID, "a", "nat-a", "virbr10", "u", segment.kind, (), False, state, boot_id(), now(),
            xml,
        )
    )  # fmt: skip
    if isinstance(segment, DhcpSegment):
        dhcp.settle(engine.store, libvirt_xml.parse_network(xml), segment)
    else:
        address = segment.side(4).ranges[0].first
        assert engine.store.leases.reserve("u", segment.bridge, UUID, address)


@pytest.mark.parametrize("xml", [PLAIN, PUBLISHING], ids=["plain", "publishing"])
def test_prepare_reads_each_fact_once(xml: bytes, engine: Engine, counts: Counts) -> None:
    network = libvirt_xml.parse_network(xml)
    found = counts.of(lambda: engine.prepare(network, xml))
    assert (found["row"], found["upstream"], found["network XML"]) == (1, 1, 0)
    # The lease that a DHCP server gives on the way completes the upstream.
    by_dhcp = isinstance(engine.config.upstreams["u"], DhcpUpstream)
    assert found["completed"] == (2 if by_dhcp else engine.config.upstreams["u"].kind == "host")


@pytest.mark.parametrize("xml", [PLAIN, PUBLISHING], ids=["plain", "publishing"])
def test_build_reads_each_fact_once(xml: bytes, engine: Engine, counts: Counts) -> None:
    recorded(engine, "starting", xml)
    network = libvirt_xml.parse_network(xml)
    found = counts.of(lambda: engine.build(network, xml))
    assert (found["row"], found["upstream"], found["host"]) == (1, 1, 1)
    # A DHCP client asks for its last lease again.
    assert found["leases"] == (2 if isinstance(engine.config.upstreams["u"], DhcpUpstream) else 1)
    assert found["completed"] <= 1


@pytest.mark.parametrize("state", ["starting", "up"])
@pytest.mark.parametrize("xml", [PLAIN, PUBLISHING], ids=["plain", "publishing"])
def test_up_reads_each_fact_once(
    xml: bytes, state: NetworkState, engine: Engine, counts: Counts
) -> None:
    recorded(engine, state, xml)
    network = libvirt_xml.parse_network(xml)
    found = counts.of(lambda: engine.up(network, xml))
    assert (found["row"], found["upstream"], found["host"]) == (1, 1, 1)
    # A DHCP client asks for its last lease again.
    assert found["leases"] == (2 if isinstance(engine.config.upstreams["u"], DhcpUpstream) else 1)
    assert found["completed"] <= 1
    record = engine.store.networks.get(UUID)
    assert record is not None
    assert record.state == "up"


@pytest.mark.parametrize("state", ["starting", "down"])
def test_up_checks_a_network_that_no_hook_has_announced(
    state: NetworkState, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[object] = []
    monkeypatch.setattr(up, "check", lambda *_: checked.append("network"))
    monkeypatch.setattr(up, "end_rivals", lambda *_, active: checked.append("rivals"))
    recorded(engine, state)
    engine.up(libvirt_xml.parse_network(PLAIN), PLAIN)
    assert checked == (["network", "rivals"] if state == "down" else [])
    assert engine.state(UUID) == "up"


def test_a_network_that_is_refused_leaves_no_directory(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise LeaseError("no address")

    monkeypatch.setattr(up, "check", refuse)
    with pytest.raises(LeaseError):
        engine.up(libvirt_xml.parse_network(PLAIN), PLAIN)
    assert not names.RUN_DIRECTORY.joinpath("networks").exists()


def test_a_directory_that_a_verb_has_discarded_is_not_discarded_twice(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the verb's end, the directory may be another start's."""
    recorded(engine, "up")
    directory = names.network_directory(UUID)
    monkeypatch.setattr(down, "remove", lambda *_: None)
    monkeypatch.setattr(shared_host, "adjust", lambda *_: directory.mkdir(parents=True))
    engine.down(UUID)
    assert directory.is_dir()


def domain(port: int) -> bytes:
    """Return a guest that publishes a port."""
    return f"""<domain type="kvm"><name>web</name><uuid>{GUEST}</uuid><metadata>
<natns:nat {NATNS}><natns:portForward proto="tcp"><natns:range start="{port}" to="80"/>
</natns:portForward></natns:nat></metadata><devices><interface type="network">
<mac address="{MAC}"/><source network="a"/></interface></devices></domain>""".encode()


def test_a_change_of_metadata_reads_each_fact_once(engine: Engine, counts: Counts) -> None:
    recorded(engine, "up")
    guests = Guests(engine)
    guests.publish(libvirt_xml.parse_domain(domain(8080)), domain(8080))
    assert [forward.first for forward in engine.store.claims.forwards(UUID)] == [8080]
    found = counts.of(lambda: guests.follow(GUEST, lambda: domain(8081)))
    assert [forward.first for forward in engine.store.claims.forwards(UUID)] == [8081]
    # The earlier document is compared.
    assert (found[domain(8081).decode()], found[domain(8080).decode()]) == (1, 1)
    assert (found["guest XML"], found["network XML"]) == (2, 1)
    # For the guest, ahead of its network's lock; and under that lock.
    assert (found["upstream"], found["host"]) == (2, 1)
    assert found["row"] == 3


def test_an_opened_port_concerns_reservations_rules_and_the_host(
    engine: Engine, counts: Counts
) -> None:
    recorded(engine, "up")
    counts.of(lambda: Guests(engine).publish(libvirt_xml.parse_domain(domain(80)), domain(80)))
    assert counts.compared - {Announcement} == {Firewall, Addresses, Dnsmasq}


def test_a_damaged_network_is_repaired_whole_where_a_port_is_opened(
    engine: Engine, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(engine, "up")
    broken = [KernelError("network namespace nat-a is missing")]

    def differs(operation: Firewall, _: object) -> list[str]:
        counts.compared.add(type(operation))
        if broken:
            raise broken.pop()
        return []

    monkeypatch.setattr(Firewall, "differs", differs)
    counts.of(lambda: Guests(engine).publish(libvirt_xml.parse_domain(domain(80)), domain(80)))
    assert Namespace in counts.compared
    assert [forward.first for forward in engine.store.claims.forwards(UUID)] == [80]


def test_a_guest_that_has_stopped_is_not_recorded_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process forgets the guest while this one waits for the guest's lock."""
    recorded(engine, "up")
    guests = Guests(engine)
    guests.publish(libvirt_xml.parse_domain(domain(80)), domain(80))
    locked = GuestContext.locked

    @contextmanager
    def locked_late(context: GuestContext, uuid: str) -> Iterator[None]:
        with locked(context, uuid):
            context.drop_record(uuid)
            yield

    monkeypatch.setattr(GuestContext, "locked", locked_late)
    guests.refresh(UUID)
    assert engine.store.guests.get(GUEST) is None
    assert not engine.store.claims.forwards(UUID)
