# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is counted, and how Prometheus gets it."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from libvirt_natns import __version__, names
from libvirt_natns.addresses import AddressRange
from libvirt_natns.daemons import dnsmasq, dnsmasq_files, lease_file
from libvirt_natns.engine.engine import Engine
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.upstream import BridgeUpstream
from libvirt_natns.service import census, metrics
from libvirt_natns.state.claim_scope import ClaimScope
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.state.store import Store

PROVIDER = BridgeUpstream(
    name="provider",
    bridge="br0",
    subnet=IPv4Network("192.168.0.0/24"),
    gateway=IPv4Address("192.168.0.1"),
    # The gateway is in it, and cannot be leased.
    pool=(AddressRange(IPv4Address("192.168.0.1"), IPv4Address("192.168.0.10")),),
)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine over an empty database, and a machine on which nothing runs."""
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(lease_file, "LIBVIRT_DIRECTORY", tmp_path / "leases")
    monkeypatch.setattr(census, "CONNTRACK", tmp_path / "conntrack")
    monkeypatch.setattr(netns, "entered", missing)
    settings = Config(upstream="provider", upstreams={"provider": PROVIDER})
    store = Store(tmp_path / "lib")
    yield Engine(settings, store, Kernel())
    store.close()


@contextlib.contextmanager
def missing(name: str) -> Iterator[None]:
    raise KernelError(f"network namespace {name} is missing")
    yield


def record(engine: Engine, name: str, state: NetworkState, **changes: str) -> NetworkRecord:
    made = NetworkRecord(
        uuid=f"uuid-{name}",
        name=name,
        namespace=f"nat-{name}",
        bridge=f"virbr-{name}"[:15],
        upstream=changes.get("upstream", "provider"),
        kind="bridge",
        subnets=(IPv4Network("10.0.0.0/24"),),
        taken_over=True,
        state=state,
        boot=changes.get("boot", boot_id()),
        since=now(),
        document=b"<network/>",
    )
    engine.store.networks.put(made)
    return made


def lease(engine: Engine, name: str, last: int, upstream: str = "provider") -> None:
    address = IPv4Address(f"192.168.0.{last}")
    assert engine.store.leases.reserve(upstream, "br0", f"uuid-{name}", address)


def forward(network: str, owner: str, port: int) -> Forward:
    return Forward(
        owner=owner,
        owner_name=owner,
        network=network,
        proto="tcp",
        address=IPv4Address("192.168.0.2"),
        first=port,
        last=port,
        target=IPv4Address("10.0.0.5"),
        to=80,
        to_last=80,
    )


def samples(text: str) -> Samples:
    """All samples by name and labels, as Prometheus would read them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float | None:
    return samples(text).get((f"libvirt_natns_{name}", tuple(sorted(labels.items()))))


# -- what there is -----------------------------------------------------------


def test_nothing_yet(engine: Engine) -> None:
    told = metrics.gauges(engine)
    assert value(told, "build_info", version=__version__) == 1
    for state in ("preparing", "starting", "up", "down"):
        assert value(told, "networks", state=state) == 0
    assert value(told, "guests") == 0
    assert value(told, "pool_addresses", upstream="provider", kind="ipv4") == 9
    assert value(told, "pool_leased_addresses", upstream="provider", kind="ipv4") == 0
    assert not [name for name, labels in samples(told) if "network" in dict(labels)]


def test_networks_by_state(engine: Engine) -> None:
    record(engine, "a", "up")
    record(engine, "b", "starting")
    record(engine, "c", "down")
    # It ran when the machine went down.
    record(engine, "d", "up", boot="another")
    told = metrics.gauges(engine)
    found = {state: value(told, "networks", state=state) for state in census.STATES}
    assert found == {"preparing": 0, "starting": 1, "up": 1, "down": 2}
    assert {dict(labels).get("network") for _, labels in samples(told)} == {None, "a"}


def test_use_of_pools(engine: Engine) -> None:
    for name, state, last in (("a", "up", 2), ("b", "down", 3), ("c", "starting", 4)):
        record(engine, name, state)  # type: ignore[arg-type]
        lease(engine, name, last)
    # Of an upstream that the configuration does not have any more.
    record(engine, "old", "down", upstream="gone")
    lease(engine, "old", 200, "gone")
    told = metrics.gauges(engine)
    assert value(told, "pool_leased_addresses", upstream="provider", kind="ipv4") == 3
    assert value(told, "pool_used_addresses", upstream="provider", kind="ipv4") == 2
    assert value(told, "pool_leased_addresses", upstream="gone", kind="ipv4") == 1
    assert value(told, "pool_addresses", upstream="gone", kind="ipv4") is None


def test_pool_of_the_host(engine: Engine) -> None:
    with_host = Engine(Config(), engine.store, engine.kernel)
    assert value(metrics.gauges(with_host), "pool_addresses", upstream="host", kind="ipv4") is None
    engine.store.transit.choose_subnet("host", [IPv4Network("198.19.252.0/22")], None)
    assert value(metrics.gauges(with_host), "pool_addresses", upstream="host", kind="ipv4") == 1021


def test_forwards_and_guests(engine: Engine) -> None:
    for name in ("a", "b"):
        record(engine, name, "up")
    store = engine.store
    scopes = {"uuid-a": ClaimScope("provider", False)}
    for port, published in ((80, True), (81, True), (82, False)):
        owner = f"guest-{port}"
        store.guests.put(owner, owner, b"", published)
        store.claims.put(Claims(owner, (forward("uuid-a", owner, port),)), scopes, published)
    told = metrics.gauges(engine)
    assert value(told, "forwards", network="a") == 2
    assert value(told, "forwards", network="b") == 0
    assert value(told, "guests") == 2


def test_connections(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(engine, "a", "up")
    assert value(metrics.gauges(engine), "conntrack_entries", network="a") is None
    monkeypatch.setattr(netns, "entered", lambda _: contextlib.nullcontext())
    # A namespace in which nothing tracks connections.
    assert value(metrics.gauges(engine), "conntrack_entries", network="a") is None
    (tmp_path / "conntrack").mkdir()
    (tmp_path / "conntrack" / "nf_conntrack_count").write_text("17\n")
    (tmp_path / "conntrack" / "nf_conntrack_max").write_text("262144\n")
    told = metrics.gauges(engine)
    assert value(told, "conntrack_entries", network="a") == 17
    assert value(told, "conntrack_entries_limit", network="a") == 262144


def test_dnsmasq(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("needs", "lacks", "none"):
        record(engine, name, "up")
    for name in ("needs", "lacks"):
        file = dnsmasq_files.paths(f"uuid-{name}").configuration
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setattr(dnsmasq, "running", lambda uuid, _: 7 if uuid == "uuid-needs" else None)
    told = metrics.gauges(engine)
    assert value(told, "dnsmasq_running", network="needs") == 1
    assert value(told, "dnsmasq_running", network="lacks") == 0
    assert value(told, "dnsmasq_running", network="none") is None


def test_any_name_of_a_network_is_told(engine: Engine) -> None:
    name = 'a "lab"\\ ü\nb'
    record(engine, name, "up")
    assert value(metrics.gauges(engine), "forwards", network=name) == 0


# -- what has happened -------------------------------------------------------


def test_without_a_service_nothing_has_been_counted(engine: Engine) -> None:
    told = metrics.WITHOUT_SERVICE + metrics.gauges(engine)
    assert told.startswith("# ")
    assert value(told, "networks_given_up") is None
    assert not [name for name, _ in samples(told) if name.endswith(("_total", "_count"))]


def test_what_the_service_counts(engine: Engine) -> None:
    counted = metrics.Metrics()
    counted.answered("network", "start", "done", 0.02)
    counted.answered("network", "start", "done", 0.3)
    counted.answered("guest", "prepare", "refused", 0.001)
    counted.changed("up", 0.1)
    counted.healed(0.5)
    counted.failed("heal")
    told = counted.text(engine, ["uuid-a"], {"b": {"stopped"}, "c": ()})
    start = {"hook": "network", "operation": "start", "outcome": "done"}
    assert value(told, "hook_duration_seconds_count", **start) == 2
    assert value(told, "hook_duration_seconds_sum", **start) == pytest.approx(0.32)
    assert value(told, "hook_duration_seconds_bucket", **start, le="0.025") == 1
    refused = {"hook": "guest", "operation": "prepare", "outcome": "refused"}
    assert value(told, "hook_duration_seconds_count", **refused) == 1
    assert value(told, "change_duration_seconds_count", verb="up") == 1
    assert value(told, "heal_duration_seconds_count") == 1
    assert value(told, "failures_total", what="heal") == 1
    assert value(told, "networks_given_up") == 1
    assert value(told, "network_obstacle", network="b", obstacle="stopped") == 1
    assert value(told, "network_obstacle", network="b", obstacle="no names") == 0
    assert value(told, "network_obstacle", network="c", obstacle="stopped") == 0
    assert samples(told)["process_resident_memory_bytes", ()] > 0


def test_names_are_ours_and_once(engine: Engine) -> None:
    counted = metrics.Metrics()
    counted.answered("network", "start", "done", 0.02)
    record(engine, "a", "up")
    families = [family.name for family in text_string_to_metric_families(counted.text(engine))]  # type: ignore[no-untyped-call]
    assert len(families) == len(set(families))
    assert all(name.startswith(("libvirt_natns_", "process_")) for name in families)
    assert not [name for name in families if name.endswith("_created")]


def test_threads_lose_no_count(engine: Engine) -> None:
    counted = metrics.Metrics()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: counted.failed("heal"), range(4000)))
    assert value(counted.text(engine), "failures_total", what="heal") == 4000


def test_two_services_in_one_process_share_nothing(engine: Engine) -> None:
    one, other = metrics.Metrics(), metrics.Metrics()
    one.failed("heal")
    assert value(other.text(engine), "failures_total", what="heal") is None
