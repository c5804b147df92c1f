# SPDX-License-Identifier: LGPL-2.1-or-later
"""Questions to libvirt, and changes of guests' metadata, by libvirt-python.

A hook must not use this module: libvirt waits for the hook, and the hook would wait for
libvirt.  Connections are read-only, except to change a guest's metadata.

Without libvirt-python each question raises LibvirtError, as without an answer of libvirt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn
from uuid import UUID

from libvirt_natns import names
from libvirt_natns.daemons import libvirtd
from libvirt_natns.daemons.libvirtd import Driver
from libvirt_natns.errors import LibvirtError
from libvirt_natns.values import did_you_mean, quoted


class _Missing:
    """Stands for the library that cannot be loaded: each use of it raises LibvirtError."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> NoReturn:
        raise LibvirtError(
            f"the Python module libvirt cannot be loaded ({self._reason})",
            "install python3-libvirt",
        )


try:
    import libvirt
except ImportError as error:
    libvirt = _Missing(str(error))

URIS = ("qemu:///system", "network:///system", "lxc:///system")
"""The monolithic daemon answers the first, a modular daemon for networks the second."""

ASLEEP = "start its daemon"


def quiet(context: object, error: object) -> None:
    """Print no error of libvirt, which raises the error as well."""


QEMU_URI = "qemu:///system"
LXC_URI = "lxc:///system"
GUEST_URIS = (QEMU_URI, LXC_URI)
"""The drivers of guests, in the order of the search."""

Where = Literal["live", "config"]
"""The definition of a running guest, or the definition for its next start."""


@contextmanager
def connected(
    *, wake: bool = True, write: bool = False, driver: Driver | None = None
) -> Iterator[Any]:
    """Open a connection, read-only unless ``write``, to the libvirt that has the networks.

    ``wake`` False does not start a daemon that systemd would start for us.  A ``driver``
    names another daemon than that of networks.  Raises LibvirtError where no daemon answers.
    """
    libvirt.registerErrorHandler(quiet, None)
    reasons = []
    uris = URIS if driver is None else (f"{driver.scheme}:///system",)
    for uri in uris if wake else _awake(driver or libvirtd.NETWORK):
        try:
            connection = libvirt.open(uri) if write else libvirt.openReadOnly(uri)
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
    """Return the URI of a driver if its daemon runs."""
    daemon = driver.daemon()
    return (daemon.uri,) if daemon else ()


def active_networks(*, wake: bool = True) -> dict[str, bytes]:
    """Return the XML of every active network, by uuid; ``wake`` as for ``connected``."""
    flags = libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE
    return {network.UUIDString(): xml for network, xml in _listed(flags, wake=wake)}


def networks() -> dict[str, bytes]:
    """Return the XML of every network that libvirt knows, active or not, by name."""
    return {network.name(): xml for network, xml in _listed(0)}


def _listed(flags: int, *, wake: bool = True) -> list[tuple[Any, bytes]]:
    """Return networks with their XML, without networks that end during the call."""
    with connected(wake=wake) as connection:
        listed = [(network, xml_of(network)) for network in connection.listAllNetworks(flags)]
    return [(network, xml) for network, xml in listed if xml is not None]


def xml_of(listed: Any, *, definition: bool = False) -> bytes | None:  # noqa: ANN401
    """Return the XML of a listed network or guest; None where it has ended since.

    ``definition``: a guest's definition for its next start.
    """
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE if definition else 0
    try:
        return bytes(listed.XMLDesc(flags).encode())
    except libvirt.libvirtError as error:
        if error.get_error_code() not in (libvirt.VIR_ERR_NO_NETWORK, libvirt.VIR_ERR_NO_DOMAIN):
            raise
    return None


def uuids() -> list[str]:
    """Return the uuids of all networks that libvirt knows, active or not."""
    with connected() as connection:
        return [network.UUIDString() for network in connection.listAllNetworks(0)]


def autostart(uuid: str) -> bool:
    """Start a network that libvirt starts by itself; False if it runs, or is no such network.

    A hook must not call this: libvirt waits for the hook.  Raises LibvirtError.
    """
    flag = "VIR_CONNECT_LIST_NETWORKS_"
    flags = getattr(libvirt, f"{flag}INACTIVE") | getattr(libvirt, f"{flag}AUTOSTART")
    with connected(wake=False, write=True) as connection:
        idle = {each.UUIDString(): each for each in connection.listAllNetworks(flags)}
        if uuid in idle:
            idle[uuid].create()
    return uuid in idle


def version() -> tuple[int, int, int]:
    """Return libvirt's version."""
    with connected() as connection:
        number = int(connection.getLibVersion())
    return number // 1_000_000, number // 1000 % 1000, number % 1000


def network_xml(name: str) -> bytes | None:
    """Return the XML of a network by its name; None where libvirt knows no such network."""
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
    """A domain with its definitions and its metadata."""

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
        """The guest's definitions, in the terms of virsh's --live and --config."""
        config: tuple[Where, ...] = ("config",) if self._domain.isPersistent() else ()
        return (*config, "live") if self.running else config

    def document(self, where: Where) -> bytes:
        """Return the guest's XML, as it runs or for its next start."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if where == "config" else 0
        return bytes(self._domain.XMLDesc(flags).encode())

    def write(self, where: Where, element: str | None) -> None:
        """Replace the guest's ``<natns:nat>``; None removes it.  Raises LibvirtError."""
        kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
        live, config = libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG
        flags = live if where == "live" else config
        try:
            self._domain.setMetadata(kind, element, "natns", names.XML_NAMESPACE, flags)
        except libvirt.libvirtError as error:
            absent = error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA
            if not (element is None and absent):
                raise LibvirtError(
                    f"libvirt refuses to change guest {quoted(self.name)}", str(error)
                ) from error


@contextmanager
def guest(named: str) -> Iterator[Guest]:
    """Open the guest of that name or uuid for changes.

    Raises LibvirtError where there is no such guest, or no libvirt answers.
    """
    libvirt.registerErrorHandler(quiet, None)
    reasons = []
    others: list[str] = []
    for uri in GUEST_URIS:
        try:
            connection = libvirt.open(uri)
        except libvirt.libvirtError as error:
            reasons.append(str(error))
            continue
        try:
            domain = _find(connection, named)
            if domain is not None:
                yield Guest(domain)
                return
            others += [other.name() for other in connection.listAllDomains(0)]
        except libvirt.libvirtError as error:
            raise LibvirtError("libvirt refuses a request", str(error)) from error
        finally:
            connection.close()
    if len(reasons) == len(GUEST_URIS):
        raise LibvirtError("libvirt does not answer", reasons[0])
    hint = did_you_mean(named, others)
    raise LibvirtError(f"there is no guest {quoted(named)}{hint}", "see virsh list --all")


def _find(connection: Any, named: str) -> Any:  # noqa: ANN401
    """Return a domain by its uuid or name; None where the connection has no such domain."""
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
class ActiveDomains:
    """The active domains' XML by uuid; ``silent`` are the URIs that did not answer."""

    domains: dict[str, bytes]
    silent: frozenset[str]

    def may_run(self, container: bool) -> bool:
        """True if an unlisted domain may still be running because its driver did not answer."""
        return (LXC_URI if container else QEMU_URI) in self.silent


def active_domains(*, wake: bool = True) -> ActiveDomains:
    """Return all domains that run; ``wake`` as for ``connected``.

    Raises LibvirtError where no libvirt answers.
    """
    libvirt.registerErrorHandler(quiet, None)
    domains: dict[str, bytes] = {}
    reasons = dict.fromkeys(GUEST_URIS, ASLEEP)
    for uri, driver in zip(GUEST_URIS, (libvirtd.QEMU, libvirtd.LXC), strict=True):
        try:
            for address in (uri,) if wake else _awake(driver):
                domains |= _active_at(address)
                # The driver has answered.  Domains of a silent driver are unknown.
                del reasons[uri]
        except libvirt.libvirtError as error:
            reasons[uri] = str(error)
    if len(reasons) == len(GUEST_URIS):
        raise LibvirtError("libvirt does not answer", reasons[GUEST_URIS[0]])
    return ActiveDomains(domains, frozenset(reasons))


def _active_at(uri: str) -> dict[str, bytes]:
    connection = libvirt.openReadOnly(uri)
    try:
        listed = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        found = {domain.UUIDString(): xml_of(domain) for domain in listed}
    finally:
        connection.close()
    return {uuid: xml for uuid, xml in found.items() if xml is not None}
