# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removing a network's namespace and files by their names alone, without a record.

Missing things are success.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq, libvirt_dnsmasq, ndppd
from libvirt_natns.engine.context import discard_directory, empty_directory
from libvirt_natns.errors import NatnsError
from libvirt_natns.firewall import libvirt_leftovers
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations import daemon_operations
from libvirt_natns.operations.namespaces import Namespace, namespace_owner
from libvirt_natns.operations.operation import Step
from libvirt_natns.operations.undo import Undo


def remove(kernel: Kernel, uuid: str, namespace: str | None, before: Step | None = None) -> None:
    """Delete a network's namespace, if it is named, and all that belongs to the network.

    Links go before the namespace.  A namespace that ends loses its rules before its
    links, and would let packets out untranslated in between.  All steps are tried
    before the first error is raised.
    """
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        # While the server can still hear that the address is free.
        ("end the DHCP client", partial(end_client, kernel, uuid, namespace)),
        # A dnsmasq that loses its link first writes an error into the journal.
        ("end dnsmasq", partial(_end_dnsmasq, uuid, namespace)),
        ("delete the patches", partial(_delete_patches, kernel, uuid)),
        ("delete the macvlan", partial(_delete_macvlan, kernel, uuid, namespace)),
        ("end ndppd", partial(ndppd.stop, uuid)),
        ("delete the namespace", partial(delete_own_namespace, kernel, uuid, namespace)),
        ("empty the directory", partial(empty_directory, uuid)),
    )
    errors = []
    for what, step in steps:
        if before is not None:
            before(what)
        try:
            step()
        except NatnsError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def remove_unrecorded(kernel: Kernel, uuid: str, namespace: str) -> None:
    """Remove a network while the state database cannot be read.

    The host's own part stays until ``sync``.
    """
    try:
        remove(kernel, uuid, namespace)
    finally:
        discard_directory(uuid)


def end_client(kernel: Kernel, uuid: str, namespace: str | None) -> None:
    """End a network's DHCP client.  Raises DhcpError."""
    daemon_operations.end_client(kernel, names.dhcp_directory(uuid), namespace, names.UPSTREAM_LINK)


def _end_dnsmasq(uuid: str, namespace: str | None) -> None:
    dnsmasq.stop(uuid, search=_exists(namespace))
    # Where each job has a network of its own, the files would fill the disk.
    dnsmasq.forget_leases(uuid)


def _delete_patches(kernel: Kernel, uuid: str) -> None:
    ports = (names.upstream_patch(uuid), names.private_patch(uuid))
    kernel.host.links.delete_group(names.link_group(uuid), *ports)
    for file in names.NETNS_DIRECTORY.glob(f"{names.ROUTER_PREFIX}*"):
        if netns.exists(file.name):
            kernel.at(file.name).links.delete(names.upstream_patch(uuid))


def _delete_macvlan(kernel: Kernel, uuid: str, namespace: str | None) -> None:
    """Delete the upstream's link, which has no end in the host and so is still there."""
    if namespace is None or not _exists(namespace):
        return
    if kernel.namespace_owner(namespace) == uuid:
        kernel.at(namespace).links.delete(names.UPSTREAM_LINK)


def _exists(namespace: str | None) -> bool:
    return namespace is not None and netns.exists(namespace)


def delete_own_namespace(kernel: Kernel, uuid: str, namespace: str | None) -> None:
    """Delete a namespace that is a network's, or the empty file that a killed start left."""
    if namespace is None:
        return
    owner = namespace_owner(kernel, Namespace(namespace, uuid))
    if owner in (uuid, None):
        kernel.delete_namespace(namespace)


def abandon(kernel: Kernel, name: str, bridge: str) -> None:
    """Remove libvirt's own part of a network after a failure of its `started`.

    libvirt thinks the network inactive, yet its bridge, dnsmasq and firewall rules live
    on.  Every later start would find the address in use.
    """
    with Undo() as everything:
        if bridge:
            everything.add(libvirt_leftovers.forget, bridge)
            everything.add(kernel.host.links.delete, bridge)
        if name:
            everything.callback(_stop_libvirts, name)


def _stop_libvirts(name: str) -> None:
    with suppress(NatnsError, OSError):
        libvirt_dnsmasq.stop(name, search=True)
