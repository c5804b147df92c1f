# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking libvirt: the only user of libvirt-python.

Never from a hook: libvirt waits for the hook, and the hook would for libvirt.
Read-only connections, but for a guest's metadata.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from uuid import UUID

import libvirt

from libvirt_natns import names
from libvirt_natns.daemons import libvirtd
from libvirt_natns.daemons.libvirtd import Driver
from libvirt_natns.errors import LibvirtError
from libvirt_natns.records import dataclass

URIS = ("qemu:///system", "network:///system", "lxc:///system")
"""The monolithic daemon answers the first, a modular one for networks the second."""

ASLEEP = "its daemon does not run"


def quiet(context: object, error: object) -> None:
    """libvirt's own printing of errors; they are raised all the same."""


GUEST_URIS = ("qemu:///system", "lxc:///system")
"""Where guests are looked for, in this order."""

Where = Literal["live", "config"]
"""A running guest's own definition, or the one that it starts from next time."""

AFFECT = {"live": libvirt.VIR_DOMAIN_AFFECT_LIVE, "config": libvirt.VIR_DOMAIN_AFFECT_CONFIG}


@contextmanager
def connected(*, wake: bool = True) -> Iterator[Any]:
    """A read-only connection to the libvirt that has the networks.

    ``wake`` False leaves a daemon that systemd would start for us asleep.  Raises
    LibvirtError where none answers.
    """
    libvirt.registerErrorHandler(quiet, None)
    reasons = []
    for uri in URIS if wake else _awake(libvirtd.NETWORK):
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
    raise LibvirtError("libvirt does not answer", reasons[0] if reasons else ASLEEP)


def _awake(driver: Driver) -> tuple[str, ...]:
    daemon = driver.daemon()
    return (daemon.uri,) if daemon else ()


def active_networks(*, wake: bool = True) -> dict[str, bytes]:
    """The XML of every active network, by uuid; ``wake`` as for ``connected``."""
    flags = libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE
    return {network.UUIDString(): xml for network, xml in _listed(flags, wake=wake)}


def networks() -> dict[str, bytes]:
    """The XML of every network that libvirt knows, active or not, by name."""
    return {network.name(): xml for network, xml in _listed(0)}


def _listed(flags: int, *, wake: bool = True) -> list[tuple[Any, bytes]]:
    with connected(wake=wake) as connection:
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


# -- guests ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guest:
    """A domain, as far as its metadata is concerned."""

    _domain: Any

    @property
    def name(self) -> str:
        return str(self._domain.name())

    @property
    def uuid(self) -> str:
        return str(self._domain.UUIDString())

    @property
    def running(self) -> bool:
        return bool(self._domain.isActive())

    @property
    def places(self) -> tuple[Where, ...]:
        """Where it has definitions, as virsh's --live and --config have it."""
        config: tuple[Where, ...] = ("config",) if self._domain.isPersistent() else ()
        return (*config, "live") if self.running else config

    def document(self, where: Where) -> bytes:
        """Its XML, running or for the next start."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if where == "config" else 0
        return bytes(self._domain.XMLDesc(flags).encode())

    def write(self, where: Where, element: str | None) -> None:
        """Replace its ``<natns:nat>``; None removes it.  Raises LibvirtError."""
        kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
        try:
            self._domain.setMetadata(kind, element, "natns", names.XML_NAMESPACE, AFFECT[where])
        except libvirt.libvirtError as error:
            absent = error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA
            if not (element is None and absent):
                raise LibvirtError(
                    f"libvirt refuses to change guest {self.name}", str(error)
                ) from error


@contextmanager
def guest(named: str) -> Iterator[Guest]:
    """The guest of that name or uuid, through a connection that may change it.

    Raises LibvirtError where there is none, or no libvirt answers.
    """
    libvirt.registerErrorHandler(quiet, None)
    reasons = []
    answered = False
    for uri in GUEST_URIS:
        try:
            connection = libvirt.open(uri)
        except libvirt.libvirtError as error:
            reasons.append(str(error))
            continue
        answered = True
        try:
            domain = _find(connection, named)
            if domain is not None:
                yield Guest(domain)
                return
        except libvirt.libvirtError as error:
            raise LibvirtError("libvirt refuses a request", str(error)) from error
        finally:
            connection.close()
    if not answered:
        raise LibvirtError("libvirt does not answer", reasons[0])
    raise LibvirtError(f"there is no guest {named}", "see virsh list --all")


def _find(connection: Any, named: str) -> Any:  # noqa: ANN401
    try:
        lookup = connection.lookupByUUIDString
        named = str(UUID(named))
    except ValueError:
        lookup = connection.lookupByName
    try:
        return lookup(named)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
    return None


@dataclass(frozen=True, slots=True)
class Running:
    """The active domains' XML by uuid; ``silent`` are the URIs that did not answer."""

    domains: dict[str, bytes]
    silent: frozenset[str]

    def may_run(self, container: bool) -> bool:
        """Whether a domain that is not listed may be active all the same."""
        return GUEST_URIS[container] in self.silent


def active_domains(*, wake: bool = True) -> Running:
    """All domains that run; ``wake`` as for ``connected``.

    Raises LibvirtError where no libvirt answers.
    """
    libvirt.registerErrorHandler(quiet, None)
    found: dict[str, bytes] = {}
    reasons = dict.fromkeys(GUEST_URIS, ASLEEP)
    for uri, driver in zip(GUEST_URIS, (libvirtd.QEMU, libvirtd.LXC), strict=True):
        try:
            for address in (uri,) if wake else _awake(driver):
                found |= _active_at(address)
                # Else it is silent: nobody can tell what runs there.
                del reasons[uri]
        except libvirt.libvirtError as error:
            reasons[uri] = str(error)
    if len(reasons) == len(GUEST_URIS):
        raise LibvirtError("libvirt does not answer", reasons[GUEST_URIS[0]])
    return Running(found, frozenset(reasons))


def _active_at(uri: str) -> dict[str, bytes]:
    connection = libvirt.openReadOnly(uri)
    found = {}
    try:
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            try:
                found[domain.UUIDString()] = bytes(domain.XMLDesc(0).encode())
            except libvirt.libvirtError as error:
                # It has gone since it was listed.
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise
    finally:
        connection.close()
    return found
