# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb down, by recorded state alone: today's XML and configuration may be broken.

Missing things are success, and all steps are tried before the first error is raised.
"""

from libvirt_natns import names
from libvirt_natns.daemons import libvirt_dnsmasq
from libvirt_natns.documents import xml_sniff
from libvirt_natns.engine import shared_host
from libvirt_natns.engine.context import Change, Context, discard_directory
from libvirt_natns.engine.removal import abandon, remove
from libvirt_natns.model.network import LibvirtNetwork, Network
from libvirt_natns.state.networks import NetworkRecord


def down(context: Context, uuid: str, name: str = "", *, shared: bool = True) -> None:
    """Remove all of a network but its lease.

    ``name`` serves where there is no record.  Without ``shared``, the part that
    networks share in the host is left to a later ``sync``.
    """
    with context.changing("down", uuid, name) as change:
        record = change.record
        namespace = record.namespace if record else names.namespace(name) if name else None
        end(context, change, uuid, namespace, shared=shared)
        change.lines.append("removed")


def down_unless_changed(context: Context, record: NetworkRecord) -> bool:
    """Take down a network that is not active any more, and return True.

    Return False, and do nothing, if anything happened to the network since its
    record was read.
    """
    with context.changing("down", record.uuid, record.name) as change:
        current = change.record
        if current and (current.state, current.since) != (record.state, record.since):
            return False
        remove_orphan(context, record.document)
        end(context, change, record.uuid, record.namespace)
        change.lines.append("removed")
    return True


def tidy(context: Context, uuid: str, namespace: str | None = None) -> bool:
    """Remove leftovers of a network, unless it is recorded as running.

    Return whether there were any.
    """
    if namespace is None and not names.network_directory(uuid).is_dir():
        return False
    with context.changing("tidy", uuid) as change:
        is_down = change.state == "down"
        if is_down:
            end(context, change, uuid, namespace)
            change.lines.append("removed leftovers")
    return is_down


def end(
    context: Context, change: Change, uuid: str, namespace: str | None, *, shared: bool = True
) -> None:
    """Remove a network under its lock, and record it as down."""
    if context.built is not None:
        context.built.drop(uuid)
    remove(context.kernel, uuid, namespace, context.observer.step)
    if change.record and change.record.state != "down":
        context.observer.step("note that it is down")
        context.store.claims.drop(uuid)
        context.store.networks.set_state(uuid, "down")
    discard_directory(uuid)
    # From here on the directory may be the next start's.
    change.discards = False
    if shared:
        shared_host.adjust(context, uuid)


def remove_orphan(context: Context, xml: bytes) -> None:
    """Remove libvirt's part of a network after a kill of its `started`.

    The network must not be active in libvirt.  Its bridge has the MAC address that
    libvirt gave it; another bridge of that name has not.
    """
    seen = xml_sniff.at_network(xml)
    if seen.mac and context.kernel.host.links.mac(seen.bridge) == seen.mac:
        context.observer.step("remove libvirt's bridge")
        abandon(context.kernel, seen.name, seen.bridge)


def hand_back(context: Context, network: LibvirtNetwork, *, renew: bool = False) -> None:
    """Take a running network down and give libvirt's bridge its addresses back.

    ``renew`` ends libvirt's dnsmasq, because we have taken its lease helper away. libvirt starts
    another dnsmasq when it is reloaded, which is the caller's task.
    """
    down(context, network.uuid, network.name)
    if not isinstance(network, Network) or not network.taken_over:
        return
    if context.kernel.host.links.get(network.bridge) is None:
        return
    for subnet in network.subnets:
        context.kernel.host.addresses.add(network.bridge, subnet.interface)
    return_routes(context, network)
    if renew:
        libvirt_dnsmasq.stop(network.name)
    else:
        libvirt_dnsmasq.unbind(network.name)


def return_routes(context: Context, network: Network) -> None:
    """Add libvirt's <route>s again, which the kernel removes with the bridge's last address."""
    for route in network.routes if network.taken_over else ():
        context.kernel.host.routes.add_as_libvirt(route.destination, route.gateway, network.bridge)
