# SPDX-License-Identifier: LGPL-2.1-or-later
"""Comparing and making namespaces, sysctls and links.

For each kind, ``..._differs`` returns the differences in words.  ``ensure_...`` makes the
operation so, and tells the context how to undo that.
"""

from pathlib import Path

from libvirt_natns import names
from libvirt_natns.engine.apply.context import ApplyContext
from libvirt_natns.engine.apply.firewall import fingerprint_file
from libvirt_natns.engine.operations.links import (
    AllMulticast,
    LinkUp,
    Macvlan,
    Namespace,
    Patch,
    Port,
    Settings,
    Sysctl,
    TransitBridge,
)
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel.locks import make_directory
from libvirt_natns.kernel.session import Kernel


def namespace_owner(kernel: Kernel, operation: Namespace) -> str | None:
    """Return the uuid of a namespace's network, "" for a foreign namespace, None for none.

    A start that was killed before it could tag its namespace left a note.
    """
    owner = kernel.namespace_owner(operation.name)
    return operation.owner if owner == "" and _start_note(operation.owner).exists() else owner


def _start_note(owner: str) -> Path:
    return names.network_directory(owner) / "namespace"


def namespace_differs(kernel: Kernel, operation: Namespace) -> list[str]:
    owner = kernel.namespace_owner(operation.name)
    if owner == operation.owner:
        return []
    if owner is None:
        return [f"namespace {operation.name} is missing"]
    return [f"namespace {operation.name} belongs to {owner or 'somebody else'}"]


def ensure_namespace(context: ApplyContext, operation: Namespace) -> None:
    kernel, undo = context.kernel, context.undo
    owner = namespace_owner(kernel, operation)
    if owner not in (None, operation.owner):
        raise ConflictError(
            f"namespace {operation.name} belongs to {owner or 'somebody else'}",
            f"delete it (ip netns delete {operation.name}) or rename the network",
        )
    # The namespace is untagged, or it is an empty file.  A kill leaves that file between
    # its making and its mounting.
    kernel.delete_namespace(operation.name)
    note = _start_note(operation.owner)
    undo.add(note.unlink, True)
    undo.add(kernel.delete_namespace, operation.name)
    make_directory(note.parent)
    note.touch()
    # The file tells of the rules of an earlier namespace.
    fingerprint_file(operation.owner).unlink(missing_ok=True)
    kernel.create_namespace(operation.name, operation.owner)
    note.unlink()
    context.fresh.add(operation.name)
    context.starting = True


def sysctl_differs(kernel: Kernel, operation: Sysctl) -> list[str]:
    value = kernel.at(operation.namespace).sysctls.get(operation.key)
    if value in (None, operation.value):
        return []
    return [f"sysctl {operation.key} is {value} in {operation.namespace or 'the host'}"]


def ensure_sysctl(context: ApplyContext, operation: Sysctl) -> None:
    context.kernel.at(operation.namespace).sysctls.set(operation.key, operation.value)


def settings_differ(kernel: Kernel, operation: Settings) -> list[str]:
    present = kernel.at(operation.namespace).sysctls.values([key for key, _ in operation.values])
    return [
        f"sysctl {key} is {present[key]} in {operation.namespace}"
        for key, value in operation.values
        if present.get(key, value) != value
    ]


def ensure_settings(context: ApplyContext, operation: Settings) -> None:
    # The kernel resets some when another one changes, so all are set.
    context.kernel.at(operation.namespace).sysctls.set_all(operation.values)


def patch_differs(kernel: Kernel, operation: Patch) -> list[str]:
    return kernel.patch_differences(
        operation.namespace,
        operation.link,
        operation.port,
        operation.mtu,
        operation.link_mtu,
        operation.outer,
    )


def ensure_patch(context: ApplyContext, operation: Patch) -> None:
    kernel, undo = context.kernel, context.undo
    namespace, link, port = operation.namespace, operation.link, operation.port
    outer = operation.outer
    if not context.is_fresh(operation) and kernel.has_patch(namespace, link, port, outer):
        inner = operation.link_mtu or operation.mtu
        for where, name, mtu in ((namespace, link, inner), (outer, port, operation.mtu)):
            kernel.at(where).links.set_mtu(name, mtu)
        return
    undo.add(kernel.at(outer).links.delete, port)
    kernel.create_patch(
        namespace,
        link,
        operation.mac,
        port,
        operation.port_mac,
        operation.altname,
        operation.mtu,
        operation.link_mtu,
        outer,
    )


def macvlan_differs(kernel: Kernel, operation: Macvlan) -> list[str]:
    return kernel.at(operation.namespace).macvlans.differences(
        operation.link, operation.parent, operation.mtu
    )


def ensure_macvlan(context: ApplyContext, operation: Macvlan) -> None:
    kernel, undo = context.kernel, context.undo
    namespace, link, parent = operation.namespace, operation.link, operation.parent
    if not context.is_fresh(operation) and kernel.at(namespace).macvlans.exists(link, parent):
        kernel.at(namespace).links.set_mtu(link, operation.mtu)
        return
    undo.add(kernel.at(namespace).links.delete, link)
    kernel.at(namespace).macvlans.create(link, operation.mac, parent, operation.mtu)


def port_differs(kernel: Kernel, operation: Port) -> list[str]:
    return kernel.port_differences(
        operation.port, operation.bridge, hairpin=operation.hairpin, outer=operation.outer
    )


def ensure_port(context: ApplyContext, operation: Port) -> None:
    context.kernel.attach(operation.port, operation.bridge, operation.outer)
    if operation.hairpin:
        context.kernel.set_hairpin(operation.port, operation.outer)


def multicast_differs(kernel: Kernel, operation: AllMulticast) -> list[str]:
    if kernel.gets_all_multicast(operation.port, operation.outer):
        return []
    return [f"patch {operation.port} does not get all multicast"]


def ensure_multicast(context: ApplyContext, operation: AllMulticast) -> None:
    context.kernel.set_all_multicast(operation.port, operation.outer)


def link_differs(kernel: Kernel, operation: LinkUp) -> list[str]:
    return kernel.at(operation.namespace).links.differences(operation.link)


def ensure_link(context: ApplyContext, operation: LinkUp) -> None:
    context.kernel.at(operation.namespace).links.set_up(operation.link)


def transit_differs(kernel: Kernel, operation: TransitBridge) -> list[str]:
    return kernel.host.links.differences(operation.name)


def ensure_transit(context: ApplyContext, operation: TransitBridge) -> None:
    kernel, undo = context.kernel, context.undo
    if kernel.host.links.get(operation.name) is None:
        undo.add(kernel.host.links.delete, operation.name)
        kernel.create_bridge(operation.name, operation.altname, operation.mac)
    kernel.host.links.set_up(operation.name)
