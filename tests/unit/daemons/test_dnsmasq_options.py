# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the user's own options have a dnsmasq listen."""

import pytest

from libvirt_natns.daemons.dnsmasq_options import ServedPort, listens_elsewhere, served_ports
from libvirt_natns.model.network import Network


def network(*options: str, taken_over: bool = True) -> Network:
    return Network("u", "a", "virbr10", dnsmasq_options=options, taken_over=taken_over)


@pytest.mark.parametrize(
    ("option", "ports"),
    [
        ('pxe-service=x86PC,"Boot",pxelinux', [("udp", 4011)]),
        ('pxe-prompt="Boot",5', [("udp", 4011)]),
        ("dhcp-range=10.0.0.1,proxy", [("udp", 4011)]),
        ("dhcp-alternate-port", [("udp", 1067)]),
        ("dhcp-alternate-port=6767,6868", [("udp", 6767)]),
        (" port = 5353", [("tcp", 5353), ("udp", 5353)]),
        ("port=0", []),
        ("port=70000", []),
        ("port=x", []),
        ("#port=5353", []),
        ("dhcp-range=10.0.0.10,10.0.0.20", []),
        ("cache-size=0\npxe-prompt=x", [("udp", 4011)]),
    ],
)
def test_served_ports(option: str, ports: list[ServedPort]) -> None:
    assert list(served_ports(network(option))) == ports


def test_each_port_once() -> None:
    options = ("pxe-service=x86PC,One", "pxe-service=x86PC,Two", "dhcp-alternate-port")
    assert served_ports(network(*options)) == (("udp", 1067), ("udp", 4011))


@pytest.mark.parametrize(
    ("option", "expected"),
    [("listen-address=10.0.0.1", True), ("interface=virbr*", True), ("log-queries", False)],
)
def test_options_that_take_addresses_of_others(option: str, expected: bool) -> None:
    assert listens_elsewhere(network(option)) is expected
    assert not listens_elsewhere(network(option, taken_over=False)), "no dnsmasq of libvirt's"
