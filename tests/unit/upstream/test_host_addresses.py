# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses of the NIC that the host keeps: the choice, and their rules."""

from dataclasses import replace
from ipaddress import IPv4Address, ip_address

import pytest
from test_nic_sources import A, B, C, nic, route

from libvirt_natns.errors import ConflictError, RouterError
from libvirt_natns.firewall import iptables, nftables
from libvirt_natns.kernel import listening_ports, login_session
from libvirt_natns.kernel.listening_ports import Listener
from libvirt_natns.kernel.login_session import Entrance
from libvirt_natns.model.publication import PortProtocol, PortSet
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.upstream.router import host_addresses, nat_rules, preflight
from libvirt_natns.upstream.router.target import Target

WAN = RouterUpstream(
    name="wan", nic="ens3", host_ports=(PortSet("tcp", 22, 22), PortSet("udp", 50, 60))
)
LISTENERS: dict[PortProtocol, set[tuple[str, int]]] = {
    "tcp": {("0.0.0.0", 22), (B, 22), (A, 80), ("127.0.0.1", 22), ("::", 22)},
    "udp": {(C, 53)},
}
TARGET = Target(
    "wan", "ens3", "nftables", "192.168.158.0/24", (("tcp", 22, 22),), (), "10.213.252.0/22",
    addresses4=(A, B),
)  # fmt: skip


@pytest.fixture(autouse=True)
def listening(monkeypatch: pytest.MonkeyPatch) -> None:
    def listeners(proto: PortProtocol) -> set[Listener]:
        return {(ip_address(ip), port) for ip, port in LISTENERS[proto]}

    monkeypatch.setattr(listening_ports, "listeners", listeners)


@pytest.mark.parametrize(
    ("named", "boot", "expected"),
    [
        (None, False, (B, C)),
        (None, True, ()),
        ((), False, ()),
        ((C, A), False, (A, C)),
        # Other hardware may have another address by now, and the server must not be lost.
        ((A, "203.0.113.7"), True, (A,)),
    ],
)
def test_choice(named: tuple[str, ...] | None, boot: bool, expected: tuple[str, ...]) -> None:
    addresses = None if named is None else tuple(map(IPv4Address, named))
    wanted = replace(WAN, host_addresses=addresses)
    assert host_addresses.choose(wanted, nic(), boot=boot) == expected


def test_refusals() -> None:
    wanted = replace(WAN, host_addresses=(IPv4Address("203.0.113.7"),))
    with pytest.raises(RouterError, match=r"host_addresses has 203\.0\.113\.7, which is no"):
        host_addresses.choose(wanted, nic(), boot=False)
    with pytest.raises(
        RouterError, match=f"has routes in table 158, which the router needs for {B}, {C}"
    ):
        host_addresses.choose(WAN, nic(route("0.0.0.0/0", table=158)), boot=False)


def test_rules_of_both_backends() -> None:
    text = nftables.render(nat_rules.rules(TARGET), "router")
    assert f"{A} . tcp . 22 : {A} . 22, {B} . tcp . 22 : {B} . 22" in text
    # The address decides before the rule for any local address does.
    chain = text.partition("chain dstnat {")[2].partition("}")[0]
    assert chain.index("map @ports") < chain.index("map @local_ports")
    made = iptables.tables(nat_rules.rules(TARGET), iptables.ROUTER)
    entries = [str(entry) for table in made for c in table.chains.values() for entry in c]
    translations = [entry for entry in entries if "DNAT" in entry]
    for to, entry in zip((A, B), translations[:2], strict=True):
        assert f"--to-destination {to}" in entry
    assert Target.from_object(TARGET.as_object()) == TARGET


@pytest.mark.parametrize(
    ("address", "proto", "port", "refused"),
    [
        (A, "tcp", 2222, True),
        (A, "tcp", 22, False),
        (A, "udp", 22, True),
        (C, "tcp", 2222, False),
        ("0.0.0.0", "udp", 60001, True),
        ("2001:db8::1", "tcp", 2222, False),
        ("::", "udp", 60001, True),
    ],
)
def test_sessions(
    address: str, proto: PortProtocol, port: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    entrance = Entrance(proto, ip_address(address), port)
    monkeypatch.setattr(login_session, "entrances", lambda: {entrance})
    if not refused:
        preflight.check_session(TARGET, {A, B})
        return
    with pytest.raises(ConflictError, match=f"by {proto} port {port}") as caught:
        preflight.check_session(TARGET, {A, B})
    assert f'"{proto}/{port}"' in caught.value.remedy


@pytest.mark.parametrize("address", ["2001:db8::1", "fe80::5054:ff:fe00:1"])
def test_a_session_by_an_address_that_the_host_does_not_keep(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host keeps its host_address6 alone, with all ports, and never a link-local address."""
    entrance = Entrance("tcp", ip_address(address), 22)
    monkeypatch.setattr(login_session, "entrances", lambda: {entrance})
    kept = replace(TARGET, addresses6=("2001:db8::22",))
    with pytest.raises(ConflictError, match=f"by {address}, which") as caught:
        preflight.check_session(kept, {A, B, address})
    assert "(2001:db8::22)" in caught.value.remedy
    preflight.check_session(replace(TARGET, addresses6=(address,)), {A, B, address})
