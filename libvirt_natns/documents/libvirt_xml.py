# SPDX-License-Identifier: LGPL-2.1-or-later
"""From libvirt's XML to the model: the only module that knows lxml.

Three documents are read: what libvirt hands to a network hook, a network, and a
domain.  libvirt validated its own part of them, so what is unknown there is
ignored.  Our part, the
``<natns:nat>`` element in ``<metadata>``, is a user's own text: it must satisfy
the RELAX NG schema in xml/ and what ``metadata`` checks on top of it.

No document can make the parser read another file or grow in memory: document
types, and with them entities, are refused before libxml2 sees them.  What libxml2
keeps of documents that were read is bounded by ``dictionary``.

Every error is a DocumentError of one line that says where, what, and what was
expected instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import cast

from lxml import etree

from libvirt_natns import names
from libvirt_natns.addresses import IPNetwork
from libvirt_natns.documents import xml_dns, xml_metadata, xml_schema_errors, xml_values
from libvirt_natns.documents.xml_dictionary import bounded
from libvirt_natns.documents.xml_values import (
    CONTROL,
    NS,
    Element,
    MutableElement,
    attribute_of,
    error,
    text,
    value_error,
)
from libvirt_natns.errors import DocumentError
from libvirt_natns.model.dns import Dns
from libvirt_natns.model.metadata import NatMetadata
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.model.subnet import StaticRoute, Subnet
from libvirt_natns.records import dataclass, replace
from libvirt_natns.values import INTERFACE, INTERFACE_EXPECTED, alternatives, shown

MAX_DOCUMENT = 8 * 1024 * 1024
"""Largest document that is read, in bytes; libvirt's own messages end at 4 MiB."""

MAX_METADATA = 256 * 1024
"""Largest ``<natns:nat>`` element, in bytes: room for some 3000 fixed addresses."""

NIC_TYPES = {"network", "bridge"}
"""The types of a guest's ``<interface>`` that can lead into a network of libvirt's."""

# What may stand before the root element.  Possessive, so that no text makes it
# backtrack.
PROLOGUE = re.compile(r"\ufeff?(?:\s|<\?.*?\?>|<!--.*?-->)*+", re.DOTALL)
ENCODING = re.compile(r"\ufeff?<\?xml\s[^>]*?encoding\s*=\s*[\"']([^\"'>]*)")

UUID = re.compile("-?".join(f"([0-9a-fA-F]{{{length}}})" for length in (8, 4, 4, 4, 12)))


@dataclass(frozen=True, slots=True)
class NetworkPort:
    """A guest's NIC in a network: the hook's ``<networkport>``.

    What libvirt left out is "", or None for the bridge.
    """

    owner_name: str
    owner_uuid: str
    mac: str
    bridge: str | None = None


@dataclass(frozen=True, slots=True)
class HookData:
    """What libvirt hands to a network hook on its standard input."""

    network: Network
    port: NetworkPort | None = None


@bounded
def parse_hook_data(data: bytes) -> HookData:
    """The hook's ``<hookData>``; DocumentError for anything that is not acceptable."""
    root = _parse(data, ("hookData",))
    port = root.find("networkport")
    return HookData(
        network=_network(_network_element(root)),
        port=None if port is None else _network_port(port),
    )


def parse_network(data: bytes, where: str = "") -> Network:
    """A ``<network>`` as ``virsh net-dumpxml`` prints it, or one within ``<hookData>``.

    ``where`` stands before every message, a file's name for instance.  A network
    that libvirt has not seen yet may lack its uuid (then "") and its bridge (then
    None).  DocumentError for anything that is not acceptable.
    """
    with _named(where):
        return _parsed_network(data)


@lru_cache(maxsize=16)
@bounded
def _parsed_network(data: bytes) -> Network:
    """The same; several steps of one event ask for one and the same document."""
    return _network(_network_element(_parse(data, ("network", "hookData"))))


@bounded
def parse_domain(data: bytes, where: str = "") -> Domain:
    """A ``<domain>`` as the qemu and lxc hooks get it and ``virsh dumpxml`` prints it.

    ``where`` stands before every message.  DocumentError for anything that is not
    acceptable in the metadata: whoever must not refuse a guest for that looks at
    ``parse_domain_nics`` first.
    """
    with _named(where):
        root = _parse(data, ("domain",))
        guest = _guest(root)
        nat = _nat_element(root, "natns-domain.rng")
        if nat is None:
            return guest
        # libvirt takes control characters there; lists and rule sets do not.
        _name(root)
        macs = [nic.mac for nic in guest.nics if nic.mac]
        return replace(guest, nat=xml_metadata.of_domain(nat, macs))


@bounded
def parse_domain_nics(data: bytes) -> Domain:
    """The same without its metadata, whatever that says: ``nat`` is None.

    DocumentError only for what libvirt never hands out: no ``<domain>`` at all, or
    one with a malformed uuid.
    """
    return _guest(_parse(data, ("domain",)))


@dataclass(frozen=True, slots=True)
class Edited:
    """A domain with another ``<natns:nat>``: all of it, and the element alone.

    ``element`` has no namespace, which libvirt adds itself; None where the domain
    has none any more.
    """

    document: bytes
    element: str | None


@bounded
def edit_domain(data: bytes, change: Callable[[MutableElement], None]) -> Edited:
    """A domain whose ``<natns:nat>`` was changed; it is made where it is missing.

    Comments and all other metadata stay.  An element that has nothing left is
    removed.  DocumentError for two of them.
    """
    root = cast("etree._Element", _parse(data, ("domain",), keep_comments=True))
    holder = root.find("metadata")
    holder = etree.SubElement(root, "metadata") if holder is None else holder
    found = holder.findall(f"{NS}nat")
    if len(found) > 1:
        raise error(cast("Element", found[1]), "stands there twice", "one at most")
    nat = found[0] if found else etree.SubElement(holder, f"{NS}nat", nsmap={"natns": NS[1:-1]})
    change(cast("MutableElement", nat))
    if len(nat) or nat.attrib:
        return Edited(_octets(root), _bare(nat))
    holder.remove(nat)
    return Edited(_octets(root), None)


@bounded
def nat_text(data: bytes) -> str | None:
    """A domain's ``<natns:nat>`` as ``Edited.element`` has it."""
    nat = cast("etree._Element", _parse(data, ("domain",), keep_comments=True)).find(
        f"metadata/{NS}nat"
    )
    return None if nat is None else _bare(nat)


def _octets(root: etree._Element) -> bytes:
    """A document as it is read: in UTF-8, for names and comments have no other spelling."""
    return bytes(etree.tostring(root, encoding="utf-8", xml_declaration=False))


def _bare(nat: etree._Element) -> str:
    """An element's text without its namespace."""
    copy = deepcopy(nat)
    for each in copy.iter():
        if isinstance(each.tag, str):
            each.tag = each.tag.removeprefix(NS)
    etree.cleanup_namespaces(copy)
    return cast("str", etree.tostring(copy, with_tail=False, encoding="unicode"))


@bounded
def is_container(data: bytes) -> bool:
    """Whether a domain is LXC's."""
    return _parse(data, ("domain",)).attrib.get("type") == "lxc"


@bounded
def with_nic(data: bytes, nic: Nic) -> bytes:
    """A ``<domain>`` with one more NIC, in a network."""
    root = cast("etree._Element", _parse(data, ("domain",)))
    devices = root.find("devices")
    devices = etree.SubElement(root, "devices") if devices is None else devices
    interface = etree.SubElement(devices, "interface", {"type": "network"})
    etree.SubElement(interface, "mac", {"address": nic.mac})
    etree.SubElement(interface, "source", {"network": nic.network or ""})
    return _octets(root)


@bounded
def without_nic(data: bytes, nic: Nic) -> bytes:
    """A ``<domain>`` without one of its NICs in a network."""
    root = cast("etree._Element", _parse(data, ("domain",)))
    for devices in root.findall("devices"):
        for interface in devices.findall("interface"):
            found = _nic(cast("Element", interface))
            if (found.mac, found.network) == (nic.mac, nic.network):
                devices.remove(interface)
    return _octets(root)


# The document as a whole


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the document's name before the messages."""
    try:
        yield
    except DocumentError as failure:
        if not where:
            raise
        raise DocumentError(f"{where}: {failure.fact}", failure.remedy) from failure


def _parse(data: bytes, roots: tuple[str, ...], *, keep_comments: bool = False) -> Element:
    """The root element of ``data``, which must be one of ``roots``."""
    _check_text(data)
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        load_dtd=False,
        no_network=True,
        huge_tree=False,
        remove_comments=not keep_comments,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as failure:
        reason = failure.msg or "it is empty"
        raise DocumentError("the document is not well-formed XML", reason) from failure
    except etree.LxmlError as failure:
        raise DocumentError("the document is not XML", str(failure)) from failure
    if root.getroottree().docinfo.doctype:
        raise _doctype_error()
    if root.tag not in roots:
        wanted = alternatives([f"<{name}>" for name in roots])
        raise DocumentError(f"the document begins with {shown(root.tag)}", f"expected {wanted}")
    return cast("Element", root)


def _check_text(data: bytes) -> None:
    """Refuse what the parser should not even see."""
    if len(data) > MAX_DOCUMENT:
        raise DocumentError(
            f"the document has {len(data)} bytes", f"at most {MAX_DOCUMENT} are read"
        )
    try:
        content = data.decode()
    except UnicodeDecodeError as failure:
        fact = f"the document is not UTF-8 at byte {failure.start}"
        raise DocumentError(fact, "save it as UTF-8") from None
    encoding = ENCODING.match(content)
    if encoding and encoding[1].lower() not in ("utf-8", "us-ascii"):
        raise DocumentError(f"the document has encoding={shown(encoding[1])}", "save it as UTF-8")
    prologue = PROLOGUE.match(content)
    if prologue and content.startswith("<!DOCTYPE", prologue.end()):
        raise _doctype_error()


def _doctype_error() -> DocumentError:
    return DocumentError("the document has a <!DOCTYPE>", "remove it, and the entities it defines")


def _network_element(root: Element) -> Element:
    network = root if root.tag == "network" else root.find("network")
    if network is None:
        raise error(root, "has no <network>", "one")
    return network


# libvirt's part


def _network(element: Element) -> Network:
    ips = [each for each in element.findall("ip") if "address" in each.attrib]
    subnets = tuple(xml_values.subnet(ip) for ip in ips)
    nat = _network_metadata(element, subnets)
    own = nat.subnets if nat else ()
    return Network(
        uuid=_uuid(element, "uuid"),
        name=_name(element),
        bridge=_bridge(element),
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
    )


def _network_port(element: Element) -> NetworkPort:
    return NetworkPort(
        owner_name=text(element, "owner/name"),
        owner_uuid=_uuid(element, "owner/uuid"),
        mac=xml_values.mac(attribute_of(element, "mac", "address")) or "",
        bridge=attribute_of(element, "plug", "bridge"),
    )


def _guest(element: Element) -> Domain:
    interfaces = element.findall("devices/interface")
    return Domain(
        uuid=_uuid(element, "uuid"),
        name=text(element, "name"),
        nics=tuple(_nic(each) for each in interfaces if each.attrib.get("type") in NIC_TYPES),
    )


def _nic(element: Element) -> Nic:
    bridge = attribute_of(element, "source", "bridge") or ""
    return Nic(
        # A domain that libvirt has not seen yet may leave the MAC to it.
        mac=xml_values.mac(attribute_of(element, "mac", "address")) or "",
        network=attribute_of(element, "source", "network") or None,
        # No network of ours has a bridge of another form.
        bridge=bridge if INTERFACE.fullmatch(bridge) else None,
    )


def _name(element: Element) -> str:
    name = text(element, "name")
    if not name or CONTROL.search(name):
        raise error(element, f"has the name {shown(name)}", "one without control characters")
    return name


def _uuid(element: Element, path: str) -> str:
    value = text(element, path).strip()
    match = UUID.fullmatch(value)
    if value and not match:
        expected = "one such as 4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
        raise error(element, f"has the uuid {shown(value)}", expected)
    return "-".join(match.groups()).lower() if match else ""


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
    # Such a name changes the meaning of dnsmasq's "domain" line.  In a network
    # with <forward> it is not ours to refuse, nor to use.
    if _forward_mode(element) is None:
        raise value_error(domain, "name", "a domain name")
    return None


def _dns(element: Element, own: tuple[Subnet, ...]) -> Dns | None:
    if own and _forward_mode(element) is None:
        xml_dns.check_options(element)
        return xml_dns.parse(element)
    # libvirt itself translates it: not ours to judge.
    return None if attribute_of(element, "dns", "enable") == "no" else Dns()


def _routes(element: Element) -> tuple[StaticRoute, ...]:
    """The ``<route>``s, of several to one destination the one of the least metric."""
    routes: dict[IPNetwork, StaticRoute] = {}
    for each in sorted(element.findall("route"), key=_metric):
        route = _route(each)
        routes.setdefault(route.destination, route)
    return tuple(routes.values())


def _metric(route: Element) -> int:
    metric = route.attrib.get("metric", "")
    # libvirt's own default; it takes no more than 32 bits.
    return int(metric) if re.fullmatch(r"[0-9]{1,10}", metric) else 1


def _route(element: Element) -> StaticRoute:
    gateway = xml_values.address_in(element, "gateway", xml_values.family_of(element))
    return StaticRoute(xml_values.interface(element).network, gateway)


# Our part


def _network_metadata(element: Element, subnets: tuple[Subnet, ...]) -> NatMetadata | None:
    nat = _nat_element(element, "natns-network.rng")
    return None if nat is None else xml_metadata.of_network(nat, subnets)


def _nat_element(element: Element, file: str) -> Element | None:
    """The ``<natns:nat>`` of a network or domain, valid by the schema ``file``."""
    found = element.findall(f"metadata/{NS}nat")
    if not found:
        return None
    if len(found) > 1:
        raise error(found[1], "stands there twice", "one at most")
    size = len(etree.tostring(found[0], with_tail=False))
    if size > MAX_METADATA:
        raise error(found[0], f"has {size} bytes", f"{MAX_METADATA} at most")
    xml_metadata.check_characters(found[0])
    _validate(found[0], file)
    return found[0]


def _validate(nat: Element, file: str) -> None:
    validator = _validator(file)
    if validator.validate(nat):
        return
    finding = xml_schema_errors.explain(nat, _grammar(file))
    if finding:
        raise error(finding.element, finding.fact, finding.expected)
    xml_metadata.check_combinations(nat)
    reason = next((str(entry.message) for entry in validator.error_log), "")
    raise error(nat, "is not valid", f"what {file} allows; {reason}")


# Made once per process: a hook that meets no metadata never pays for them.


@lru_cache
def _validator(file: str) -> etree.RelaxNG:
    path = names.resource(f"xml/{file}")
    try:
        return etree.RelaxNG(file=str(path))
    except (etree.LxmlError, OSError) as failure:
        raise DocumentError(f"{path}: {failure}", "reinstall libvirt-natns") from failure


@lru_cache
def _grammar(file: str) -> xml_schema_errors.Grammar:
    return xml_schema_errors.load(names.resource(f"xml/{file}"), _read_schema)


def _read_schema(path: Path) -> Element:
    return cast("Element", etree.parse(str(path)).getroot())


__all__ = [
    "MAX_DOCUMENT",
    "MAX_METADATA",
    "Edited",
    "HookData",
    "NetworkPort",
    "edit_domain",
    "is_container",
    "nat_text",
    "parse_domain",
    "parse_domain_nics",
    "parse_hook_data",
    "parse_network",
    "with_nic",
    "without_nic",
]
