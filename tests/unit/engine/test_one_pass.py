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
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange
from libvirt_natns.daemons.dhcp_lease import DhcpLease
from libvirt_natns.documents import libvirt_xml, xml_tree
from libvirt_natns.engine import (
    down,
    proxied_addresses,
    shared_host,
    start,
    up,
    upstream_leases,
)
from libvirt_natns.engine.context import Change, Context
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_context import GuestContext
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.prebuilt import Built
from libvirt_natns.engine.publication.attachment import ANY
from libvirt_natns.engine.reconcile import sync
from libvirt_natns.engine.reconcile.comparison import network_differences
from libvirt_natns.errors import ConflictError, KernelError, LeaseError
from libvirt_natns.firewall import backends, nftables
from libvirt_natns.kernel import listening_ports
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import Nic
from libvirt_natns.model.segment import BridgeSegment, DhcpSegment
from libvirt_natns.model.upstream import (
    BridgeUpstream,
    DhcpUpstream,
    HostUpstream,
    RouterUpstream,
    Upstream,
)
from libvirt_natns.operations.addressing import Addresses
from libvirt_natns.operations.daemon_operations import Dnsmasq
from libvirt_natns.operations.firewall_operations import Firewall
from libvirt_natns.operations.namespaces import Namespace
from libvirt_natns.operations.neighbour_operations import Announcement
from libvirt_natns.operations.operation import Operation
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import dhcp, selection, transit
from libvirt_natns.upstream.router import client_networks

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

    distrust = forget

    owner: str | None = UUID

    def namespace_owner(self, _: str) -> str | None:
        """Return the uuid of a namespace's network."""
        return self.owner

    host = SimpleNamespace(
        links=SimpleNamespace(
            get=lambda _: SimpleNamespace(mtu=1500), mtu=lambda _: 1500, mac=lambda _: None
        ),
        bridges=SimpleNamespace(foreign_mtu=lambda *_: None),
        sysctls=SimpleNamespace(get=lambda _: "0"),
        addresses=SimpleNamespace(beyond_link=set),
        routes=SimpleNamespace(destinations=lambda **_: set()),
        neighbours6=SimpleNamespace(stations=lambda _: set()),
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


def locked_after(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Have a change happen while a verb waits for a guest's lock."""
    locked = GuestContext.locked

    @contextmanager
    def locked_late(context: GuestContext, uuid: str) -> Iterator[None]:
        with locked(context, uuid):
            change()
            yield

    monkeypatch.setattr(GuestContext, "locked", locked_late)


@pytest.mark.parametrize("leased_before", [True, False], ids=["leased", "placeholder"])
def test_a_claim_is_on_the_address_that_its_network_has_by_then(
    leased_before: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network may move while a guest's verb waits for a lock, or probes an address."""
    monkeypatch.setattr(dhcp, "held", lambda _: LEASE if leased_before else None)
    recorded(engine, "up")
    moved = DhcpLease(IPv4Interface("192.168.0.51/24"), LEASE.gateway, LEASE.server)

    def move() -> None:
        monkeypatch.setattr(dhcp, "held", lambda _: moved)
        network = libvirt_xml.parse_network(PLAIN)
        segment = engine.planner.segment(network)
        if isinstance(segment, DhcpSegment):
            dhcp.settle(engine.store, network, segment)
        elif isinstance(segment, BridgeSegment):
            assert engine.store.leases.reserve("u", segment.bridge, UUID, SECOND)

    locked_after(monkeypatch, move)
    Guests(engine).publish(libvirt_xml.parse_domain(domain(80)), domain(80))
    expected = {"bridge": SECOND, "host": ANY, "dhcp": moved.address.ip}
    kind = "dhcp" if isinstance(engine.config.upstreams["u"], DhcpUpstream) else None
    kind = kind or engine.config.upstreams["u"].kind
    assert [each.address for each in engine.store.claims.forwards(UUID)] == [expected[kind]]


def moved(engine: Engine) -> None:
    (address,) = engine.store.leases.of("u", UUID).addresses
    engine.relocate(UUID, address)


def looked_elsewhere(engine: Engine) -> None:
    engine.look_elsewhere(UUID, proxied_addresses.Asked())


def followed(engine: Engine) -> None:
    engine.follow_lease(UUID)


def reattached(engine: Engine) -> None:
    client_networks.reattach(engine.store, engine.repair_unless_changed, "u")


FOLLOWERS = [moved, looked_elsewhere, followed, reattached]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a guest's address found outside."""
    found = (IPv6Address("2001:db8::5"),)
    monkeypatch.setattr(proxied_addresses.Asked, "due", lambda *_: list(found))
    monkeypatch.setattr(proxied_addresses, "outermost", lambda _: object())
    monkeypatch.setattr(proxied_addresses, "look", lambda *_: found)
    monkeypatch.setattr(proxied_addresses, "note", lambda *_: None)


def before_up(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> list[str]:
    """Have a change happen while the verb ``up`` waits for a lock; return when it happened."""
    waited: list[str] = []
    changing = Context.changing

    @contextmanager
    def changing_late(context: Context, verb: str, *more: Any) -> Iterator[Change]:  # noqa: ANN401
        if verb == "up":
            change()
            waited.append(verb)
        with changing(context, verb, *more) as made:
            yield made

    monkeypatch.setattr(Context, "changing", changing_late)
    return waited


def goes_up(verb: Callable[[Engine], None], engine: Engine) -> bool:
    """True unless the verb leaves a network alone: a DHCP client declines an address itself."""
    return verb is not moved or not isinstance(engine.config.upstreams["u"], DhcpUpstream)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("verb", FOLLOWERS)
def test_a_network_that_has_stopped_by_then_stays_down(
    verb: Callable[[Engine], None], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "check", lambda *_: None)
    ended: list[str] = []
    monkeypatch.setattr(up, "end_rivals", lambda *_, active: ended.append("rivals"))
    recorded(engine, "up")
    waited = before_up(monkeypatch, lambda: engine.store.networks.set_state(UUID, "down"))
    verb(engine)
    assert bool(waited) is goes_up(verb, engine)
    assert engine.state(UUID) == ("down" if waited else "up")
    assert not ended


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("verb", FOLLOWERS)
def test_an_edit_that_came_in_between_stays(
    verb: Callable[[Engine], None], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(engine, "up")
    edited = replace(record_in(engine), document=PUBLISHING)
    waited = before_up(monkeypatch, lambda: engine.store.networks.put(edited))
    verb(engine)
    assert bool(waited) is goes_up(verb, engine)
    assert record_in(engine).document == (PUBLISHING if waited else PLAIN)


def test_a_network_that_cannot_move_keeps_its_address(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(engine, "up")
    Guests(engine).publish(libvirt_xml.parse_domain(domain(80)), domain(80))
    earlier, claimed = engine.store.leases.of("u", UUID), engine.store.claims.forwards(UUID)
    assert earlier.address is not None

    def fail(*_: object) -> None:
        raise KernelError("no memory")

    monkeypatch.setattr(Firewall, "differs", fail)
    by_dhcp = isinstance(engine.config.upstreams["u"], DhcpUpstream)
    # A DHCP client leaves an address by itself.
    with nullcontext() if by_dhcp else pytest.raises(KernelError):
        engine.relocate(UUID, earlier.address)
    assert engine.store.leases.of("u", UUID) == earlier
    assert engine.store.claims.forwards(UUID) == claimed


@pytest.mark.parametrize("to", UPSTREAMS)
@pytest.mark.parametrize("name", ["u", "w"], ids=["another kind", "another name"])
def test_a_network_that_moves_takes_its_own_forwards_along(
    to: str, name: str, engine: Engine
) -> None:
    network = libvirt_xml.parse_network(PUBLISHING)
    recorded(engine, "up", PUBLISHING)
    run = engine.planner.run(network, PUBLISHING, record_in(engine))
    upstream_leases.claim_own(engine, run)
    upstream = replace(UPSTREAMS[to], name=name)
    moved = replace(engine, config=Config(upstreams={name: upstream}, upstream=name))
    moved.up(network, PUBLISHING)
    record = record_in(engine)
    assert (record.upstream, record.kind) == (name, upstream.kind)
    (forward,) = engine.store.claims.forwards(UUID)
    address = engine.store.leases.of(name, UUID).address
    assert forward.address == (ANY if upstream.kind == "host" else address)
    other = PortKey(GUEST, UUID, "tcp", "", 90)
    scope = ClaimScope.of(name, upstream.kind)
    assert engine.store.claims.is_claimed(other, scope, forward.address, 9000)


@pytest.mark.parametrize("to", UPSTREAMS)
@pytest.mark.parametrize("name", ["u", "w"], ids=["another kind", "another name"])
def test_a_network_that_moves_takes_the_forwards_of_its_guests_along(
    to: str, name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    monkeypatch.setattr(
        listening_ports, "check_free", lambda listed: checked.extend(each.first for each in listed)
    )
    recorded(engine, "up")
    Guests(engine).publish(libvirt_xml.parse_domain(domain(80)), domain(80))
    engine.store.networks.put(replace(record_in(engine), since=0.0))
    upstream = replace(UPSTREAMS[to], name=name)
    moved = replace(engine, config=Config(upstreams={name: upstream}, upstream=name))
    checked.clear()
    sync.network_changed(moved, UUID, lambda: PLAIN)
    (forward,) = engine.store.claims.forwards(UUID)
    address = engine.store.leases.of(name, UUID).address
    assert forward.address == (ANY if upstream.kind == "host" else address)
    other = PortKey(UUID, UUID, "tcp", "", 90)
    scope = ClaimScope.of(name, upstream.kind)
    assert engine.store.claims.is_claimed(other, scope, forward.address, 80)
    # In the host, a program may listen on the port.
    stays = name == "u" and engine.config.upstreams["u"].kind == "host"
    assert checked == ([80] if upstream.kind == "host" and not stays else [])


@pytest.mark.parametrize("to", UPSTREAMS)
def test_only_sync_moves_a_network_to_another_default_upstream(to: str, engine: Engine) -> None:
    """An edited configuration alone cuts no connection."""
    recorded(engine, "up")
    engine.store.networks.put(replace(record_in(engine), since=0.0))
    upstreams = engine.config.upstreams | {"w": replace(UPSTREAMS[to], name="w")}
    edited = replace(engine, config=Config(upstreams=upstreams, upstream="w"))
    network = libvirt_xml.parse_network(PLAIN)
    (address,) = engine.store.leases.of("u", UUID).addresses
    looks: dict[str, Callable[[], object]] = {
        "a guest": lambda: Guests(edited).publish(libvirt_xml.parse_domain(domain(80)), domain(80)),
        "another port": lambda: Guests(edited).follow(GUEST, lambda: domain(81)),
        "the healer": lambda: edited.repair(record_in(edited)),
        "the lease": lambda: edited.follow_lease(UUID),
        "a conflict": lambda: edited.relocate(UUID, address),
        "an update": lambda: edited.refresh(network, PLAIN),
        "an event": lambda: sync.network_changed(edited, UUID, lambda: PLAIN),
    }
    assert not network_differences(edited, record_in(edited))
    for name, look in looks.items():
        look()
        assert record_in(edited).upstream == "u", name
    assert not engine.store.leases.of("w", UUID).addresses
    edited.up(network, PLAIN, configured=True)
    assert record_in(edited).upstream == "w"


@pytest.mark.parametrize("to", UPSTREAMS)
def test_edited_metadata_moves_a_network(to: str, engine: Engine) -> None:
    recorded(engine, "up")
    engine.store.networks.put(replace(record_in(engine), since=0.0))
    upstreams = engine.config.upstreams | {"w": replace(UPSTREAMS[to], name="w")}
    edited = replace(engine, config=Config(upstreams=upstreams, upstream="u"))
    named = PUBLISHING.replace(b"<natns:ip", b"<natns:upstream name='w'/><natns:ip", 1)
    for xml, upstream in ((named, "w"), (PUBLISHING, "u")):
        sync.network_changed(edited, UUID, lambda xml=xml: xml)  # type: ignore[misc]
        assert record_in(edited).upstream == upstream


def record_in(engine: Engine) -> NetworkRecord:
    record = engine.store.networks.get(UUID)
    assert record is not None
    return record


def test_a_guest_has_a_record_while_it_has_claims(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its record would ever give back the claims of a guest, should its hook be killed."""
    recorded(engine, "up")
    guests = Guests(engine)
    documents: list[bytes | None] = []

    def refresh_forwards(_: Engine, __: NetworkRecord) -> list[str]:
        record = engine.store.guests.get(GUEST)
        documents.append(record.document if record else None)
        return []

    monkeypatch.setattr(Engine, "refresh_forwards", refresh_forwards)
    for port in (80, 81):
        guests.publish(libvirt_xml.parse_domain(domain(port)), domain(port))
    assert documents == [domain(80), domain(81)]


@pytest.mark.parametrize("earlier", [None, 80])
def test_a_publication_that_fails_leaves_record_and_claims_as_they_were(
    earlier: int | None, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(engine, "up")
    guests = Guests(engine)
    if earlier is not None:
        guests.publish(libvirt_xml.parse_domain(domain(earlier)), domain(earlier))
    record, held = engine.store.guests.get(GUEST), guests.held(GUEST)

    def fail(*_: object) -> None:
        raise KernelError("no memory")

    monkeypatch.setattr(Engine, "refresh_forwards", fail)
    with pytest.raises(KernelError):
        guests.publish(libvirt_xml.parse_domain(domain(81)), domain(81))
    assert engine.store.guests.get(GUEST) == record
    assert guests.held(GUEST) == held


OTHER, OTHER_MAC = "6f3d6c1e-3f5f-4c3c-8d5e-0a3c1b1f8f12", "52:54:00:00:00:06"
BEHIND = PLAIN.replace(UUID.encode(), OTHER.encode()).replace(b">a<", b">b<")
BEHIND = BEHIND.replace(b"virbr10", b"virbr11").replace(
    b"<natns:ip", b"<natns:upstream name='r'/><natns:ip", 1
)
SECOND_NIC = f"""<interface type="network"><mac address="{OTHER_MAC}"/><source network="b"/>
</interface></devices>""".encode()


@pytest.fixture
def beside_router(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Have network b run beside a, and its router gone."""
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path)
    router = RouterUpstream(name="r", nic="ens3")
    upstreams = engine.config.upstreams | {"r": router}
    recorded(engine, "up")
    engine.store.networks.put(
        replace(
            record_in(engine), uuid=OTHER, name="b", namespace="nat-b", bridge="virbr11",
            upstream="r", kind="router", document=BEHIND,
        )
    )  # fmt: skip
    return replace(engine, config=Config(upstreams=upstreams, upstream="u"))


def test_a_nic_that_is_taken_out_publishes_nothing_whatever_the_others_do(
    beside_router: Engine,
) -> None:
    guests, store = Guests(beside_router), beside_router.store
    guests.publish(libvirt_xml.parse_domain(domain(80)), domain(80))
    both = domain(80).replace(b"</devices>", SECOND_NIC)
    store.guests.put(GUEST, "web", both, published=True)
    guests.unplug(GUEST, Nic(MAC, "a"))
    assert not store.claims.forwards(UUID)
    record = store.guests.get(GUEST)
    assert record is not None
    assert MAC.encode() not in record.document
    assert OTHER_MAC.encode() in record.document


def test_a_look_at_guests_goes_past_a_network_in_trouble(beside_router: Engine) -> None:
    on_router = domain(80).replace(b'network="a"', b'network="b"')
    plain = re.sub(rb"<metadata>.*</metadata>", b"", on_router, flags=re.DOTALL)
    assert Guests(beside_router).differences(plain) == []
    (said,) = Guests(beside_router).differences(on_router)
    assert said.startswith("upstream r: its router is not up")


@pytest.mark.parametrize("owner", ["", OTHER, None])
def test_claims_change_no_namespace_of_another(
    owner: str | None, engine: Engine, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is repaired whole, which refuses or makes the namespace."""
    recorded(engine, "up")
    monkeypatch.setattr(Machine, "owner", owner)

    def ensure(operation: Namespace, _: object) -> None:
        raise ConflictError(f"namespace {operation.name} belongs to another program")

    monkeypatch.setattr(Namespace, "differs", lambda *_: ["differs"])
    monkeypatch.setattr(Namespace, "ensure", ensure)
    changed: list[object] = []

    def differs(*_: object) -> list[str]:
        changed.append("rules")
        return []

    monkeypatch.setattr(Firewall, "differs", differs)
    with pytest.raises(ConflictError):
        Guests(engine).publish(libvirt_xml.parse_domain(domain(80)), domain(80))
    assert not changed
