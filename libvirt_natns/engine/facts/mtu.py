# SPDX-License-Identifier: LGPL-2.1-or-later
"""MTUs of a network's private bridge and of its upstream."""

from libvirt_natns import names
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model import Network, Upstream
from libvirt_natns.records import dataclass

ETHERNET_MTU = 1500


@dataclass(frozen=True, slots=True)
class PrivateMtu:
    """The MTU of a namespace's patch into its private bridge, and what that one carries."""

    patch: int
    carried: int

    @property
    def limit(self) -> int | None:
        """What is carried, where it is less than what the patch takes."""
        return self.carried if self.carried < self.patch else None


def usual_mtu(network: Network) -> PrivateMtu:
    """What libvirt gives a network's bridge, and guests assume."""
    mtu = network.mtu or ETHERNET_MTU
    return PrivateMtu(mtu, mtu)


def private_mtu(kernel: Kernel, network: Network) -> PrivateMtu | None:
    """What a network's bridge takes now; None where there is no bridge."""
    bridge = network.bridge or ""
    mtu = kernel.mtu(bridge)
    if mtu is None:
        return None
    foreign = kernel.foreign_mtu(bridge, names.private_patch(network.uuid))
    # The patch must not be what keeps the bridge's MTU small.
    return PrivateMtu(max(mtu, usual_mtu(network).patch), min(mtu, foreign or mtu))


def upstream_mtu(kernel: Kernel, upstream: Upstream) -> int | None:
    """The MTU of the upstream's bridge, in octets; None where it is missing."""
    link = kernel.link(upstream.bridge_namespace, upstream.bridge or "")
    return link.mtu if link else None
