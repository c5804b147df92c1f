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
    return {n.UUIDString(): xml for n, xml in _listed(libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE)}


def networks() -> dict[str, bytes]:
    """The XML of every network that libvirt knows, active or not, by name."""
    return {network.name(): xml for network, xml in _listed(0)}


def _listed(flags: int) -> list[tuple[Any, bytes]]:
    with connected() as connection:
        listed = [(network, _xml(network)) for network in connection.listAllNetworks(flags)]
    return [(network, xml) for network, xml in listed if xml is not None]


def _xml(network: Any) -> bytes | None:  # noqa: ANN401
    try:
        return bytes(network.XMLDesc(0).encode())
    except libvirt.libvirtError as error:
        # It has gone since it was listed.
        if error.get_error_code() != libvirt.VIR_ERR_NO_NETWORK:
            raise
    return None


def uuids() -> list[str]:
    """The uuids of all networks that libvirt knows, active or not."""
    with connected() as connection:
        return [network.UUIDString() for network in connection.listAllNetworks(0)]


def version() -> tuple[int, int, int]:
    """libvirt's version."""
    with connected() as connection:
        number = int(connection.getLibVersion())
    return number // 1_000_000, number // 1000 % 1000, number % 1000


def network_xml(name: str) -> bytes | None:
    """The XML of one network, None where libvirt knows none of that name."""
    with connected() as connection:
        try:
            return bytes(connection.networkLookupByName(name).XMLDesc(0).encode())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
                return None
            raise
