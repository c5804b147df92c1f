# SPDX-License-Identifier: LGPL-2.1-or-later
"""From metadata to forwards: which NIC, which ports, which address."""

from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest

from libvirt_natns.addresses import Address, Family
from libvirt_natns.engine.publication.attachment import ANY, Attachment
from libvirt_natns.engine.publication.choices import AutoPortRequest
from libvirt_natns.engine.publication.port_spans import spans
from libvirt_natns.engine.publication.resolve import of_network, resolve
from libvirt_natns.errors import ConflictError, DocumentError
from libvirt_natns.model.metadata import AddressRequest, NatMetadata, PortForward, PortRange
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.model.segment import BridgeSegment, Segment
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.model.transit_segment import HostSegment
from libvirt_natns.model.upstream import HOST_UPSTREAM, BridgeUpstream, Outside

PROVIDER = BridgeSegment.of(
    BridgeUpstream(name="provider", bridge="br0", subnet=IPv4Network("192.168.0.0/24"))
)
ON_HOST = HostSegment.of(HOST_UPSTREAM, "natns-host", IPv4Network("198.19.252.0/22"), None, None)
A, B, OWN = (IPv4Address(f"192.168.0.{number}") for number in (100, 101, 102))
TARGET = IPv4Address("10.0.0.5")
SSH = PortRange(2222, 2222, 22)


def attachment(
    name: str, mac: str, address: IPv4Address, upstream: Segment = PROVIDER
) -> Attachment:
    subnet = Subnet(IPv4Interface("10.0.0.1/24"))
    network = Network(f"uuid-{name}", name, f"virbr-{name}", subnets=(subnet,))
    return Attachment(Nic(mac, name), network, upstream, Outside(address))


BOTH = [attachment("a", "m1", A), attachment("b", "m2", B)]


class Choices:
    """What is always decided the same."""

    def knows(self, domain: Domain, attachment: Attachment, family: Family) -> bool:
        return family == 4

    def target(self, domain: Domain, attachment: Attachment, family: Family) -> Address:
        return TARGET

    def port(self, wish: AutoPortRequest) -> int:
        return 20000 + wish.key.target_port

    def address(
        self, request: AddressRequest, domain: Domain, attachment: Attachment, family: Family
    ) -> Address:
        return request.address or OWN


def resolved(*forwards: PortForward, among: list[Attachment] = BOTH) -> list[tuple[object, ...]]:
    claims = resolve(Domain("u", "web", nat=NatMetadata(forwards=forwards)), among, Choices())
    return [(f.network, str(f.address), f.first, f.last, str(f.target), f.to, f.to_last)
            for f in claims.forwards]  # fmt: skip


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([PortRange(80, 80, 80)], [(80, 80, 80, 80)]),
        ([PortRange(8000, 8010, 9000)], [(8000, 8010, 9000, 9010)]),
        ([PortRange(8000, 8010, 80, onto_one=True)], [(8000, 8010, 80, 80)]),
        (
            [PortRange(8000, 8010, 9000), PortRange(8005, 8005, 8005, exclude=True)],
            [(8000, 8004, 9000, 9004), (8006, 8010, 9006, 9010)],
        ),
        (
            [PortRange(8000, 8010, 80, onto_one=True), PortRange(7000, 8005, 0, exclude=True)],
            [(8006, 8010, 80, 80)],
        ),
        ([PortRange(1, 5, 1), PortRange(4, 9, 4, exclude=True)], [(1, 3, 1, 3)]),
        ([PortRange(1, 5, 1), PortRange(1, 9, 1, exclude=True)], []),
        (
            [PortRange(1, 9, 1), *(PortRange(n, n, n, exclude=True) for n in (7, 3, 1, 9))],
            [(2, 2, 2, 2), (4, 6, 4, 6), (8, 8, 8, 8)],
        ),
        ([PortRange(0, 0, 22, auto=True)], []),
    ],
)
def test_spans(ranges: list[PortRange], expected: list[tuple[int, ...]]) -> None:
    assert spans(PortForward("tcp", tuple(ranges))) == expected


def test_the_first_nic_unless_another_is_named() -> None:
    to = str(TARGET)
    assert resolved(PortForward("tcp", (SSH,))) == [("uuid-a", str(A), 2222, 2222, to, 22, 22)]
    for selected in ({"network": "b"}, {"mac": "m2"}):
        found = resolved(PortForward("tcp", (SSH,), **selected))  # type: ignore[arg-type]
        assert found == [("uuid-b", str(B), 2222, 2222, to, 22, 22)]


def test_automatic_ports() -> None:
    wanted = PortForward("udp", (PortRange(0, 0, 53, auto=True),))
    assert resolved(wanted) == [("uuid-a", str(A), 20053, 20053, str(TARGET), 53, 53)]


def test_what_automatic_ports_are_chosen_for() -> None:
    """Each forward to one port has a key of its own, and no fixed port of its owner's."""
    wishes: list[AutoPortRequest] = []

    class Listening(Choices):
        def port(self, wish: AutoPortRequest) -> int:
            wishes.append(wish)
            return super().port(wish)

    auto = (PortRange(0, 0, 22, auto=True),)
    forwards = (
        PortForward("tcp", auto),
        PortForward("tcp", auto, guest_address=IPv4Address("10.0.0.7")),
        PortForward("tcp", auto, mac="m1", address=A),
        PortForward("tcp", (SSH,), network="b"),
        PortForward("udp", (PortRange(1, 9, 1),)),
    )
    resolve(Domain("u", "web", nat=NatMetadata(forwards=forwards)), BOTH, Listening())
    selectors = ["", "guestAddress=10.0.0.7", f"mac=m1 address={A}"]
    assert [each.key.selector for each in wishes] == selectors
    assert {each.avoided for each in wishes} == {((2222, 2222),)}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (PortForward("tcp", (SSH,), network="c"), "network='c'> names no NIC"),
        (PortForward("tcp", (SSH,), mac="m3"), "mac='m3'> names no NIC"),
        (PortForward("tcp", (SSH,), address=B), "is not an address of its network"),
        (PortForward("tcp", (SSH,), guest_address=A), "is no guest's address in network a"),
        (
            PortForward("tcp", (SSH,), guest_address=IPv4Address("10.0.0.1")),
            "is no guest's address",
        ),
    ],
)
def test_what_can_never_hold(wanted: PortForward, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        resolved(wanted)


def test_addresses_to_listen_on() -> None:
    """The network's, one of the guest's own, and with the host as upstream any."""
    nat = NatMetadata(
        forwards=(PortForward("tcp", (SSH,), address=A), PortForward("tcp", (SSH,), address=OWN)),
        addresses=(AddressRequest(),),
    )
    claims = resolve(Domain("u", "web", nat=nat), BOTH, Choices())
    assert [each.address for each in claims.forwards] == [A, OWN]
    assert [(each.address, each.target) for each in claims.addresses] == [(OWN, TARGET)]
    local = IPv4Address("127.0.0.1")
    hosts = [attachment("a", "m1", A, ON_HOST)]
    found = resolved(
        PortForward("tcp", (SSH,)), PortForward("udp", (SSH,), address=local), among=hosts
    )
    assert [row[1] for row in found] == [str(ANY), str(local)]
    with pytest.raises(ConflictError, match="has no addresses for guests"):
        resolve(Domain("u", "web", nat=nat), hosts, Choices())


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ((AddressRequest(), AddressRequest(network="a")), "are for the NIC m1 in network a"),
        ((AddressRequest(mac="m2"), AddressRequest(network="b")), "are for the NIC m2 in network"),
        (
            (AddressRequest(OWN), AddressRequest(OWN, network="b")),
            f"two <natns:address> ask for {OWN}",
        ),
    ],
)
def test_addresses_that_cannot_be_told_apart(
    requests: tuple[AddressRequest, ...], said: str
) -> None:
    with pytest.raises(DocumentError, match=said):
        resolve(Domain("u", "web", nat=NatMetadata(addresses=requests)), BOTH, Choices())
    several = (AddressRequest(network="a"), AddressRequest(OWN, network="b"))
    nat = NatMetadata(addresses=several)
    assert len(resolve(Domain("u", "web", nat=nat), BOTH, Choices()).addresses) == 2


def test_without_a_nic_of_ours_nothing_counts() -> None:
    nonsense = PortForward("tcp", (SSH,), network="nowhere", address=B)
    assert resolved(nonsense, among=[]) == []


def test_a_networks_own() -> None:
    wanted = PortForward("tcp", (SSH,), guest_address=TARGET)
    network = Network("n", "a", "virbr10", nat=NatMetadata(forwards=(wanted,)))
    claims = of_network(network, PROVIDER, Outside(A), Choices())
    found = [(each.owner, each.owner_name, each.address, each.target) for each in claims.forwards]
    assert found == [("n", "network a", A, TARGET)]
