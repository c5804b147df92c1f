# SPDX-License-Identifier: LGPL-2.1-or-later
"""A forward of a guest that is off: by the definitions of networks, which may be down."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns.cli import forward_nics
from libvirt_natns.cli.forward_nics import require_later, require_now
from libvirt_natns.daemons import libvirt
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import Domain, Nic
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store

IP = "<ip address='10.0.0.1' prefix='24'/>"
NAT = "<metadata><natns:nat xmlns:natns='urn:libvirt-natns:1' {}/></metadata>"
NETWORKS = {
    "ours": IP,
    "my lab": IP,
    "wrong": NAT.format("enabled='maybe'") + IP,
    "disabled": NAT.format("enabled='no'") + IP,
    "forwarded": f"<forward mode='nat'/>{IP}",
}


@pytest.fixture
def guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guests]:
    documents = {
        name: (
            f"<network><name>{name}</name><uuid>c0ffee00-0000-4000-8000-00000000000{number}</uuid>"
            f"<bridge name='virbr{number}'/>{inside}</network>"
        ).encode()
        for number, (name, inside) in enumerate(NETWORKS.items())
    }
    monkeypatch.setattr(libvirt, "networks", lambda: documents)
    store = Store(tmp_path)
    yield Guests(cast("object", SimpleNamespace(config=Config(), store=store)))  # type: ignore[arg-type]
    store.close()


def domain(*nics: Nic) -> Domain:
    return Domain("6f3d6c1e-3f5f-4c3c-8d5e-0a3c1b1f8f11", "web", nics)


MAC, OTHER = "52:54:00:00:00:05", "52:54:00:00:00:06"


@pytest.mark.parametrize(
    "nic",
    [Nic(MAC, "ours"), Nic(MAC, "my lab"), Nic(MAC, bridge="virbr0"), Nic(MAC, "wrong")],
)
def test_a_nic_in_a_network_that_would_get_a_router(nic: Nic, guests: Guests) -> None:
    for nics in ((nic,), (Nic(OTHER, "forwarded"), nic)):
        require_later(guests, domain(*nics), None, None)
        require_later(guests, domain(*nics), nic.network, None if nic.network else MAC.upper())


@pytest.mark.parametrize(
    ("nics", "network", "mac", "said"),
    [
        ((), None, None, "guest web has no NIC in a network that libvirt-natns handles:"
         " see virt-natns status"),
        ((Nic(MAC, "forwarded"), Nic(OTHER, "disabled")), None, None, "no NIC in a network that"),
        ((Nic(MAC, "undefined"), Nic(OTHER, bridge="br0")), None, None, "no NIC in a network that"),
        ((Nic(MAC, bridge="virbr4"),), None, None, "no NIC in a network that"),
        ((Nic(MAC, "ours"), Nic(OTHER, "forwarded")), "forwarded", None,
         "guest web has no NIC in network forwarded that libvirt-natns handles:"
         " see virt-natns plan forwarded"),
        ((Nic(MAC, "ours"),), "my lab", None,
         "no NIC in network 'my lab' that libvirt-natns handles: see virt-natns plan 'my lab'"),
        ((Nic(MAC, "ours"),), "-x", None, "see virt-natns plan -- -x"),
        ((Nic(MAC, "ours"), Nic(OTHER, "forwarded")), None, OTHER,
         f"no NIC with MAC address {OTHER} in a network that"),
        ((Nic(MAC, "ours"), Nic(OTHER, "forwarded")), "uors", None,
         "guest web has no NIC in network uors (did you mean ours?) that libvirt-natns handles"),
    ],
)  # fmt: skip
def test_no_such_nic(
    nics: tuple[Nic, ...], network: str | None, mac: str | None, said: str, guests: Guests
) -> None:
    for require in (require_later, require_now):
        with pytest.raises(NatnsError) as refused:
            require(guests, domain(*nics), network, mac)
        assert said in str(refused.value)


def test_a_running_guest_needs_the_named_nic(
    guests: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NIC on the bridge of a network does not name the network."""
    inside = Nic(MAC, bridge="virbr0")
    ours = cast("NetworkRecord", SimpleNamespace(name="ours"))
    monkeypatch.setattr(forward_nics, "in_ours", lambda *_: [(inside, ours)])
    whole = domain(inside, Nic(OTHER, "forwarded"))
    for network, mac in ((None, None), ("ours", None), (None, MAC.upper())):
        require_now(guests, whole, network, mac)
    for network, mac in (("forwarded", None), (None, OTHER)):
        with pytest.raises(NatnsError, match="that libvirt-natns handles"):
            require_now(guests, whole, network, mac)
