# SPDX-License-Identifier: LGPL-2.1-or-later
"""The target of a router: all that was decided about it before anything was changed."""

from dataclasses import asdict, dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)
from typing import Any, get_args

from libvirt_natns import names
from libvirt_natns.firewall.rule import Transport
from libvirt_natns.upstream.router.nic_snapshot import known_fields
from libvirt_natns.upstream.router.nic_sources import Sources

LATER = ("sources", "client_id", "addresses4")
"""Fields that files of version 0.1.0 do not have."""


@dataclass(frozen=True, slots=True)
class Target:
    """A router that is to be.

    ``ports`` go to the host: protocol, first, last.  ``addresses6`` are the host's own.
    ``servers`` are the resolvers that resolv.conf is to name; none where the file can stay
    as it is.  ``leased``: the NIC's IPv4 address came by DHCP.  ``sources`` are the addresses by
    which IPv4 packets leave, see ``nic_sources``.  ``client_id`` identifies the NIC to the DHCP
    server, in hexadecimal digits; "" for the NIC's MAC address.  ``addresses4`` are IPv4
    addresses of the NIC that the host keeps, too (``host_addresses``).

    ``subnet6`` is the NIC's own subnet, of which networks can have parts.  ``transit6`` is
    the private prefix between router and networks.  ``own6`` is the address that the router
    takes besides those of the NIC.  All three are empty where networks get no IPv6.
    """

    name: str
    nic: str
    backend: str
    host_subnet: str
    ports: tuple[tuple[Transport, int, int], ...]
    addresses6: tuple[str, ...]
    transit: str
    servers: tuple[str, ...] = ()
    leased: bool = False
    sources: Sources = ()
    client_id: str = ""
    addresses4: tuple[str, ...] = ()
    transit6: str = ""
    subnet6: str = ""
    own6: str = ""

    @property
    def namespace(self) -> str:
        return names.router_namespace(self.name)

    @property
    def link(self) -> str:
        """The host's end of the patch between host and router."""
        return names.router_patch(self.name)

    @property
    def host(self) -> IPv4Interface:
        """The host's private address: the second of ``host_subnet``."""
        subnet = IPv4Network(self.host_subnet)
        return IPv4Interface((subnet.network_address + 2, subnet.prefixlen))

    @property
    def gateway(self) -> IPv4Interface:
        """The router's address towards the host: the first of ``host_subnet``."""
        subnet = IPv4Network(self.host_subnet)
        return IPv4Interface((subnet.network_address + 1, subnet.prefixlen))

    @property
    def transit_gateway(self) -> IPv4Address:
        """The router's address towards networks."""
        return IPv4Network(self.transit).network_address + 1

    def as_object(self) -> dict[str, Any]:
        """Return a target for a JSON file, which earlier versions read, too."""
        made = asdict(self)
        return {key: value for key, value in made.items() if value or key not in LATER}

    @classmethod
    def from_object(cls, data: dict[str, Any]) -> "Target":
        """Return a target from an object of JSON, also of another version.

        Raises TypeError, KeyError, ValueError or AttributeError for any other content.
        """
        fields = known_fields(cls, data)
        fields["ports"] = tuple(_port(*port) for port in fields["ports"])
        fields["addresses6"] = tuple(map(str, map(IPv6Address, fields["addresses6"])))
        fields["servers"] = tuple(map(str, map(ip_address, fields["servers"])))
        fields["addresses4"] = tuple(map(str, map(IPv4Address, fields.get("addresses4", ()))))
        fields["sources"] = tuple(_source(*pair) for pair in fields.get("sources", ()))
        target = cls(**fields)
        # All other addresses are made of these subnets.
        IPv4Network(target.host_subnet), IPv4Network(target.transit)
        for prefix in filter(None, (target.transit6, target.subnet6)):
            IPv6Network(prefix)
        return target


def _port(protocol: Transport, first: int, last: int) -> tuple[Transport, int, int]:
    if protocol not in get_args(Transport) or not 0 < int(first) <= int(last) < 65536:
        raise ValueError(f"{protocol}/{first}-{last} is not a port")
    return protocol, int(first), int(last)


def _source(destination: str, source: str) -> tuple[str, str]:
    return str(IPv4Network(destination)), str(IPv4Address(source)) if source else ""
