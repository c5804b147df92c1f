# SPDX-License-Identifier: LGPL-2.1-or-later
"""Flows that a translation has missed, and flows that it must leave alone."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from socket import IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP

import pytest

from libvirt_natns.firewall.host_policy import HostForward
from libvirt_natns.firewall.host_rules import dnats
from libvirt_natns.firewall.missed_flows import translations
from libvirt_natns.firewall.rule import Rule, single
from libvirt_natns.kernel.conntrack import ConntrackEntry
from libvirt_natns.kernel.early_flows import Translation

CLIENT, HOST, GUEST = (IPv4Address(text) for text in ("192.0.2.9", "192.0.2.1", "10.0.0.5"))
FLOW = ConntrackEntry(
    protocol=IPPROTO_UDP, client=CLIENT, asked=HOST, port=53, answered=(HOST, CLIENT),
    answering_port=53, assured=False, zone=0, name=b"",
)  # fmt: skip
PORTS = Translation(4, HOST, IPPROTO_UDP, 50, 59, (IPv4Network("192.0.2.0/24"),))
ANYWHERE = replace(PORTS, address=None)


def test_a_flow_from_before_is_missed() -> None:
    assert PORTS.missed(FLOW, ())
    assert ANYWHERE.missed(FLOW, {HOST})
    loopback = IPv4Address("127.0.0.1")
    assert ANYWHERE.missed(replace(FLOW, asked=loopback, answered=(loopback, CLIENT)), ())
    whole = replace(PORTS, protocol=0, first=0, last=0)
    assert whole.missed(replace(FLOW, port=9999, answering_port=9999), ())


@pytest.mark.parametrize(
    "other",
    [
        replace(FLOW, answered=(GUEST, CLIENT)),
        replace(FLOW, answering_port=5353),
        replace(FLOW, port=60, answering_port=60),
        replace(FLOW, protocol=IPPROTO_TCP),
        replace(FLOW, zone=7),
        replace(FLOW, client=IPv4Address("198.51.100.1")),
        replace(FLOW, asked=GUEST, answered=(GUEST, CLIENT)),
    ],
    ids=["translated", "other port", "outside", "protocol", "zone", "client", "forwarded"],
)
def test_other_flows_are_left_alone(other: ConntrackEntry) -> None:
    assert not PORTS.missed(other, {HOST})
    assert not ANYWHERE.missed(other, {HOST})


def test_flows_to_an_address_that_waits_are_left_alone() -> None:
    """The host has the address no more, or not yet, and routes packets to its owner."""
    forward = HostForward("udp", HOST, 53, 53, GUEST, "natns-host")
    (translation,) = translations(dnats((forward,)))
    assert translation.missed(FLOW, {HOST})
    assert not translation.missed(FLOW, {GUEST})


@pytest.mark.parametrize("protocol", [IPPROTO_TCP, IPPROTO_SCTP])
def test_an_established_connection_is_left_alone(protocol: int) -> None:
    translation, flow = replace(PORTS, protocol=protocol), replace(FLOW, protocol=protocol)
    assert translation.missed(flow, ())
    assert not translation.missed(replace(flow, assured=True), ())
    assert PORTS.missed(replace(FLOW, assured=True), ()), "UDP has no end"


def test_translations_of_the_hosts_rules() -> None:
    sources = (IPv4Network("192.0.2.0/24"), IPv4Network("198.51.100.0/24"))
    four = HostForward("udp", None, 50, 59, GUEST, "natns-host", sources)
    six = HostForward("tcp", None, 80, 80, IPv6Address("fd00::5"), "natns-host")
    assert list(translations(dnats((four, six)))) == [
        *(Translation(4, None, IPPROTO_UDP, 50, 59, (source,)) for source in sources),
        Translation(6, None, IPPROTO_TCP, 80, 80, (), (IPv6Network("::1"),)),
    ]


def test_translations_of_a_namespaces_rules() -> None:
    whole = Rule(chain="dstnat", action="dnat", destinations=single(HOST), to=GUEST)
    others = Rule(chain="srcnat", action="masquerade", oif="upstream")
    assert list(translations([whole, others])) == [Translation(4, HOST)]


def test_a_single_port_is_filtered_by_the_kernel() -> None:
    alone = replace(PORTS, first=53, last=53)
    assert (alone.dump_filter.port, PORTS.dump_filter.port) == (53, 0)
    assert Translation(4, HOST).dump_filter.port == 0
