# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks that are active in libvirt and have no router of ours, in the words of ``status``.

A command for a single network says why the network has no router.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from libvirt_natns.daemons import libvirt
from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.engine.reconcile.comparison import NO_ROUTER as ROUTER_MISSING
from libvirt_natns.errors import LibvirtError, NatnsError
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import LibvirtNetwork
from libvirt_natns.upstream.selection import verdict
from libvirt_natns.values import as_argument, did_you_mean, quoted

NO_ROUTER = "no router"
"""The health of an active network that is to have a router, and has none."""

UNTOUCHED = "is not touched"
"""The verdict about a network that is not handled."""


@dataclass(frozen=True, slots=True)
class Unhandled:
    """An active network without a router: its ``health``, and whether its user wants it so.

    ``network`` is None for an XML that is refused.
    """

    name: str
    uuid: str
    health: str
    asked: bool
    network: LibvirtNetwork | None


def unhandled(
    active: Mapping[str, bytes], up: Iterable[str], config: Config
) -> Iterator[Unhandled]:
    """Yield the active networks that are not ``up``, by uuid."""
    running = set(up)
    for uuid, xml in active.items():
        if uuid in running:
            continue
        try:
            network = libvirt_xml.parse_any_network(xml)
            asked = network.nat is not None and not network.nat.enabled
            health = _health(network, config)
        except NatnsError:
            network, asked, health = None, False, NO_ROUTER
        yield Unhandled(xml_sniff.at_network(xml).name, uuid, health, asked, network)


def _health(network: LibvirtNetwork, config: Config) -> str:
    """Return why a network has no router.  Raises DocumentError."""
    if verdict(network, config).handled:
        return NO_ROUTER
    if network.forward_mode is not None:
        return f"not handled (forward mode={network.forward_mode})"
    if network.nat is not None and not network.nat.enabled:
        return "isolated (enabled=no)"
    if config.scope == "annotated" and network.nat is None:
        return "isolated (scope=annotated)"
    return "isolated (no address)" if not network.subnets else "isolated (no bridge)"


# -- a single network --------------------------------------------------------


def why_no_router(named: str, config: Config) -> NatnsError:
    """Return why the network of that name or uuid has no router, with the remedy.

    libvirt is asked. The network is not up, as far as we know.
    """
    try:
        known, active = libvirt.networks(), libvirt.active_networks()
    except LibvirtError:
        return NatnsError(f"network {quoted(named)} is not up", "see virt-natns status")
    by_uuid = {xml_sniff.at_network(xml).uuid: name for name, xml in known.items()}
    name = by_uuid.get(named.lower(), named)
    if name not in known:
        hint = did_you_mean(name, known)
        return NatnsError(f"there is no network {quoted(name)}{hint}", "see virsh net-list --all")
    who = f"network {quoted(name)}"
    if xml_sniff.at_network(known[name]).uuid not in active:
        return _why_inactive(who, name, known[name], config)
    try:
        decided = verdict(libvirt_xml.parse_any_network(known[name]), config)
    except NatnsError as error:
        return NatnsError(f"{who} {ROUTER_MISSING}", str(error))
    if decided.handled:
        return NatnsError(f"{who} {ROUTER_MISSING}", "run virt-natns sync")
    return NatnsError(f"{who} {UNTOUCHED}", decided.reason)


def _why_inactive(who: str, name: str, xml: bytes, config: Config) -> NatnsError:
    """Return that a network does not run, or that its start would change nothing."""
    start = f"virsh net-start {as_argument(name)}"
    try:
        decided = verdict(libvirt_xml.parse_any_network(xml), config)
    except NatnsError as error:
        return NatnsError(f"{who} is not active, and cannot start", str(error))
    if decided.handled:
        return NatnsError(f"{who} is not active", start)
    return NatnsError(f"{who} {UNTOUCHED}", decided.reason)
