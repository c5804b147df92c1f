# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks that are active in libvirt and have no router of ours, in the words of ``status``."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import LibvirtNetwork
from libvirt_natns.upstream.selection import verdict

NO_ROUTER = "no router"
"""The health of an active network that is to have a router, and has none."""


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
