# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb down, by recorded state alone: today's XML and configuration may be broken.

Missing things are success, and all steps are tried before the first error is raised.
"""

from libvirt_natns import names
from libvirt_natns.daemons import libvirt_dnsmasq
from libvirt_natns.documents import xml_sniff
from libvirt_natns.engine import shared_host
from libvirt_natns.engine.context import Context, discard_directory
from libvirt_natns.engine.removal import abandon, remove
from libvirt_natns.model.network import Network
from libvirt_natns.state.networks import NetworkRecord


def down(context: Context, uuid: str, name: str = "", *, shared: bool = True) -> None:
    """Remove all of a network but its lease.

    ``name`` serves where there is no record.  Without ``shared``, the part that
    networks share in the host is left to a later ``sync``.
    """
    with context.changing("down", uuid, name or _name(context, uuid)) as changes:
        record = context.store.networks.get(uuid)
        namespace = record.namespace if record else names.namespace(name) if name else None
        end(context, uuid, namespace, shared=shared)
        changes.append("removed")


def down_unless_changed(context: Context, record: NetworkRecord) -> bool:
    """Take down a network that is not active any more, and return True.

    Return False, and do nothing, if anything happened to the network since its
    record was read.
    """
    with context.changing("down", record.uuid, record.name) as changes:
        current = context.store.networks.get(record.uuid)
        if current and (current.state, current.since) != (record.state, record.since):
            return False
        remove_orphan(context, record.document)
        end(context, record.uuid, record.namespace)
        changes.append("removed")
    return True


def tidy(context: Context, uuid: str, namespace: str | None = None) -> bool:
    """Remove leftovers of a network, unless it is recorded as running.

    Return whether there were any.
    """
    if namespace is None and not names.network_directory(uuid).is_dir():
        return False
    with context.changing("tidy", uuid, _name(context, uuid)) as changes:
        is_down = context.state(uuid) == "down"
        if is_down:
            end(context, uuid, namespace)
            changes.append("removed what was left over")
    return is_down


def end(context: Context, uuid: str, namespace: str | None, *, shared: bool = True) -> None:
    """Remove a network under its lock, and record it as down."""
    if context.built is not None:
        context.built.drop(uuid)
    remove(context.kernel, uuid, namespace, context.before)
    record = context.store.networks.get(uuid)
    if record and record.state != "down":
        context.step("note that it is down")
        context.store.claims.drop(uuid)
        context.store.networks.set_state(uuid, "down")
    discard_directory(uuid)
    if shared:
        shared_host.adjust(context, uuid)


def _name(context: Context, uuid: str) -> str:
    record = context.store.networks.get(uuid)
    return record.name if record else uuid


def remove_orphan(context: Context, xml: bytes) -> None:
    """Remove libvirt's part of a network after a kill of its `started`.

    The network must not be active in libvirt.  Its bridge has the MAC address that
    libvirt gave it; another bridge of that name has not.
    """
    seen = xml_sniff.at_network(xml)
    if seen.mac and context.kernel.host.links.mac(seen.bridge) == seen.mac:
        context.step("remove libvirt's bridge")
        abandon(context.kernel, seen.name, seen.bridge)


def hand_back(context: Context, network: Network, *, renew: bool = False) -> None:
    """Take a running network down and give libvirt's bridge its addresses back.

    ``renew`` ends libvirt's dnsmasq, because we have taken its lease helper away. libvirt starts
    another dnsmasq when it is reloaded, which is the caller's task.
    """
    down(context, network.uuid, network.name)
    if not network.taken_over or context.kernel.host.links.get(network.bridge or "") is None:
        return
    for subnet in network.subnets:
        context.kernel.host.addresses.add(network.bridge or "", subnet.interface)
    return_routes(context, network)
    if renew:
        libvirt_dnsmasq.stop(network.name)


def return_routes(context: Context, network: Network) -> None:
    """Add libvirt's <route>s again, which the kernel removes with the bridge's last address."""
    for route in network.routes if network.taken_over else ():
        context.kernel.host.routes.add_as_libvirt(
            route.destination, route.gateway, network.bridge or ""
        )
