# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is read of the kernel's messages."""

import socket
import struct
from ipaddress import ip_interface, ip_network

from libvirt_natns.kernel import netlink
from libvirt_natns.service import netlink_messages as n


def attribute(kind: int, value: bytes) -> bytes:
    return netlink.pack([(kind, value)])


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def link(name: str, *, up: bool = True, master: int = 0, mtu: int = 1500, index: int = 7) -> bytes:
    body = netlink.LINK_HEADER.pack(socket.AF_UNSPEC, 1, index, netlink.IFF_UP if up else 0, 0)
    body += attribute(netlink.IFLA_IFNAME, name.encode() + b"\0") + number(netlink.IFLA_MTU, mtu)
    return body + (number(netlink.IFLA_MASTER, master) if master else b"")


def bridge_port(hairpin: int) -> bytes:
    mode = attribute(netlink.IFLA_BRPORT_MODE, bytes([hairpin]))
    body = netlink.LINK_HEADER.pack(socket.AF_BRIDGE, 1, 7, netlink.IFF_UP, 0)
    return body + attribute(netlink.IFLA_PROTINFO | 0x8000, mode)


def test_a_link_and_what_becomes_of_it() -> None:
    body = link("natin-1", master=3)
    assert n.link_index(body) == 7
    known = n.link_state(netlink.RTM_NEWLINK, body, None)
    assert known == n.LinkState("natin-1", True, 3, 1500)
    assert n.link_state(netlink.RTM_NEWLINK, link("natin-1", master=3), known) == known
    for changed in link("natin-1"), link("natin-1", up=False, master=3), link("x", master=3):
        assert n.link_state(netlink.RTM_NEWLINK, changed, known) != known
    assert n.link_state(netlink.RTM_DELLINK, body, known) is None


def test_what_a_bridge_tells_of_its_port() -> None:
    known = n.LinkState("natup-1", True, 3, 1500)
    hairpin = n.link_state(netlink.RTM_NEWLINK, bridge_port(1), known)
    assert hairpin == known._replace(hairpin=True)
    # Messages about the link itself do not say.
    assert n.link_state(netlink.RTM_NEWLINK, link("natup-1", master=3), hairpin) == hairpin
    # It leaves the bridge, and goes on.
    assert n.link_state(netlink.RTM_DELLINK, bridge_port(0), hairpin) == hairpin


def test_forwarding_that_is_switched() -> None:
    def netconf(*attributes: bytes) -> bytes:
        return bytes([socket.AF_INET, 0, 0, 0]) + b"".join(attributes)

    index = number(n.NETCONFA_IFINDEX, 4)
    off, on = number(n.NETCONFA_FORWARDING, 0), number(n.NETCONFA_FORWARDING, 1)
    every = attribute(n.NETCONFA_IFINDEX, struct.pack("=i", -1))
    assert n.alters_forwarding(netconf(index, off))
    assert not n.alters_forwarding(netconf(index, on))
    assert n.alters_forwarding(netconf(every, off))
    assert n.alters_forwarding(netconf(every, on))
    # A new link.
    assert not n.alters_forwarding(netconf(index, off, number(3, 1)))


def address(text: str) -> bytes:
    found = ip_interface(text)
    family = socket.AF_INET if found.version == 4 else socket.AF_INET6
    body = n.IFADDR.pack(family, found.network.prefixlen, 0, 0, 7)
    return body + attribute(netlink.IFA_ADDRESS, found.packed)


def route(text: str, protocol: int = 3) -> bytes:
    to = ip_network(text)
    family = socket.AF_INET if to.version == 4 else socket.AF_INET6
    body = n.RTMSG.pack(family, to.prefixlen, 0, 0, 254, protocol, 0, 1, 0)
    told = attribute(netlink.RTA_DST, to.network_address.packed) if to.prefixlen else b""
    return body + told


def test_what_the_kernel_does_by_itself_in_ipv6() -> None:
    come, gone = netlink.RTM_NEWADDR, netlink.RTM_DELADDR
    assert n.kernels_own(come, address("fe80::1/64"))
    assert n.kernels_own(gone, address("febf::1/64"))
    for text in ("2001:db8::1/64", "fd00::1/64", "fec0::1/64", "169.254.0.1/16", "10.0.0.1/24"):
        assert not n.kernels_own(come, address(text)), text
    assert n.kernels_own(netlink.RTM_NEWROUTE, route("fe80::/64"))
    assert n.kernels_own(netlink.RTM_NEWROUTE, route("ff00::/8"))
    assert n.kernels_own(netlink.RTM_DELROUTE, route("::/0", netlink.RTPROT_RA))
    for text in ("::/0", "2001:db8::/64", "0.0.0.0/0", "254.0.0.0/8"):
        assert not n.kernels_own(netlink.RTM_DELROUTE, route(text)), text
    assert not n.kernels_own(netlink.RTM_NEWLINK, link("virbr10"))


def test_changes_of_rules_that_do_not_concern_us() -> None:
    def table(name: str) -> bytes:
        return bytes(4) + attribute(1, name.encode() + b"\0")

    rule, element, generation = 0xA06, 0xA0C, 0xA0F
    assert n.alters_rules(rule, table("filter"))
    assert n.alters_rules(rule, table("natns"))
    assert not n.alters_rules(rule, table("libvirt_network"))
    # libvirt's jump in a chain that it shares.
    shared = table("filter") + attribute(2, b"FORWARD\0") + attribute(4, b"LIBVIRT_FWO\0")
    assert n.alters_rules(rule, shared)
    assert not n.alters_rules(rule, shared.replace(b"FORWARD\0", b"LIBVIRT\0"))
    assert not n.alters_rules(element, table("f2b"))
    assert not n.alters_rules(generation, bytes(4))


def test_a_way_out_that_comes_or_goes_alters_routing() -> None:
    for kind in (netlink.RTM_NEWROUTE, netlink.RTM_DELROUTE):
        for text in ("0.0.0.0/0", "128.0.0.0/1", "::/0", "8000::/1", "2000::/3"):
            assert n.alters_routing(kind, route(text)), text
        # Of a network or a guest: thousands may come and go.
        for text in ("10.0.0.0/8", "192.0.2.1/32", "fd00::/64", "fe80::/10"):
            assert not n.alters_routing(kind, route(text)), text
    for kind in (netlink.RTM_NEWRULE, netlink.RTM_DELRULE):
        assert n.alters_routing(kind, bytes(12))
    assert not n.alters_routing(netlink.RTM_NEWLINK, link("virbr10"))


def test_links_that_a_new_route_leads_over() -> None:
    split = route("10.50.0.0/16")
    hop = netlink.ROUTE_HOP.pack(netlink.ROUTE_HOP.size, 6)
    several = attribute(netlink.RTA_MULTIPATH, hop + netlink.ROUTE_HOP.pack(8, 9))
    assert n.led_over(netlink.RTM_NEWROUTE, split + number(netlink.RTA_OIF, 5)) == [5]
    assert n.led_over(netlink.RTM_NEWROUTE, split + several) == [6, 9]
    assert n.led_over(netlink.RTM_NEWROUTE, split) == []
    assert n.led_over(netlink.RTM_DELROUTE, split + number(netlink.RTA_OIF, 5)) == []
    assert n.led_over(netlink.RTM_NEWROUTE, route("::/1") + number(netlink.RTA_OIF, 5)) == []
    local = split[:4] + bytes([netlink.RT_TABLE_LOCAL]) + split[5:]
    assert n.led_over(netlink.RTM_NEWROUTE, local + number(netlink.RTA_OIF, 5)) == []
