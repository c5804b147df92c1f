# SPDX-License-Identifier: LGPL-2.1-or-later
"""MTUs, in octets, of a network's private bridge and of its upstream."""

from dataclasses import dataclass

from libvirt_natns import names
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import Segment

ETHERNET_MTU = 1500


@dataclass(frozen=True, slots=True)
class PrivateMtu:
    """The MTU of a namespace's patch into its private bridge, and the MTU of that bridge."""

    patch: int
    carried: int

    @property
    def limit(self) -> int | None:
        """The bridge's MTU if it is less than the patch's, else None."""
        return self.carried if self.carried < self.patch else None


def usual_mtu(network: Network) -> PrivateMtu:
    """Return the MTU that libvirt gives a network's bridge, and that guests assume."""
    mtu = network.mtu or ETHERNET_MTU
    return PrivateMtu(mtu, mtu)


def private_mtu(kernel: Kernel, network: Network) -> PrivateMtu | None:
    """Return the MTU of a network's bridge now; None if there is no bridge."""
    bridge = network.bridge
    mtu = kernel.host.links.mtu(bridge)
    if mtu is None:
        return None
    foreign = kernel.host.bridges.foreign_mtu(bridge, names.private_patch(network.uuid))
    # A bridge takes the least MTU of its ports, and the patch must not be the least.
    return PrivateMtu(max(mtu, usual_mtu(network).patch), min(mtu, foreign or mtu))


def upstream_mtu(kernel: Kernel, segment: Segment) -> int | None:
    """Return the MTU of the upstream's bridge; None if the bridge is missing."""
    link = kernel.at(segment.namespace).links.get(segment.bridge)
    return link.mtu if link else None
