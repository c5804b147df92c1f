# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one network adds to the host's rules: the scripts by which it comes and goes."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import host_accepts, host_parts, nft_statements
from libvirt_natns.firewall.host_parts import HostPart
from libvirt_natns.firewall.host_policy import HostForward, HostPolicy, Private, Provider, Transit

TRANSIT = Transit("natns-host", IPv4Network("198.19.252.0/22"))
INSIDE = IPv4Address("198.19.252.7")
SSH = HostForward("tcp", None, 2222, 2222, INSIDE, TRANSIT.bridge)
ALLOWED = replace(SSH, first=80, last=80, sources=(IPv4Network("192.168.0.0/24"),))
ON_HOST = HostPolicy(
    transits=(TRANSIT,), private=(Private("virbr1"),), bridge_nf=True, forwards=(SSH,)
)
ON_BRIDGE = HostPolicy(
    private=(Private("virbr1"),),
    provider=(Provider("br0", IPv4Address("192.168.0.100")),),
    bridge_nf=True,
)
PARENTS = ["ip filter"]


def test_a_network_without_anything_is_no_part() -> None:
    assert host_parts.make(HostPolicy()) == HostPart()
    assert host_parts.dump(HostPart()) == ""
    assert host_parts.load("") == HostPart()


def test_parts_are_kept_as_text() -> None:
    part = host_parts.make(ON_HOST)
    assert host_parts.load(host_parts.dump(part)) == part


@pytest.mark.parametrize("text", ["x", "[]", '{"another": 1}'])
def test_a_damaged_part_has_all_rules_compared(text: str) -> None:
    """The host takes this error for a part that does not suffice, and writes all parts anew."""
    with pytest.raises(FirewallError, match="is damaged"):
        host_parts.load(text)


def test_elements_come_and_go() -> None:
    part = host_parts.make(ON_HOST)
    assert (host_parts.script(HostPart(), part, []) or "").splitlines() == [
        "add element inet natns local_ports { tcp . 2222 : 198.19.252.7 . 2222 }",
        'add element inet natns zones { "virbr1" : 28276 }',
        'add element inet natns kept { "virbr1" }',
    ]
    gone = host_parts.script(part, HostPart(), [])
    assert gone == (host_parts.script(HostPart(), part, []) or "").replace("add el", "delete el")
    assert host_parts.script(part, part, []) == ""


def test_a_port_that_leads_elsewhere_is_first_taken_out() -> None:
    old = host_parts.make(ON_HOST)
    new = host_parts.make(replace(ON_HOST, forwards=(replace(SSH, target=INSIDE + 1),)))
    verbs = [line.split()[0] for line in (host_parts.script(old, new, []) or "").splitlines()]
    assert verbs == ["delete", "add"]


def test_foreign_tables_get_rules_that_cannot_be_taken_out_alone() -> None:
    part = host_parts.make(ON_BRIDGE)
    lines = (host_parts.script(HostPart(), part, PARENTS) or "").splitlines()
    assert len([line for line in lines if line.startswith("add rule ip filter NATNS-")]) == 3
    assert host_parts.script(part, HostPart(), PARENTS) is None
    assert host_parts.script(part, HostPart(), []) is not None


def test_rules_for_certain_clients_do_not_come_alone() -> None:
    limited = host_parts.make(replace(ON_HOST, forwards=(ALLOWED,)))
    assert limited.rest
    assert host_parts.script(HostPart(), limited, []) is None


def test_what_networks_have_in_common_is_counted() -> None:
    counts = host_parts.make(ON_HOST).counts()
    assert counts["transit natns-host"] == counts["published natns-host"] == 1
    assert counts["zones"] == counts["kept"] == 1
    assert not host_parts.make(ON_BRIDGE).counts()["transit natns-host"]
    assert host_parts.make(ON_BRIDGE).counts()["accepts"] == 3


def test_networks_on_one_bridge_share_what_lets_dhcp_through() -> None:
    first = host_parts.make(replace(ON_BRIDGE, dhcp=("br0",)))
    assert first.dhcp == "br0"
    assert first.counts()["dhcp br0"] == 1
    # A rule for each would be there twice, and could not be told apart.
    assert first.accepts == host_parts.make(ON_BRIDGE).accepts
    told = [
        nft_statements.statement(rule)
        for rule in host_accepts.accepts(replace(ON_BRIDGE, dhcp=("br0",)))
    ]
    assert len(told) == len(first.accepts) + 4
    assert sum("255.255.255.255" in rule for rule in told) == 2
    assert host_parts.load('{"transit": ""}') == HostPart(), "of an earlier version"
