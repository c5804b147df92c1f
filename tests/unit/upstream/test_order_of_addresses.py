# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order of a NIC's addresses, by which the kernel chooses the source of packets."""

import struct
from dataclasses import replace
from socket import AF_INET6

from libvirt_natns.kernel import netlink
from libvirt_natns.upstream.router import nic_addresses, nic_completion, recover, restore_script
from libvirt_natns.upstream.router.nic_routes import NicRoute
from libvirt_natns.upstream.router.nic_snapshot import Capture

NEW, OLD, OTHER = "2001:db8::3", "2001:db8::2", "2001:db8::9"
DEFAULT = NicRoute(
    struct.pack("=BBBBBBBBI", AF_INET6, 0, 0, 0, netlink.RT_TABLE_MAIN, 3, 0, 1, 0).hex()
)


def nic(*ips: str) -> Capture:
    addresses = tuple(nic_addresses.single(ip, 64) for ip in ips)
    return Capture("ens3", 2, "52:54:00:00:00:01", 1500, 1, 1000, 0, "", addresses=addresses)


def ips(capture: Capture) -> list[str]:
    return [address.ip for address in capture.addresses]


def test_the_oldest_is_made_first() -> None:
    listed = nic(NEW, OLD).addresses
    assert [each.ip for each in nic_addresses.oldest_first(listed)] == [OLD, NEW]
    script = restore_script.script("natns-router-wan", "natns-wan", nic(NEW, OLD))
    assert script.index(f"replace {OLD}/64") < script.index(f"replace {NEW}/64")


def test_a_completed_nic_has_the_order_that_was_kept() -> None:
    kept = replace(nic(NEW, OLD), routes=(DEFAULT,))
    for present in ((OLD,), (NEW,), (OLD, NEW)):
        assert ips(nic_completion.completed(nic(*present), kept)) == [NEW, OLD], present


def test_addresses_of_the_host_come_before_the_routers_own() -> None:
    """Without its journal, the router's own address stays on the NIC, and is no source."""
    before = recover.as_before(nic(OTHER), (NEW, OLD))
    assert ips(before) == [NEW, OLD, OTHER]
