# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's ``<network>`` as a ``LibvirtNetwork``, with our metadata in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from libvirt_natns.addresses import IPNetwork
from libvirt_natns.documents import xml_dns, xml_metadata, xml_values
from libvirt_natns.documents.xml_tree import nat_element
from libvirt_natns.documents.xml_values import Element, attribute_of, value_error
from libvirt_natns.model import bandwidth
from libvirt_natns.model.bandwidth import Bandwidth
from libvirt_natns.model.dns import Dns
from libvirt_natns.model.network import LibvirtNetwork, Network
from libvirt_natns.model.subnet import StaticRoute, Subnet
from libvirt_natns.values import INTERFACE, INTERFACE_EXPECTED

RATES = ("average", "peak", "burst")
RATE = re.compile(r"[0-9]{1,12}", re.ASCII)


def network_of(element: Element, bridge: str | None = None) -> LibvirtNetwork:
    """Return the network of a ``<network>``: a ``Network``, if the name of its bridge is known.

    ``bridge`` is the name for a bridge without one.  DocumentError for an element that is
    refused.
    """
    named = _bridge(element) or bridge
    make: Callable[..., LibvirtNetwork] = partial(LibvirtNetwork, bridge=None)
    if named is not None:
        make = partial(Network, bridge=named)
    ips = [ip for ip in element.findall("ip") if "address" in ip.attrib]
    subnets = tuple(xml_values.subnet(ip) for ip in ips)
    nat_in_xml = nat_element(element, "natns-network.rng")
    nat = None if nat_in_xml is None else xml_metadata.of_network(nat_in_xml, subnets)
    own = nat.subnets if nat else ()
    return make(
        uuid=xml_values.uuid_in(element, "uuid"),
        name=xml_values.name_of(element),
        forward_mode=_forward_mode(element),
        mtu=_mtu(element),
        domain=_domain(element),
        domain_local=attribute_of(element, "domain", "localOnly") == "yes",
        dns=_dns(element, own),
        dnsmasq_options=xml_dns.options(element),
        subnets=own or subnets,
        routes=_routes(element),
        taken_over=not own,
        nat=nat,
        bandwidth=_bandwidth(element),
    )


def _bridge(element: Element) -> str | None:
    bridge = element.find("bridge")
    name = "" if bridge is None else bridge.attrib.get("name", "")
    # libvirt replaces "virbr%d" by a free name when it defines the network.
    if bridge is None or not name or "%d" in name:
        return None
    if not INTERFACE.fullmatch(name):
        raise value_error(bridge, "name", INTERFACE_EXPECTED)
    return name


def _forward_mode(element: Element) -> str | None:
    forward = element.find("forward")
    mode = None if forward is None else forward.attrib.get("mode", "nat")
    return None if mode == "none" else mode


def _mtu(element: Element) -> int | None:
    mtu = element.find("mtu")
    if mtu is None or "size" not in mtu.attrib:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", mtu.attrib["size"]):
        raise value_error(mtu, "size", "a number of bytes")
    return int(mtu.attrib["size"])


def _domain(element: Element) -> str | None:
    domain = element.find("domain")
    name = "" if domain is None else domain.attrib.get("name", "")
    if domain is None or not name or xml_dns.DOMAIN.fullmatch(name):
        return name or None
    # An invalid name changes the meaning of dnsmasq's "domain" line.  In a network with <forward>
    # it is not ours to refuse, nor to use.
    if _forward_mode(element) is None:
        raise value_error(domain, "name", "a domain name")
    return None


def _bandwidth(element: Element) -> Bandwidth | None:
    """Return the limits of the whole network; those of a ``<portgroup>`` are libvirt's work."""
    if element.find("bandwidth") is None:
        return None
    to_guests, from_guests = (_rates(element, name) for name in ("inbound", "outbound"))
    return Bandwidth(
        bandwidth.inbound(*to_guests) if to_guests[0] else None,
        bandwidth.outbound(from_guests[0], from_guests[2]) if from_guests[0] else None,
    )


def _rates(element: Element, direction: str) -> tuple[int, int, int]:
    """Return average, peak and burst of a direction, each 0 where it is missing."""
    found = element.find(f"bandwidth/{direction}")
    texts = [found.attrib.get(name, "") if found is not None else "" for name in RATES]
    # libvirt has refused everything else in a network that it starts.
    average, peak, burst = (int(text) if RATE.fullmatch(text) else 0 for text in texts)
    return average, peak, burst


def _dns(element: Element, own: tuple[Subnet, ...]) -> Dns | None:
    if own and _forward_mode(element) is None:
        xml_dns.check_options(element)
        return xml_dns.parse(element)
    # libvirt itself translates it: not ours to judge.
    return None if attribute_of(element, "dns", "enable") == "no" else Dns()


def _routes(element: Element) -> tuple[StaticRoute, ...]:
    """Return the ``<route>``s; of several to one destination, the route of the least metric."""
    routes: dict[IPNetwork, StaticRoute] = {}
    for route in sorted(element.findall("route"), key=_metric):
        gateway = xml_values.address_in(route, "gateway", xml_values.family_of(route))
        destination = xml_values.interface(route).network
        routes.setdefault(destination, StaticRoute(destination, gateway))
    return tuple(routes.values())


def _metric(route: Element) -> int:
    metric = route.attrib.get("metric", "")
    # libvirt's own default; it takes no more than 32 bits.
    return int(metric) if re.fullmatch(r"[0-9]{1,10}", metric) else 1
