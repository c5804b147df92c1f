# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NIC that a new forward leads to: there must be one in a network of ours.

A guest that is off may be in a network that is down.  Then the network's definition decides.
"""

from collections.abc import Iterable

from libvirt_natns.daemons import libvirt
from libvirt_natns.documents import xml_sniff
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.guests.nics import in_ours
from libvirt_natns.engine.reconcile.active import network_of_ours
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.network import Domain, Nic
from libvirt_natns.values import as_argument, did_you_mean, quoted


def require_now(guests: Guests, domain: Domain, network: str | None, mac: str | None) -> None:
    """Refuse a forward of a running guest without a NIC in a network of ours that runs.

    ``network`` or ``mac`` names the NIC; otherwise, any NIC will do.  Raises NatnsError.
    """
    if not _is_inside(guests, domain, network, mac):
        raise _refusal(domain, network, mac)


def require_later(guests: Guests, domain: Domain, network: str | None, mac: str | None) -> None:
    """Refuse a forward of a guest that is off, if it could never be published.

    ``network`` or ``mac`` names the NIC; otherwise, any NIC will do.  Raises NatnsError, or
    LibvirtError where libvirt does not answer.
    """
    nics = [nic for nic in domain.nics if network in (None, nic.network) and _has_address(nic, mac)]
    if not _is_inside(guests, domain, network, mac) and not _in_defined(guests, nics):
        raise _refusal(domain, network, mac)


def _is_inside(guests: Guests, domain: Domain, network: str | None, mac: str | None) -> bool:
    """True if a NIC is in a network of ours that runs, and is the named one."""
    # A NIC on the network's bridge does not name the network; the record does.
    return any(
        network in (None, record.name) and _has_address(nic, mac)
        for nic, record in in_ours(guests.store, domain)
    )


def _has_address(nic: Nic, mac: str | None) -> bool:
    return mac is None or nic.mac == mac.lower()


def _refusal(domain: Domain, network: str | None, mac: str | None) -> NatnsError:
    remedy = f"see virt-natns plan {as_argument(network)}" if network else "see virt-natns status"
    nic = f"NIC with MAC address {mac}" if mac else "NIC"
    which = f"network {quoted(network)}" if network else "a network"
    if network and all(each.network != network for each in domain.nics):
        which += did_you_mean(network, filter(None, (each.network for each in domain.nics)))
    return NatnsError(
        f"guest {quoted(domain.name)} has no {nic} in {which} that libvirt-natns handles", remedy
    )


def _in_defined(guests: Guests, nics: Iterable[Nic]) -> bool:
    """True if one of the NICs is in a network that would get a router at its start."""
    names, bridges = set(), set()
    for xml in libvirt.networks().values():
        seen = xml_sniff.at_network(xml)
        try:
            handled = network_of_ours(guests.engine, xml) is not None
        except NatnsError:
            # It asks for a router, and its start says what is wrong.
            handled = True
        if handled:
            names.add(seen.name)
            bridges.add(seen.bridge)
    return any(nic.network in names if nic.network else nic.bridge in bridges for nic in nics)
