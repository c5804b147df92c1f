# SPDX-License-Identifier: LGPL-2.1-or-later
"""DHCP reservations of guests' NICs: the address that a forward leads to."""

from itertools import chain

from libvirt_natns.addresses import Address, Family
from libvirt_natns.daemons import guest_leases
from libvirt_natns.engine.publication.attachment import Attachment
from libvirt_natns.engine.publication.dhcp_hosts import fixed_addresses, fixed_macs, ranges_of
from libvirt_natns.errors import ConflictError
from libvirt_natns.state import pool
from libvirt_natns.state.store import Store
from libvirt_natns.values import quoted


def reserve_address(store: Store, owner: str, attachment: Attachment, family: Family) -> Address:
    """Return the NIC's reserved address, or reserve one of the network's DHCP range.

    Raises ConflictError.
    """
    network, mac = attachment.network, attachment.nic.mac
    if kept := store.reservations.get(network.uuid, mac, family):
        return store.reservations.reserve(network.uuid, mac, owner, [kept], lambda _: False, family)
    if not ranges_of(network, family):
        which = "DHCP" if family == 4 else "DHCPv6"
        raise ConflictError(
            f"network {quoted(network.name)} has no {which} range to reserve an address from",
            "give guestAddress in <natns:portForward>, or a <range> in the network's <dhcp>",
        )
    try:
        return _reserve_free(store, owner, attachment, family)
    except ConflictError as error:
        raise ConflictError(
            f"network {quoted(network.name)}: {error.fact}", error.remedy
        ) from error


def _reserve_free(store: Store, owner: str, attachment: Attachment, family: Family) -> Address:
    network, mac = attachment.network, attachment.nic.mac
    leased, fixed = guest_leases.present(network.bridge), fixed_addresses(network)
    spans = ranges_of(network, family)
    # Ranges that are not translated come first.
    spans.sort(key=lambda span: not attachment.is_public(span.first))

    nics = {mac, *store.reservations.all(network.uuid, family), *fixed_macs(network)}

    def inside(address: Address) -> bool:
        return address not in fixed and any(address in span for span in spans)

    def is_free(address: Address) -> bool:
        return inside(address) and leased.get(address, mac) == mac

    def usable(address: Address) -> bool:
        if not inside(address):
            return False
        holder = leased.get(address, mac)
        stranger = guest_leases.is_stranger(network.bridge, holder, nics)
        return holder == mac or stranger

    # The NIC's present lease comes first, then free addresses, then leases of strangers.
    own = [address for address, holder in leased.items() if holder == mac]
    candidates = chain(filter(is_free, chain(own, pool.listed(spans))), filter(usable, leased))
    return store.reservations.reserve(network.uuid, mac, owner, candidates, usable, family)


def is_tenable(attachment: Attachment, address: Address) -> bool:
    """True if a reservation still holds.

    The network's XML may have changed.  dnsmasq learns of a reservation only when the
    guest starts, so another guest may have leased the address just before.
    """
    network = attachment.network
    taken = fixed_addresses(network)
    inside = any(address in subnet.network for subnet in network.subnets)
    holder = guest_leases.present(network.bridge).get(address, attachment.nic.mac)
    # The MAC address of some DHCPv6 clients is unknown.
    return inside and address not in taken and holder in (attachment.nic.mac, "")
