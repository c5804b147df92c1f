# SPDX-License-Identifier: LGPL-2.1-or-later
"""IPv6 in what is decided and kept: leases, ways out, forwards, the host's settings."""

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns.addresses import FAMILIES, Address, AddressRange, Family
from libvirt_natns.daemons import lease_file
from libvirt_natns.daemons.resolv_conf import host_resolvers
from libvirt_natns.documents import config
from libvirt_natns.engine.host import ipv6_forwarding as host_ipv6
from libvirt_natns.engine.host.needs import Needs
from libvirt_natns.engine.publication.allocation import Allocation
from libvirt_natns.engine.publication.attachment import ANY, ANY6, Attachment
from libvirt_natns.engine.publication.choices import AutoPortRequest
from libvirt_natns.engine.publication.resolve import resolve
from libvirt_natns.engine.publication.words import in_words
from libvirt_natns.errors import ConfigError, ConflictError, DocumentError, LeaseError
from libvirt_natns.firewall import host_parts
from libvirt_natns.firewall.host_accepts import accepts
from libvirt_natns.firewall.host_policy import HostPolicy, Provider, Transit
from libvirt_natns.firewall.host_rules import rules
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.metadata import AddressRequest, NatMetadata, PortForward, PortRange
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.segment import BridgeSegment, Segment
from libvirt_natns.model.subnet import DhcpHost, StaticRoute, Subnet
from libvirt_natns.model.upstream import HOST_UPSTREAM, BridgeUpstream, Outside
from libvirt_natns.state import pool
from libvirt_natns.state.applicants import Applicant, applicant
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.leases import Leased
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.state.schema import SCHEMA
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import selection, transit

MAC = "52:54:00:00:00:05"
PREFIXES = IPv6Network("2001:db8:100::/62")
CONFIGURED = BridgeUpstream(
    name="provider",
    bridge="br0",
    subnet=IPv4Network("192.168.0.0/24"),
    gateway=IPv4Address("192.168.0.1"),
    pool=(AddressRange(IPv4Address("192.168.0.100"), IPv4Address("192.168.0.101")),),
    dns=(IPv6Address("2001:db8:77::101"),),
    subnet6=IPv6Network("2001:db8:77::/64"),
    gateway6=IPv6Address("2001:db8:77::1"),
    pool6=(AddressRange(IPv6Address("2001:db8:77::"), IPv6Address("2001:db8:77::ffff:ffff")),),
    prefixes6=(PREFIXES,),
)
PROVIDER = BridgeSegment.of(CONFIGURED)
ON_HOST = transit.complete(HOST_UPSTREAM, IPv4Network("198.19.252.0/22"))
SIX = Subnet(IPv6Interface("fd00:10::1/64"))
FOUR = Subnet(IPv4Interface("10.0.0.1/24"))
NETWORK = Network("n", "a", "virbr10", subnets=(FOUR, SIX))


def six(text: str) -> IPv6Address:
    return IPv6Address(text)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def note(store: Store, name: str, state: NetworkState = "up") -> None:
    store.networks.put(
        NetworkRecord(
            uuid=name, name=name, namespace=f"nat-{name}", bridge=f"virbr-{name}",
            upstream="provider", kind="bridge", subnets=(IPv6Network("fd00:10::/64"),),
            taken_over=True, state=state, boot=boot_id(), since=now(), document=b"",
        )
    )  # fmt: skip


def nobody(addresses: Collection[Address]) -> set[Address]:
    return set()


# -- leases --------------------------------------------------------------------


def test_addresses_of_both_families_and_a_prefix_are_leased_at_once(store: Store) -> None:
    # The host itself has an address from the pool.
    own = [six("2001:db8:77::3")]
    for name in "nm":
        network = replace(NETWORK, uuid=name)
        note(store, name)
        for family in FAMILIES:
            pool.reserve(store, applicant(network, family), PROVIDER, nobody, own)
        pool.reserve_prefix(store, applicant(network), PROVIDER, None)
    first = Leased(
        IPv4Address("192.168.0.100"), six("2001:db8:77::2"), IPv6Network("2001:db8:100::/64")
    )
    assert store.leases.of("provider", "n") == first
    second = store.leases.of("provider", "m")
    assert second.address6 == six("2001:db8:77::4")
    assert second.prefix == IPv6Network("2001:db8:100:1::/64")
    assert [user.leased for user in store.host.users()] == [second, first]


def test_what_no_network_may_have(store: Store) -> None:
    """The subnet's first address, the gateway's and a resolver's, and what answers."""
    narrow = replace(PROVIDER, pool6=(AddressRange(six("2001:db8:77::"), six("2001:db8:77::2")),))
    who = applicant(NETWORK, 6)
    assert pool.reserve(store, who, narrow, nobody) == six("2001:db8:77::2")
    with pytest.raises(LeaseError, match="no address of upstream provider is free"):
        pool.reserve(store, Applicant("x", "network x", family=6), narrow, set)
    wanted = replace(NETWORK, nat=NatMetadata(address6=six("2001:db8:77::101")))
    with pytest.raises(LeaseError, match=r"is its DNS server: choose .*address6='\.\.\.'/>"):
        pool.reserve(store, applicant(wanted, 6), PROVIDER, nobody)
    with pytest.raises(LeaseError, match="is refused, as the upstream has no IPv6 subnet"):
        pool.reserve(store, applicant(wanted, 6), ON_HOST, nobody)


def test_prefixes_are_kept_and_given_away_last(store: Store) -> None:
    names = ["a", "b", "c", "d"]
    found = []
    for name in names:
        note(store, name)
        found.append(pool.reserve_prefix(store, Applicant(name, name), PROVIDER, None))
        store.networks.set_state(name, "up")
    assert found == list(PREFIXES.subnets(new_prefix=64))
    note(store, "e")
    with pytest.raises(LeaseError, match="no prefix of upstream provider is free"):
        pool.reserve_prefix(store, Applicant("e", "network e"), PROVIDER, None)
    store.networks.set_state("b", "down")
    assert pool.reserve_prefix(store, Applicant("a", "a"), PROVIDER, None) == found[0]
    assert pool.reserve_prefix(store, Applicant("e", "e"), PROVIDER, None) == found[1]
    with pytest.raises(LeaseError, match=r"the prefix 2001:db8:100::/64 .* leased to network a"):
        pool.reserve_prefix(store, Applicant("e", "e"), PROVIDER, found[0])


def test_a_prefix_that_the_host_is_in_is_left_out(store: Store) -> None:
    own = [six("2001:db8:100::2")]
    found = pool.reserve_prefix(store, Applicant("a", "a"), PROVIDER, None, own)
    assert found == IPv6Network("2001:db8:100:1::/64")


FORMER = f"""
{SCHEMA}
DROP TABLE lease; DROP TABLE transit6; DROP TABLE reservation;
CREATE TABLE lease (upstream TEXT NOT NULL, segment TEXT NOT NULL, address INTEGER NOT NULL,
    network TEXT NOT NULL, used INTEGER NOT NULL,
    PRIMARY KEY (segment, address), UNIQUE (upstream, network));
CREATE TABLE reservation (network TEXT NOT NULL, mac TEXT NOT NULL, address INTEGER NOT NULL,
    owner TEXT NOT NULL, used INTEGER NOT NULL, PRIMARY KEY (network, mac),
    UNIQUE (network, address));
INSERT INTO lease VALUES ('provider', 'br0', 77, 'n', 1);
INSERT INTO reservation VALUES ('n', 'm1', 5, 'web', 3);
PRAGMA user_version = 2;
"""


def test_a_database_of_ipv4_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        db.executescript(FORMER)
    with closing(Store(tmp_path)) as store:
        assert store.leases.of("provider", "n") == Leased(IPv4Address(77))
        assert store.reservations.get("n", "m1") == IPv4Address(5)
        assert store.reservations.get("n", "m1", 6) is None
        assert store.leases.reserve("provider", "br0", "n", six("2001:db8::1"))
        assert len(store.leases.all_of("n")) == 2


def test_a_start_waits_for_none_of_the_same_prefix(store: Store) -> None:
    """libvirt starts both at once, unless they have an IPv4 subnet in common."""
    note(store, "a", "starting")
    other = store.networks.get("a")
    assert other is not None
    mine = replace(other, uuid="b", name="b", namespace="nat-b", bridge="virbr-b")
    assert store.networks.enter_start(mine) is None
    both = (IPv4Network("10.0.0.0/24"), IPv6Network("fd00:10::/64"))
    for name in "cd":
        late = replace(mine, uuid=name, name=name, namespace=name, bridge=name, subnets=both)
        blocker = store.networks.enter_start(late)
        assert (blocker.name if blocker else None) == {"c": None, "d": "c"}[name]


# -- ways out ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subnet", "routed", "proxied", "prefix"),
    [
        ("fd00:10::1/64", False, False, True),
        ("2001:db8:100:3::1/64", True, False, True),
        ("2001:db8:77::a/64", False, True, False),
        ("2001:db8:77:0:1::1/80", False, True, False),
    ],
)
def test_how_a_subnet_leaves(subnet: str, routed: bool, proxied: bool, prefix: bool) -> None:
    network = replace(NETWORK, subnets=(FOUR, Subnet(IPv6Interface(subnet))))
    selection.check_addresses(network, PROVIDER)
    assert bool(selection.routed(network, PROVIDER)) == routed
    assert bool(selection.proxied(network, PROVIDER)) == proxied
    assert selection.leases_prefix(network, PROVIDER) == prefix
    assert selection.families(network, PROVIDER) == (4, 6)


def test_networks_and_upstreams_of_one_family() -> None:
    alone = replace(NETWORK, subnets=(FOUR,))
    assert selection.families(alone, PROVIDER) == (4,)
    assert not selection.leases_prefix(alone, PROVIDER)
    only4 = replace(PROVIDER, subnet6=None, gateway6=None, pool6=(), prefixes6=())
    assert selection.families(NETWORK, only4) == (4,)
    only6 = replace(PROVIDER, subnet=None, gateway=None, pool=())
    assert selection.families(NETWORK, only6) == (6,)
    assert selection.families(replace(NETWORK, subnets=(SIX,)), only4) == ()


@pytest.mark.parametrize(
    ("subnets", "problem"),
    [
        (("2001:db8:77::1/48",), "overlaps 2001:db8:77::/64"),
        (("2001:db8:100::1/60",), "overlaps 2001:db8:100::/62"),
        (("2001:db8:100::1/63",), "is more than a /64"),
        (
            ("2001:db8:100::1/64", "2001:db8:100:1::1/64"),
            "keep a single subnet of prefixes6 in the network",
        ),
    ],
)
def test_subnets_that_can_never_work(subnets: tuple[str, ...], problem: str) -> None:
    found = tuple(Subnet(IPv6Interface(subnet)) for subnet in subnets)
    with pytest.raises(DocumentError, match=problem):
        selection.check_addresses(replace(NETWORK, subnets=found), PROVIDER)


def test_resolvers_in_the_providers_own_subnet() -> None:
    servers = [six("2001:db8:77::53")]
    whole = replace(NETWORK, subnets=(Subnet(IPv6Interface("2001:db8:77::a/64")),))
    selection.check_resolvers(whole, PROVIDER, servers)
    hidden = replace(NETWORK, subnets=(Subnet(IPv6Interface("fd00:10::1/64")),))
    with pytest.raises(DocumentError, match="the DNS server fd00:10::53 of upstream provider"):
        selection.check_resolvers(hidden, PROVIDER, [six("fd00:10::53")])


def test_a_further_route_into_the_upstream() -> None:
    route = StaticRoute(IPv6Network("2001:db8:77::/80"), six("fd00:10::9"))
    with pytest.raises(DocumentError, match="2001:db8:77::/80 overlaps 2001:db8:77::/64"):
        selection.check_addresses(replace(NETWORK, routes=(route,)), PROVIDER)


def test_transit() -> None:
    found = transit.free6(NETWORK)
    assert found.prefixlen == 64 and found.subnet_of(IPv6Network("fd00::/8"))
    assert found != transit.free6(NETWORK)
    configured = replace(HOST_UPSTREAM, subnet6=PROVIDER.subnet6, prefixes6=PROVIDER.prefixes6)
    whole = transit.complete(configured, IPv4Network("198.19.252.0/22"), found)
    assert (whole.subnet6, whole.gateway6, whole.own6) == (found, found[1], PROVIDER.subnet6)
    assert whole.prefixes6 == PROVIDER.prefixes6
    without = transit.complete(configured, IPv4Network("198.19.252.0/22"))
    assert (without.subnet6, without.own6, without.prefixes6) == (None, None, ())


# -- forwards ------------------------------------------------------------------

OUTSIDE = Outside(
    IPv4Address("192.168.0.100"), six("2001:db8:77::100"), (IPv6Network("2001:db8:100::/64"),)
)
SSH = PortRange(2222, 2222, 22)


def attachment(upstream: Segment = PROVIDER, outside: Outside = OUTSIDE) -> Attachment:
    leased = Subnet(IPv6Interface("2001:db8:100::1/64"))
    return Attachment(
        Nic(MAC, "a"), replace(NETWORK, subnets=(FOUR, SIX, leased)), upstream, outside
    )


class Choices:
    """What is always decided the same."""

    def __init__(self, *known: Family) -> None:
        self.known = known

    def knows(self, domain: Domain, attachment: Attachment, family: Family) -> bool:
        return family in self.known

    def target(self, domain: Domain, attachment: Attachment, family: Family) -> Address:
        return IPv4Address("10.0.0.5") if family == 4 else six("fd00:10::5")

    def port(self, wish: AutoPortRequest) -> int:
        return 20000 + len(wish.listens)

    def address(
        self, request: AddressRequest, domain: Domain, attachment: Attachment, family: Family
    ) -> Address:
        return request.address or six("2001:db8:77::180")


def published(
    *wanted: PortForward, at: Attachment | None = None, known: tuple[Family, ...] = (4, 6)
) -> list[str]:
    domain = Domain("u", "web", nat=NatMetadata(forwards=wanted))
    claims = resolve(domain, [at or attachment()], Choices(*known))
    return [in_words(each) for each in claims.forwards]


def test_a_forward_of_no_family_is_of_both() -> None:
    four = "tcp 192.168.0.100:2222 -> 10.0.0.5:22"
    other = "tcp [2001:db8:77::100]:2222 -> [fd00:10::5]:22"
    assert published(PortForward("tcp", (SSH,))) == [four, other]
    assert published(PortForward("tcp", (SSH,)), known=(4,)) == [four]
    assert published(PortForward("tcp", (SSH,)), known=(6,)) == [other]
    only6 = attachment(outside=replace(OUTSIDE, address=None))
    assert published(PortForward("tcp", (SSH,)), at=only6) == [other]
    wanted = PortForward("tcp", (SSH,), address=six("2001:db8:77::100"))
    assert published(wanted) == [other]
    auto = PortForward("tcp", (PortRange(0, 0, 22, auto=True),))
    assert [each.split()[1] for each in published(auto)] == [
        "192.168.0.100:20002", "[2001:db8:77::100]:20002",
    ]  # fmt: skip


def test_a_public_address_is_let_in_to() -> None:
    guest = six("2001:db8:100::5")
    same = PortForward("tcp", (PortRange(22, 22, 22), SSH), guest_address=guest)
    assert published(same) == [
        "tcp [2001:db8:100::5]:22 -> [2001:db8:100::5]:22",
        "tcp [2001:db8:77::100]:2222 -> [2001:db8:100::5]:22",
    ]
    alone = attachment(outside=replace(OUTSIDE, address6=None))
    with pytest.raises(DocumentError, match="no address of its own to listen on"):
        published(same, at=alone)
    named = PortForward("tcp", (PortRange(22, 22, 22),), address=guest, guest_address=guest)
    assert published(named) == ["tcp [2001:db8:100::5]:22 -> [2001:db8:100::5]:22"]


def test_by_the_host_everywhere() -> None:
    at = attachment(ON_HOST)
    claims = resolve(
        Domain("u", "web", nat=NatMetadata(forwards=(PortForward("tcp", (SSH,)),))),
        [at],
        Choices(4, 6),
    )
    assert [each.address for each in claims.forwards] == [ANY, ANY6]


def test_a_family_that_is_not_there() -> None:
    only4 = attachment(outside=Outside(OUTSIDE.address))
    with pytest.raises(ConflictError, match="network a has no IPv6 on upstream provider"):
        published(PortForward("tcp", (SSH,), guest_address=six("fd00:10::5")), at=only4)


def test_claims_of_both_families(store: Store) -> None:
    shared = {"n": ClaimScope("", True)}

    def forward(owner: str, address: Address, target: Address) -> Forward:
        return Forward(owner, owner, "n", "tcp", address, 22, 22, target, 22, 22)

    mine = (
        forward("web", ANY, IPv4Address("10.0.0.5")),
        forward("web", ANY6, six("fd00:10::5")),
        forward("web", six("2001:db8:100::5"), six("2001:db8:100::5")),
    )
    store.claims.put(Claims("web", mine), shared, published=True)
    assert set(store.claims.forwards("n")) == set(mine)
    for rival in (
        forward("mail", six("2001:db8::2"), six("fd00:10::6")),
        forward("mail", six("2001:db8:100::5"), six("2001:db8:100::5")),
    ):
        with pytest.raises(ConflictError, match="is forwarded to web already"):
            store.claims.put(Claims("mail", (rival,)), shared, published=True)
    key = PortKey("x", "n", "tcp", "", 22)
    assert store.claims.is_claimed(key, shared["n"], ANY6, 22)
    # Only what listens on the network's own address of that family moves with it.
    store.claims.move("n", six("2001:db8:77::9"))
    assert set(store.claims.forwards("n")) == set(mine)


def test_claims_move_with_the_address_of_their_family(store: Store) -> None:
    own: tuple[Address, ...] = (
        six("2001:db8:77::5"),
        IPv4Address("192.168.0.5"),
        six("2001:db8:100::5"),
    )
    targets: tuple[Address, ...] = (six("fd00:10::5"), IPv4Address("10.0.0.5"), own[2])
    found = tuple(
        Forward("web", "web", "n", "tcp", address, 22, 22, target, 22, 22)
        for address, target in zip(own, targets, strict=True)
    )
    store.claims.put(Claims("web", found), {"n": ClaimScope("provider", False)}, published=True)
    store.claims.move("n", six("2001:db8:77::9"))
    assert {each.address for each in store.claims.forwards("n")} == {
        six("2001:db8:77::9"), own[1], own[2],
    }  # fmt: skip


# -- guests' addresses -----------------------------------------------------------


def ranged(*hosts: DhcpHost) -> Attachment:
    spans = (AddressRange(six("fd00:10::100"), six("fd00:10::101")),)
    subnets = (FOUR, Subnet(SIX.interface, spans, hosts))
    return Attachment(Nic(MAC, "a"), replace(NETWORK, subnets=subnets), PROVIDER, OUTSIDE)


@pytest.mark.parametrize(
    "host",
    [
        DhcpHost(six("fd00:10::7"), mac=MAC),
        DhcpHost(six("fd00:10::7"), name="web"),
        DhcpHost(six("fd00:10::7"), id="00:03:00:01:52:54:00:00:00:05"),
        DhcpHost(six("fd00:10::7"), id="00:01:00:01:2b:aa:bb:cc:52:54:00:00:00:05"),
    ],
)
def test_known_by_the_networks_own_xml(
    store: Store, host: DhcpHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_file, "LIBVIRT_DIRECTORY", tmp_path)
    choices = Allocation(Config(), store, cast("Kernel", None))
    web = Domain("web", "web")
    assert choices.target(web, ranged(host), 6) == six("fd00:10::7")
    assert choices.target(Domain("x", "x"), ranged(DhcpHost(six("fd00:10::7"))), 6) == six(
        "fd00:10::100"
    )
    assert not choices.knows(web, attachment(), 6)


def test_reservations_of_both_families(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_file, "LIBVIRT_DIRECTORY", tmp_path)
    # Of some clients of DHCPv6 libvirt's helper does not know the MAC address.
    (tmp_path / "virbr10.status").write_text(
        '[{"ip-address": "fd00:10::100", "iaid": "1", "expiry-time": 0}]'
    )
    choices = Allocation(Config(), store, cast("Kernel", None))
    web = Domain("web", "web")
    assert choices.target(web, ranged(), 6) == six("fd00:10::101")
    store = choices.store
    assert store.reservations.all("n", 6) == {MAC: six("fd00:10::101")}
    assert store.reservations.all("n") == {}
    assert store.reservations.for_dhcp("n", 5, 6) == {MAC: six("fd00:10::101")}
    with pytest.raises(ConflictError, match="has no DHCP range"):
        choices.target(web, ranged(), 4)
    store.reservations.drop("n", MAC)
    assert store.reservations.get("n", MAC, 6) == six("fd00:10::101")


# -- the rest ------------------------------------------------------------------


def test_resolvers_by_family(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 2001:db8::53\nnameserver fe80::1%eth0\nnameserver 192.168.0.53\n")
    four, other = IPv4Address("192.168.0.53"), six("2001:db8::53")
    assert host_resolvers((file,), FAMILIES[1:]).servers == (other,)
    assert host_resolvers((file,), FAMILIES).servers == (other, four)
    assert host_resolvers((file,), ()).servers == ()


class Host:
    """A machine's sysctls and links."""

    def __init__(self, **settings: str) -> None:
        self.settings = {
            "net/ipv6/conf/" + key.replace("__", "/"): value for key, value in settings.items()
        }

        self.host = SimpleNamespace(sysctls=self)

    def get(self, key: str) -> str | None:
        return self.settings.get(key)

    def values(self, keys: Collection[str]) -> dict[str, str]:
        return {key: self.settings[key] for key in keys if key in self.settings}

    def set(self, key: str, value: str) -> None:
        self.settings[key] = value


def test_forwarding_is_put_back_unless_somebody_else_has_changed_it() -> None:
    host = Host(all__forwarding="1", eth0__accept_ra="2", eth1__accept_ra="0")
    noted = {
        "net/ipv6/conf/eth0/accept_ra": "1",
        "net/ipv6/conf/eth1/accept_ra": "1",
        "net/ipv6/conf/gone/accept_ra": "1",
        host_ipv6.FORWARDING: "0",
    }
    host_ipv6.put_back(cast("Kernel", host), noted)
    expected = Host(all__forwarding="0", eth0__accept_ra="1", eth1__accept_ra="0")
    assert host.settings == expected.settings


def test_a_host_that_forwards_already_is_left_alone() -> None:
    host = cast("Kernel", Host(all__forwarding="1", default__accept_ra="1"))
    plan = host_ipv6.plan_of(host, Needs(routes6=True))
    assert [each.describe() for each in plan] == [f"sysctl {host_ipv6.FORWARDING} = 1 in the host"]
    assert host_ipv6.plan_of(host, Needs()) == ()


IPV6_ALONE = """
[upstreams.provider]
kind = "bridge"
bridge = "br0"
"""


def test_an_upstream_of_ipv6_alone() -> None:
    text = IPV6_ALONE + 'subnet6 = "2001:db8::/64"\npool6 = ["2001:db8::5"]\n'
    assert config.parse(text, "x").upstreams["provider"] == BridgeUpstream(
        name="provider",
        bridge="br0",
        subnet6=IPv6Network("2001:db8::/64"),
        pool6=(AddressRange(six("2001:db8::5"), six("2001:db8::5")),),
    )
    assert config.parse(IPV6_ALONE + 'prefixes6 = ["2001:db8::/56"]\n', "x")
    text = '[upstreams.host]\nsubnet6 = "2001:db8::/64"\nprefixes6 = ["2001:db8:1::/56"]\n'
    assert config.parse(text, "x").upstreams["host"].prefixes6


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (IPV6_ALONE, "upstreams.provider.pool: missing"),
        (IPV6_ALONE + 'subnet6 = "2001:db8::/64"\n', "upstreams.provider.pool: missing"),
        (
            IPV6_ALONE + 'subnet6 = "2001:db8::/64"\npool6 = ["2001:db8::"]\n',
            "pool6: has no usable address",
        ),
        (
            IPV6_ALONE + 'subnet6 = "2001:db8::/64"\nprefixes6 = ["2001:db8::/56"]\n',
            "prefixes6: 2001:db8::/56 overlaps subnet6",
        ),
        (
            IPV6_ALONE
            + 'prefixes6 = ["2001:db8::/56"]\n'
            + IPV6_ALONE.replace("provider", "other")
            + 'prefixes6 = ["2001:db8::/60"]\n',
            "shares 2001:db8::/56 with upstreams.provider.prefixes6",
        ),
        (
            '[upstreams.host]\nprefixes6 = ["2001:db8::/56"]\n'
            '[upstreams.other]\nkind = "host"\nprefixes6 = ["2001:db8::/60"]\n',
            "expected other addresses, as both upstreams are the host's",
        ),
    ],
)
def test_wrong_upstreams(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "x")
    assert problem in str(caught.value)


# -- the host's rules ------------------------------------------------------------


def test_public_subnets_pass_the_host_untranslated() -> None:
    prefix = IPv6Network("2001:db8:100::/64")
    policy = HostPolicy(
        transits=(Transit("natns-host", IPv6Network("fd00:1::/64")),),
        public=(Provider("natns-host", prefix),),
    )
    passing = [rule for rule in rules(policy) if rule.chain == "forward"]
    ours = [
        number
        for number, rule in enumerate(passing)
        if prefix in (*rule.sources, *rule.destinations) and rule.action == "accept"
    ]
    out, back = (
        next(n for n, rule in enumerate(passing) if rule.action == "drop" and getattr(rule, link))
        for link in ("iif", "oif")
    )
    assert len(ours) == 2 and ours[0] < out < ours[1] < back
    assert not any(prefix in rule.sources for rule in rules(policy) if rule.chain == "srcnat")
    part = host_parts.make(policy)
    assert len(part.public) == 2
    # Rules in the middle of a chain do not come and go alone.
    assert host_parts.script(host_parts.HostPart(), part, []) is None
    assert host_parts.load(host_parts.dump(part)) == part


def test_what_the_host_routes_on_a_bridge_needs_a_way_past_foreign_chains() -> None:
    prefix = IPv6Network("2001:db8:100::/64")
    bridged = HostPolicy(provider=(Provider("br0", prefix),))
    assert bridged.is_empty
    assert accepts(bridged) == ()
    routed = HostPolicy(provider=(Provider("br0", prefix, routed=True),))
    assert not routed.is_empty
    assert rules(routed) == ()
    assert {(rule.sources, rule.destinations) for rule in accepts(routed)} == {
        ((prefix,), ()),
        ((), (prefix,)),
    }
