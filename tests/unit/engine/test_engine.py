# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which upstream address the engine keeps, takes and gives back."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import cast, get_args

import pytest

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange
from libvirt_natns.engine import upstream_leases
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.network_run import NetworkRun
from libvirt_natns.engine.up import NotUpError, RecordChangedError
from libvirt_natns.errors import DocumentError
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.metadata import NatMetadata, PortForward, PortRange
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import BridgeSegment, Segment
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.model.upstream import BridgeUpstream
from libvirt_natns.operations.undo import Undo
from libvirt_natns.state.leases import Leased
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.state.store import Store

FIRST, OTHER, FOREIGN = (IPv4Address(f"192.168.0.{number}") for number in (100, 101, 200))
GUEST = IPv4Address("10.0.0.5")
PROVIDER = BridgeSegment.of(
    BridgeUpstream(
        name="provider",
        bridge="br0",
        subnet=IPv4Network("192.168.0.0/24"),
        pool=(AddressRange(FIRST, OTHER),),
    )
)
NETWORK = Network("a", "a", "virbr10", subnets=(Subnet(IPv4Interface("10.0.0.1/24")),))


class WithoutAddresses:
    """A session with a host that has no addresses; nothing else is asked for."""

    host = SimpleNamespace(addresses=SimpleNamespace(beyond_link=set))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    def probe(bridge: str, addresses: Collection[IPv4Address], *_: object) -> set[IPv4Address]:
        return {FIRST} & set(addresses)

    monkeypatch.setattr("libvirt_natns.kernel.address_probe.probe", probe)
    store = Store(tmp_path)
    yield Engine(Config(), store, cast("Kernel", WithoutAddresses()))
    store.close()


def lease(engine: Engine, address: IPv4Address) -> None:
    assert engine.store.leases.reserve("provider", "br0", NETWORK.uuid, address)


def run_of(
    network: Network, segment: Segment = PROVIDER, address: IPv4Address | None = None
) -> NetworkRun:
    return NetworkRun(network, b"", None, segment, Leased(address))


def test_failed_start_gives_the_earlier_address_back(engine: Engine) -> None:
    lease(engine, FIRST)
    wanted = PortForward("tcp", (PortRange(1, 1, 1),), address=FOREIGN, guest_address=GUEST)
    network = replace(NETWORK, nat=NatMetadata(address=OTHER, forwards=(wanted,)))
    with pytest.raises(DocumentError, match="is not an address of its network"), Undo() as undo:
        upstream_leases.reserve(engine, run_of(network), undo)
    assert engine.store.leases.of("provider", "a").address == FIRST


def test_failed_first_start_leaves_no_lease(engine: Engine) -> None:
    wanted = PortForward("tcp", (PortRange(1, 1, 1),), address=FOREIGN, guest_address=GUEST)
    network = replace(NETWORK, nat=NatMetadata(forwards=(wanted,)))
    with pytest.raises(DocumentError), Undo() as undo:
        upstream_leases.reserve(engine, run_of(network), undo)
    assert engine.store.leases.all_of("a") == []


@pytest.mark.parametrize(
    "changed",
    [
        replace(PROVIDER, subnet=IPv4Network("192.168.0.0/25")),
        replace(PROVIDER, gateway=FOREIGN),
        replace(PROVIDER, dns=(FOREIGN,)),
    ],
)
def test_address_that_the_configuration_forbids_by_now(
    engine: Engine, changed: BridgeSegment
) -> None:
    """Another one is asked for on the wire, as ever: the first one answers."""
    lease(engine, FOREIGN)
    upstream_leases.renew(engine, run_of(NETWORK, changed, address=FOREIGN))
    assert engine.store.leases.of("provider", "a").address == OTHER


def test_address_outside_the_pool_is_kept_while_the_network_runs(engine: Engine) -> None:
    lease(engine, FOREIGN)
    upstream_leases.renew(engine, run_of(NETWORK, address=FOREIGN))
    assert engine.store.leases.of("provider", "a").address == FOREIGN


UUID = "6f3d6c1e-3f5f-4c3c-8d5e-0a3c1b1f8f10"
DOCUMENT = f"""<network><name>a</name><uuid>{UUID}</uuid><bridge name="virbr10"/>
<ip address="10.0.0.1" prefix="24"/></network>""".encode()


class Idle:
    """A kernel session that a repair opens and leaves as it is."""

    def work(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forget(self) -> None:
        """Forget nothing."""

    distrust = forget


@pytest.mark.parametrize("state", get_args(NetworkState))
def test_a_repair_brings_up_only_what_is_up_and_unchanged(
    state: NetworkState, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    config = Config(upstreams={"provider": PROVIDER.upstream}, upstream="provider")
    repairing = replace(engine, config=config, kernel=cast("Kernel", Idle()))
    record = NetworkRecord(
        UUID, "a", "nat-a", "virbr10", "provider", "bridge", (), True, state, boot_id(), now(),
        DOCUMENT,
    )  # fmt: skip
    engine.store.networks.put(record)
    edited = replace(record, state="up", document=DOCUMENT.replace(b"10.0.0.1", b"10.0.0.9"))
    with pytest.raises(RecordChangedError if state == "up" else NotUpError):
        repairing.repair(edited)
    assert engine.store.networks.get(UUID) == record
