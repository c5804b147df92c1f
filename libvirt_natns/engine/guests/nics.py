# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's NICs, and the networks of ours that they are in."""

from libvirt_natns import names
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.model.network import Domain, Network, Nic
from libvirt_natns.state.guests import GuestRecord
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store


def in_ours(store: Store, domain: Domain) -> list[tuple[Nic, NetworkRecord]]:
    """Return a guest's NICs in networks of ours that run or start, by recorded state alone."""
    return [
        (nic, record)
        for nic in domain.nics
        for record in networks_at(store, nic.network, nic.bridge)
    ]


def networks_at(store: Store, network: str | None, bridge: str | None) -> list[NetworkRecord]:
    """Return the networks of ours of that name, or else on that bridge, that run or start."""
    records = _recorded(store, network, bridge)
    return [each for each in records if each.state in ("starting", "up") and each.this_boot]


def _recorded(store: Store, network: str | None, bridge: str | None) -> list[NetworkRecord]:
    if network:
        spaces = {names.namespace(network), names.former_namespace(network)}
        records = [r for space in spaces for r in store.networks.holders(namespace=space)]
        return [record for record in records if record.name == network]
    return store.networks.holders(bridge=bridge) if bridge else []


def may_name(xml: bytes, network: Network | NetworkRecord) -> bool:
    """True if a guest's XML may have a NIC in a network; the XML is not parsed."""
    # libvirt writes UTF-8, and writes these characters of a name as entities.
    if any(letter in network.name for letter in "&<>'\""):
        return True
    return any(name.encode() in xml for name in (network.name, network.bridge) if name)


def has_nic(record: GuestRecord, network: Network | NetworkRecord) -> bool:
    """True if one of a guest's NICs is in a network, by name or by bridge."""
    return any(is_in(nic, network) for nic in libvirt_xml.parse_domain_nics(record.document).nics)


def is_in(nic: Nic, network: Network | NetworkRecord) -> bool:
    """True if a NIC is in a network, by name or by bridge."""
    return nic.network == network.name if nic.network else nic.bridge == network.bridge


def is_same_nic(one: Nic, other: Nic) -> bool:
    """True if both are one NIC, by MAC address and network."""
    return (one.mac, one.network) == (other.mac, other.network)
