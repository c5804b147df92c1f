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
from libvirt_natns.values import as_argument, quoted


def require_now(guests: Guests, domain: Domain) -> None:
    """Refuse a forward of a running guest without a NIC in a network of ours that runs.

    Raises NatnsError.
    """
    if not in_ours(guests.store, domain):
        raise _refusal(domain, None)


def require_later(guests: Guests, domain: Domain, network: str | None, mac: str | None) -> None:
    """Refuse a forward of a guest that is off, if it could never be published.

    ``network`` or ``mac`` names the NIC; otherwise, any NIC will do.  Raises NatnsError, or
    LibvirtError where libvirt does not answer.
    """
    nics = [
        nic
        for nic in domain.nics
        if network in (None, nic.network) and (mac is None or nic.mac == mac.lower())
    ]
    inside = {nic for nic, _ in in_ours(guests.store, domain)}
    if not inside.intersection(nics) and not _in_defined(guests, nics):
        raise _refusal(domain, network)


def _refusal(domain: Domain, network: str | None) -> NatnsError:
    remedy = f"see virt-natns plan {as_argument(network)}" if network else "see virt-natns status"
    which = f"network {quoted(network)}" if network else "a network"
    return NatnsError(
        f"guest {quoted(domain.name)} has no NIC in {which} that libvirt-natns handles", remedy
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
