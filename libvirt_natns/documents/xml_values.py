# SPDX-License-Identifier: LGPL-2.1-or-later
"""Values of XML elements as types, and the errors about them.

The parts that libvirt's ``<ip>`` and ours share are read here.  Elements are
lxml's, seen through the protocols below, which declare all that is used of them.
Every error is a DocumentError of one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Address
from typing import Protocol

from libvirt_natns.addresses import (
    Address,
    AddressRange,
    Family,
    Interface,
    IPNetwork,
    on_link,
    parsed,
)
from libvirt_natns.errors import DocumentError
from libvirt_natns.model.subnet import DhcpHost, Subnet
from libvirt_natns.names import XML_NAMESPACE
from libvirt_natns.values import shown

NS = f"{{{XML_NAMESPACE}}}"

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
MAC = re.compile(r"[0-9A-Fa-f]{1,2}(?::[0-9A-Fa-f]{1,2}){5}")
DUID = re.compile(r"[0-9A-Fa-f]{1,2}(?::[0-9A-Fa-f]{1,2})+")
UUID = re.compile("-?".join(f"([0-9a-fA-F]{{{length}}})" for length in (8, 4, 4, 4, 12)))
PLAIN_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,252}")


class Tree(Protocol):
    """A parsed document."""

    def getroot(self) -> Element: ...


class Element(Protocol):
    """An element of a parsed document."""

    @property
    def tag(self) -> str: ...
    @property
    def attrib(self) -> Mapping[str, str]: ...
    @property
    def text(self) -> str | None: ...
    @property
    def tail(self) -> str | None: ...
    @property
    def sourceline(self) -> int: ...
    def __iter__(self) -> Iterator[Element]: ...
    def find(self, path: str) -> Element | None: ...
    def findall(self, path: str) -> list[Element]: ...
    def findtext(self, path: str) -> str | None: ...
    def iter(self, tag: str | None = None) -> Iterator[Element]: ...
    def xpath(self, path: str) -> object: ...
    def getroottree(self) -> Tree: ...


class MutableElement(Element, Protocol):
    """An element of a document that is being edited."""

    def __len__(self) -> int: ...
    def append(self, element: MutableElement) -> None: ...
    def remove(self, element: Element) -> None: ...
    def makeelement(self, tag: str, attributes: dict[str, str]) -> MutableElement: ...


# Words for messages


def local_name(tag: object) -> str:
    """Return a tag without its XML namespace; "" for comments and the like."""
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def error(element: Element, fact: str, expected: str) -> DocumentError:
    """Return an error about ``element``: its place, the fact, and the expected form."""
    prefix = "natns:" if element.tag.startswith(NS) else ""
    name = f"<{prefix}{local_name(element.tag)}>"
    return DocumentError(f"{place(element)}: {name} {fact}", f"expected {expected}")


def value_error(element: Element, attribute: str, expected: str) -> DocumentError:
    """Return an error about the value of an attribute."""
    return error(element, f"has {attribute}={shown(element.attrib.get(attribute))}", expected)


def place(element: Element) -> str:
    """Return the place of an element: its network or domain, and the line."""
    root = element.getroottree().getroot()
    owner = root.find("network") if root.tag == "hookData" else root
    name = "" if owner is None else f"{owner.tag} {shown(text(owner, 'name'))}, "
    return f"{name}line {element.sourceline}"


# Values


def text(element: Element, path: str) -> str:
    """Return all the text at ``path``, as libvirt's own XPath sees it; "" for no text."""
    return str(element.xpath(f"string({path})"))


def attribute_of(element: Element, path: str, attribute: str) -> str | None:
    """Return an attribute of the child at ``path``; None without child or attribute."""
    child = element.find(path)
    return None if child is None else child.attrib.get(attribute)


def name_of(element: Element) -> str:
    """Return the name of a network or domain; DocumentError for control characters in it."""
    name = text(element, "name")
    if not name or CONTROL.search(name):
        raise error(element, f"has the name {shown(name)}", "a name without control characters")
    return name


def uuid_in(element: Element, path: str) -> str:
    """Return the uuid at ``path``; "" where there is none, DocumentError for another text."""
    value = text(element, path).strip()
    match = UUID.fullmatch(value)
    if value and not match:
        expected = "a uuid such as 4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
        raise error(element, f"has the uuid {shown(value)}", expected)
    return "-".join(match.groups()).lower() if match else ""


EXAMPLES = {
    None: "an IPv4 or IPv6 address such as 10.0.0.1 or fd00::1",
    4: "an IPv4 address such as 10.0.0.1",
    6: "an IPv6 address such as fd00::1",
}


def address_in(element: Element, attribute: str, family: Family | None = None) -> Address:
    """Return the address in an attribute, of that family; DocumentError for another text."""
    value = element.attrib.get(attribute, "")
    with suppress(ValueError):
        address = parsed(value)
        # Python takes an IPv6 address with a zone for one.
        if family in (None, address.version) and "%" not in value:
            return address
    raise value_error(element, attribute, EXAMPLES[family])


def is_host_in(address: Address, network: IPNetwork) -> bool:
    """True if a host in ``network`` may have ``address``."""
    # In IPv6 the first address is all routers', and nothing is broadcast.
    taken = {network.network_address}
    if isinstance(network, IPv4Network):
        taken.add(network.broadcast_address)
    return address in network and address not in taken


def is_special(address: Address) -> bool:
    """True if no host on another link can be reached by ``address``."""
    if address.is_multicast or address.is_loopback or address.is_reserved:
        return True
    if isinstance(address, IPv6Address):
        return address.is_link_local
    return address in IPv4Network("0.0.0.0/8")


def family_of(element: Element) -> Family:
    """Return the family of libvirt's ``<ip>`` and ``<route>``, which is IPv4 by default."""
    return 6 if element.attrib.get("family") == "ipv6" else 4


def mac(value: str | None) -> str | None:
    """Return a MAC address in the spelling used inside; None for another text."""
    if not value or not MAC.fullmatch(value):
        return None
    return ":".join(f"{int(octet, 16):02x}" for octet in value.split(":"))


def interface(element: Element) -> Interface:
    """Return the attribute ``address`` with the prefix that libvirt gives it."""
    family = family_of(element)
    address = address_in(element, "address", family)
    return on_link(address, _prefix_length(element, address))


def _prefix_length(element: Element, address: Address) -> int:
    """Return the length by libvirt's virSocketAddrGetIPPrefix: prefix, netmask or class."""
    prefix, longest = element.attrib.get("prefix", "0"), address.max_prefixlen
    if not re.fullmatch(r"[0-9]{1,3}", prefix) or int(prefix) > longest:
        raise value_error(element, "prefix", f"a prefix length from 0 to {longest}")
    if int(prefix):
        return int(prefix)
    if isinstance(address, IPv6Address):
        return 64 if int(address) else 0
    return _netmask_length(element) if "netmask" in element.attrib else _class_length(element)


def _class_length(element: Element) -> int:
    address = address_in(element, "address", 4)
    if not int(address):
        return 0
    first = int(address) >> 24
    for limit, length in ((128, 8), (192, 16), (224, 24)):
        if first < limit:
            return length
    raise value_error(element, "address", "an address of class A, B or C, or a prefix")


def _netmask_length(element: Element) -> int:
    mask = int(address_in(element, "netmask", 4))
    length = mask.bit_count()
    if mask != (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF:
        raise value_error(element, "netmask", "a netmask such as 255.255.255.0")
    return length


def subnet(element: Element, ns: str = "") -> Subnet:
    """Return the subnet of an ``<ip>``: libvirt's, or ours when ``ns`` is our namespace."""
    dhcp = element.find(f"{ns}dhcp")
    inside = [] if dhcp is None else list(dhcp)
    hosts = [child for child in inside if child.tag == f"{ns}host"]
    family = family_of(element)
    return Subnet(
        interface=interface(element),
        ranges=tuple(_range(child, family) for child in inside if child.tag == f"{ns}range"),
        # libvirt knows hosts without an address.
        hosts=tuple(_host(host, family) for host in hosts if "ip" in host.attrib),
    )


def _range(element: Element, family: Family) -> AddressRange:
    first, last = (address_in(element, end, family) for end in ("start", "end"))
    return AddressRange(first, last)


def _host(element: Element, family: Family) -> DhcpHost:
    name, duid = element.attrib.get("name", ""), element.attrib.get("id", "")
    return DhcpHost(
        ip=address_in(element, "ip", family),
        mac=mac(element.attrib.get("mac")),
        name=name if PLAIN_HOST.fullmatch(name) else None,
        id=duid if DUID.fullmatch(duid) else None,
    )
