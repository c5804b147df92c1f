# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks that ended without a hook, as another network's start shows."""

from libvirt_natns import names
from libvirt_natns.engine import given_up
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.down import down, tidy
from libvirt_natns.engine.former_names import has_former_name
from libvirt_natns.model.network import Network
from libvirt_natns.state.networks import NetworkRecord


def end_rivals(context: Context, network: Network, *, active: bool) -> None:
    """Take down networks that cannot run beside ``network``, which starts.

    ``active``: the network's bridge is there and is its own.
    """
    for rival in context.store.networks.holders(names.namespace(network.name), network.bridge):
        if has_former_name(rival):
            # The rival's namespace gets another name under the rival's lock.
            with context.changing("up", rival.uuid, rival.name) as change:
                rival = change.record or rival
        if rival.uuid != network.uuid and _is_superseded(context, rival, network, active):
            down(context, rival.uuid)
    # The record of a network of that name may have been lost.
    namespace = names.namespace(network.name)
    owner = context.kernel.namespace_owner(namespace)
    if owner and owner != network.uuid:
        tidy(context, owner, namespace)


def _is_superseded(context: Context, rival: NetworkRecord, network: Network, active: bool) -> bool:
    """True if a start of ``network`` shows that ``rival`` has ended."""
    if rival.name == network.name:
        # libvirt has no two networks of a name, and starts no active one.
        return True
    if rival.bridge != network.bridge:
        return False
    if active:
        return True
    if context.kernel.host.links.get(rival.bridge) is not None:
        return False
    # libvirt has no two networks with a bridge of one name.
    return rival.state in ("starting", "up") or given_up.is_given_up(rival)
