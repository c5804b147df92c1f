# SPDX-License-Identifier: LGPL-2.1-or-later
"""From libvirt's XML to the model: hook data, networks and domains.

libvirt validated its own part of the documents, so unknown elements there are
ignored.  ``xml_tree`` parses documents and holds our metadata against its schema.
``xml_dictionary`` bounds the memory that libxml2 keeps of documents that were read.

Every error is a DocumentError of one line: where, what, and what was expected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

from libvirt_natns.documents import xml_metadata, xml_network, xml_values
from libvirt_natns.documents.xml_dictionary import bounded
from libvirt_natns.documents.xml_tree import nat_element, parse
from libvirt_natns.documents.xml_values import Element, attribute_of, error, text
from libvirt_natns.errors import DocumentError
from libvirt_natns.model.network import Domain, LibvirtNetwork, Network, Nic
from libvirt_natns.values import INTERFACE, quoted

NIC_TYPES = {"network", "bridge"}
"""The types of a guest's ``<interface>`` that can lead into a network of libvirt's."""

OUTWARD_TYPES = {"user", "direct", "hostdev", "vdpa", "vhostuser"}
"""The types that lead outside past all networks and bridges.

The others lead nowhere ("internal", "null"), to other guests ("mcast", "udp") or to
a program that libvirt does not know ("ethernet")."""


@dataclass(frozen=True, slots=True)
class NetworkPort:
    """A guest's NIC in a network: the hook's ``<networkport>``.

    A value that libvirt left out is "", or None for the bridge.
    """

    owner_name: str
    owner_uuid: str
    mac: str
    bridge: str | None = None


@dataclass(frozen=True, slots=True)
class HookData:
    """Data that libvirt hands to a network hook on its standard input."""

    network: LibvirtNetwork
    port: NetworkPort | None = None


@bounded
def parse_hook_data(data: bytes) -> HookData:
    """Return the data of a hook's ``<hookData>``; DocumentError for a document that is refused."""
    root = parse(data, ("hookData",))
    port = root.find("networkport")
    return HookData(
        network=xml_network.network_of(_network_element(root)),
        port=None if port is None else _network_port(port),
    )


def parse_network(data: bytes, where: str = "", bridge: str | None = None) -> Network:
    """Return a ``<network>`` that we can handle, as ``parse_any_network`` does.

    ``bridge`` is the name of its bridge where libvirt has not chosen the name yet.  Without
    a name, DocumentError.
    """
    with _named(where):
        network = _parsed_network(data, bridge)
        if not isinstance(network, Network):
            raise DocumentError(
                f"network {quoted(network.name)} has no bridge", "start it with libvirt"
            )
        return network


def parse_any_network(data: bytes, where: str = "") -> LibvirtNetwork:
    """Return a ``<network>``, as ``virsh net-dumpxml`` prints it or within ``<hookData>``.

    ``where`` stands before every message, a file's name for instance.  A network
    that libvirt has not seen yet may lack its uuid (then "") and its bridge (then
    None).  DocumentError for a document that is refused.
    """
    with _named(where):
        return _parsed_network(data)


@lru_cache(maxsize=16)
@bounded
def _parsed_network(data: bytes, bridge: str | None = None) -> LibvirtNetwork:
    """Return a network; several steps of one event ask for one and the same document."""
    return xml_network.network_of(_network_element(parse(data, ("network", "hookData"))), bridge)


@dataclass(frozen=True, slots=True)
class DomainDocument:
    """A ``<domain>`` that was parsed once, for a caller that may not refuse its metadata.

    ``plain`` is the domain without its metadata: its ``nat`` is None.
    """

    plain: Domain
    outcome: Domain | DocumentError

    @property
    def domain(self) -> Domain:
        """The domain with its metadata.  Raises DocumentError for metadata that is refused."""
        if isinstance(self.outcome, DocumentError):
            raise self.outcome
        return self.outcome


@bounded
def read_domain(data: bytes) -> DomainDocument:
    """Return a ``<domain>``, as the qemu and lxc hooks get it and ``virsh dumpxml`` prints it.

    DocumentError only for documents that libvirt never hands out, see ``parse_domain_nics``.
    """
    root = parse(data, ("domain",))
    plain = _guest(root)
    try:
        return DomainDocument(plain, _with_metadata(root, plain))
    except DocumentError as failure:
        return DomainDocument(plain, failure)


def _with_metadata(root: Element, plain: Domain) -> Domain:
    nat = nat_element(root, "natns-domain.rng")
    if nat is None:
        return plain
    # libvirt takes control characters there; lists and rule sets do not.
    xml_values.name_of(root)
    macs = [nic.mac for nic in plain.nics if nic.mac]
    return replace(plain, nat=xml_metadata.of_domain(nat, macs))


def parse_domain(data: bytes, where: str = "") -> Domain:
    """Return a ``<domain>`` with its metadata.

    ``where`` stands before every message.  DocumentError for metadata that is refused.
    A caller that must not refuse a guest for its metadata calls ``read_domain``.
    """
    with _named(where):
        return read_domain(data).domain


@bounded
def parse_domain_nics(data: bytes) -> Domain:
    """Return a ``<domain>`` without its metadata, which may be wrong: ``nat`` is None.

    DocumentError only for documents that libvirt never hands out: without a ``<domain>``,
    or with a malformed uuid.
    """
    return _guest(parse(data, ("domain",)))


@bounded
def is_container(data: bytes) -> bool:
    """True if a domain is LXC's."""
    return parse(data, ("domain",)).attrib.get("type") == "lxc"


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the document's name before the messages."""
    try:
        yield
    except DocumentError as failure:
        if not where:
            raise
        raise DocumentError(f"{where}: {failure.fact}", failure.remedy) from failure


def _network_element(root: Element) -> Element:
    network = root if root.tag == "network" else root.find("network")
    if network is None:
        raise error(root, "has no <network>", "one")
    return network


def _network_port(element: Element) -> NetworkPort:
    return NetworkPort(
        owner_name=text(element, "owner/name"),
        owner_uuid=xml_values.uuid_in(element, "owner/uuid"),
        mac=xml_values.mac(attribute_of(element, "mac", "address")) or "",
        bridge=attribute_of(element, "plug", "bridge"),
    )


def _guest(element: Element) -> Domain:
    interfaces = element.findall("devices/interface")
    return Domain(
        uuid=xml_values.uuid_in(element, "uuid"),
        name=text(element, "name"),
        nics=tuple(nic_of(each) for each in interfaces if each.attrib.get("type") in NIC_TYPES),
        outward=any(each.attrib.get("type") in OUTWARD_TYPES for each in interfaces),
    )


def nic_of(element: Element) -> Nic:
    """Return a guest's NIC from its ``<interface>``."""
    bridge = attribute_of(element, "source", "bridge") or ""
    return Nic(
        # A domain that libvirt has not seen yet may leave the MAC to it.
        mac=xml_values.mac(attribute_of(element, "mac", "address")) or "",
        network=attribute_of(element, "source", "network") or None,
        # No network of ours has a bridge of another form.
        bridge=bridge if INTERFACE.fullmatch(bridge) else None,
    )
