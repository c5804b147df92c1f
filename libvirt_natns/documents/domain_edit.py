# SPDX-License-Identifier: LGPL-2.1-or-later
"""Edited domains: another ``<natns:nat>``, one NIC more, one NIC less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from libvirt_natns.documents.libvirt_xml import nic_of
from libvirt_natns.documents.xml_dictionary import bounded
from libvirt_natns.documents.xml_tree import add_child, bare_text, octets, parse
from libvirt_natns.documents.xml_values import NS, Element, MutableElement, error
from libvirt_natns.model.network import Nic


@dataclass(frozen=True, slots=True)
class Edited:
    """A domain with another ``<natns:nat>``: all of it, and the element alone.

    ``element`` has no XML namespace, which libvirt adds itself; None where the domain
    has none any more.
    """

    document: bytes
    element: str | None


@bounded
def edit_nat(data: bytes, change: Callable[[MutableElement], None]) -> Edited:
    """Return a domain with a changed ``<natns:nat>``, which is made where it is missing.

    Comments and all other metadata stay.  An element that has nothing left is
    removed.  DocumentError for a domain with two of them.
    """
    root = parse(data, ("domain",), keep_comments=True)
    metadata = _child(root, "metadata")
    elements = metadata.findall(f"{NS}nat")
    if len(elements) > 1:
        raise error(elements[1], "appears twice", "at most one")
    nat = cast("MutableElement", elements[0] if elements else add_child(metadata, f"{NS}nat"))
    change(nat)
    if len(nat) or nat.attrib:
        return Edited(octets(root), bare_text(nat))
    cast("MutableElement", metadata).remove(nat)
    return Edited(octets(root), None)


@bounded
def nat_text(data: bytes) -> str | None:
    """Return a domain's ``<natns:nat>`` as ``Edited.element`` has it."""
    nat = parse(data, ("domain",), keep_comments=True).find(f"metadata/{NS}nat")
    return None if nat is None else bare_text(nat)


@bounded
def with_nic(data: bytes, nic: Nic) -> bytes:
    """Return a ``<domain>`` with one more NIC, in a network."""
    root = parse(data, ("domain",))
    interface = add_child(_child(root, "devices"), "interface", {"type": "network"})
    add_child(interface, "mac", {"address": nic.mac})
    add_child(interface, "source", {"network": nic.network or ""})
    return octets(root)


@bounded
def without_nic(data: bytes, nic: Nic) -> bytes:
    """Return a ``<domain>`` without one of its NICs in a network."""
    root = parse(data, ("domain",))
    for devices in root.findall("devices"):
        for interface in devices.findall("interface"):
            present = nic_of(interface)
            if (present.mac, present.network) == (nic.mac, nic.network):
                cast("MutableElement", devices).remove(interface)
    return octets(root)


def _child(parent: Element, tag: str) -> Element:
    """Return a child, made where it is missing."""
    child = parent.find(tag)
    return add_child(parent, tag) if child is None else child
