# SPDX-License-Identifier: LGPL-2.1-or-later
"""IPv4 addresses of the NIC that the host keeps behind the router, for programs bound to them.

A program that listens on a single public address must go on doing so, also when it starts
anew.  So the host has such an address on its end of the patch.  The router routes packets to
the address to the host, ahead of its own table of local addresses.  Its NIC keeps the address
as well: for ARP, and for the packets of networks.

Rules of IPv4 choose by the protocol, so ARP's look-up still finds a local address.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from socket import AF_INET, IPPROTO_ICMP, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP

from libvirt_natns import names
from libvirt_natns.errors import RouterError
from libvirt_natns.kernel import listening_ports, netlink, netns
from libvirt_natns.kernel.netlink import NLM_F_CREATE, NLM_F_REPLACE, Socket
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.operations.operation import ApplyContext, Operation
from libvirt_natns.upstream.router import nic_link, nic_rules, nic_snapshot
from libvirt_natns.upstream.router.nic_rules import NicRule
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

TABLE = 158
"""The routing table that leads to the host; the NIC's tables have other numbers."""

PROTOCOLS = (IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMP, IPPROTO_SCTP)
DHCP_CLIENT = 68

FIRST = netlink.pack([netlink.u32(netlink.FRA_PRIORITY, 0)])
"""The priority that the kernel leaves out of its listing."""


def choose(wanted: RouterUpstream, before: Capture, *, boot: bool) -> tuple[str, ...]:
    """Return the addresses that the host keeps: configured, or those that programs listen on.

    At a ``boot``, programs do not listen yet, and the NIC may lack an address by now.
    Raises RouterError for a configured address that the NIC does not have.
    """
    own = [address.ip for address in before.ipv4]
    if wanted.host_addresses is None:
        kept = set() if boot else _listened(wanted)
    else:
        kept = {str(address) for address in wanted.host_addresses}
        missing = kept - set(own)
        if missing and not boot:
            raise RouterError(
                f"router {wanted.name}: host_addresses has {min(missing)}, which is no address"
                f" of {wanted.nic}",
                f"choose of {', '.join(own)}, or leave it out",
            )
    chosen = tuple(ip for ip in own if ip in kept)
    if chosen and any(route.table == TABLE for route in before.routes):
        raise RouterError(
            f"router {wanted.name}: {wanted.nic} has routes in table {TABLE}, which the router"
            f" needs for {', '.join(chosen)}",
            "move these routes to another table",
        )
    return chosen


def _listened(wanted: RouterUpstream) -> set[str]:
    """Return the addresses on which programs listen on ``host_ports``, without wildcards."""
    return {
        str(address)
        for ports in wanted.host_ports
        for address, port in listening_ports.listeners(ports.proto)
        if ports.first <= port <= ports.last and not address.is_unspecified
    }


@dataclass(frozen=True, slots=True)
class RoutedToHost(Operation):
    """The rules and the route by which a router sends packets for these addresses to the host.

    On the way back they go with the namespace.
    """

    target: Target

    def describe(self) -> str:
        kept = self.target.addresses4
        return f"packets for {', '.join(kept)} go to the host" if kept else ""

    def differs(self, kernel: Kernel) -> list[str]:
        if not self.target.addresses4 or not netns.exists(self.target.namespace):
            return []
        with nic_link.session(self.target.namespace) as sock:
            if self._is_routed(sock) and self._are_first(sock):
                return []
        return [f"packets for {', '.join(self.target.addresses4)} do not go to the host"]

    def ensure(self, context: ApplyContext) -> None:
        if not self.target.addresses4:
            return
        with nic_link.session(self.target.namespace) as sock:
            link = nic_link.require(sock, self.target.namespace, names.ROUTER_HOST_LINK)
            sock.change(netlink.RTM_NEWROUTE, self._route(link.index), NLM_F_CREATE | NLM_F_REPLACE)
            if not self._are_first(sock):
                self._put_first(sock)

    def take_back(self, kernel: Kernel) -> None:
        """Leave the rules to the end of the namespace."""

    def _route(self, link: int) -> bytes:
        kind = (TABLE, netlink.RTPROT_STATIC, 0, netlink.RTN_UNICAST, 0)
        attributes = [
            (netlink.RTA_GATEWAY, self.target.host.ip.packed),
            (netlink.RTA_OIF, struct.pack("=i", link)),
        ]
        return struct.pack("=BBBBBBBBI", AF_INET, 0, 0, 0, *kind) + netlink.pack(attributes)

    def _is_routed(self, sock: Socket) -> bool:
        link = nic_link.find(sock, names.ROUTER_HOST_LINK)
        routes = nic_snapshot.routes_of(sock, link.index) if link else ()
        gateway = str(self.target.host.ip)
        return any(route.table == TABLE and route.gateway == gateway for route in routes)

    def _rules(self) -> Iterator[bytes]:
        for ip in self.target.addresses4:
            if self.target.leased:
                # The router's own DHCP client renews the lease.
                yield _rule(ip, IPPROTO_UDP, netlink.RT_TABLE_LOCAL, DHCP_CLIENT)
            for protocol in PROTOCOLS:
                yield _rule(ip, protocol, TABLE)

    def _are_first(self, sock: Socket) -> bool:
        """True if the rules come ahead of the rule for local addresses, in their order."""
        present = [(rule.table, rule.selectors) for rule in _first_rules(sock)]
        wanted = [NicRule(body.hex()) for body in self._rules()]
        return present[: len(wanted)] == [(rule.table, rule.selectors) for rule in wanted]

    def _put_first(self, sock: Socket) -> None:
        """Put the rules ahead of the rule for local addresses, which is never missing.

        A new rule comes behind all rules of its priority.
        """
        former = _first_rules(sock)
        for body in (*self._rules(), _local_rule()):
            sock.change(netlink.RTM_NEWRULE, body, NLM_F_CREATE)
        for rule in former:
            # Of equal rules, the kernel deletes the first.
            body = bytes.fromhex(rule.body) + FIRST
            nic_link.attempt(sock, netlink.RTM_DELRULE, body)


def _first_rules(sock: Socket) -> list[NicRule]:
    """Return the IPv4 rules of priority 0, in the kernel's order."""
    header = bytes([AF_INET]) + bytes(11)
    listed = (nic_rules.parse(body) for body in nic_link.dump(sock, netlink.RTM_GETRULE, header))
    return [rule for rule in listed if rule.priority == 0]


def _local_rule() -> bytes:
    kind = (netlink.RT_TABLE_LOCAL, 0, 0, netlink.FR_ACT_TO_TBL, 0)
    return struct.pack("=BBBBBBBBI", AF_INET, 0, 0, 0, *kind) + netlink.pack(
        [
            netlink.u32(netlink.FRA_PRIORITY, 0),
            (netlink.FRA_PROTOCOL, bytes([netlink.RTPROT_KERNEL])),
        ]
    )


def _rule(ip: str, protocol: int, table: int, port: int = 0) -> bytes:
    """Return the rule for packets of a protocol to an address, or to one of its ports."""
    kind = (table, 0, 0, netlink.FR_ACT_TO_TBL, 0)
    attributes = [
        (netlink.FRA_DST, IPv4Address(ip).packed),
        netlink.u32(netlink.FRA_PRIORITY, 0),
        (netlink.FRA_IP_PROTO, bytes([protocol])),
    ]
    if port:
        attributes.append((netlink.FRA_DPORT_RANGE, struct.pack("=HH", port, port)))
    return struct.pack("=BBBBBBBBI", AF_INET, 32, 0, 0, *kind) + netlink.pack(attributes)
