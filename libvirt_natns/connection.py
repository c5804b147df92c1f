# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking libvirt: the only user of libvirt-python.

Never from a hook: libvirt waits for the hook, and the hook would for libvirt.
Read-only connections; nothing is changed through them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import libvirt

from libvirt_natns.errors import LibvirtError

URIS = ("qemu:///system", "network:///system", "lxc:///system")
"""The monolithic daemon answers the first, a modular one for networks the second."""


def _quiet(context: object, error: object) -> None:
    """libvirt's own printing of errors; they are raised all the same."""


@contextmanager
def connected() -> Iterator[Any]:
    """A read-only connection to the libvirt that has the networks.

    Raises LibvirtError where none answers.
    """
    libvirt.registerErrorHandler(_quiet, None)
    reasons = []
    for uri in URIS:
        try:
            connection = libvirt.openReadOnly(uri)
        except libvirt.libvirtError as error:
            reasons.append(str(error))
            continue
        try:
            yield connection
        except libvirt.libvirtError as error:
            raise LibvirtError("libvirt refuses a request", str(error)) from error
        finally:
            connection.close()
        return
    raise LibvirtError("libvirt does not answer", reasons[0])


def active_networks() -> dict[str, bytes]:
    """The XML of every active network, by uuid."""
    with connected() as connection:
        flags = libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE
        found = {}
        for network in connection.listAllNetworks(flags):
            try:
                found[network.UUIDString()] = network.XMLDesc(0).encode()
            except libvirt.libvirtError as error:
                # It stopped since it was listed.
                if error.get_error_code() != libvirt.VIR_ERR_NO_NETWORK:
                    raise
        return found


def networks() -> dict[str, bytes]:
    """The XML of every network that libvirt knows, active or not, by name."""
    with connected() as connection:
        return {n.name(): n.XMLDesc(0).encode() for n in connection.listAllNetworks(0)}


def network_xml(name: str) -> bytes | None:
    """The XML of one network, None where libvirt knows none of that name."""
    with connected() as connection:
        try:
            return bytes(connection.networkLookupByName(name).XMLDesc(0).encode())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
                return None
            raise
