# SPDX-License-Identifier: LGPL-2.1-or-later
"""Is a network or a guest ours, so that a failure may stop its start?

A failure stops no other start.  The question is asked where something has failed, so
the answer needs neither the state database, the configuration nor a library to be well:

* A network with ``<forward>``, with enabled="no", without an address or, in scope
  "annotated", without ``<natns:nat>`` is not ours.
* Where the configuration cannot be read, a network is ours that has
  ``<natns:nat>`` or that was handled before.  Any other starts as libvirt makes it:
  a typo for one network must not stop the others.
* A guest is ours that has a NIC in a network with a namespace.

The standard library's barest part, for hooks.
"""

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from libvirt_natns.documents.xml_sniff import Glance

CONFIG_FILE = "/etc/libvirt-natns/config.toml"
DATABASE = "/var/lib/libvirt-natns/state.db"
NETWORKS = "/run/libvirt-natns/networks"
NAMESPACES = "/run/netns"
LINKS = "/sys/class/net"

LONGEST = 1 << 20
"""Octets of the configuration in which the scope is looked for."""


def scope() -> str:
    """Return the configuration's ``scope``, also where the rest of the file is wrong.

    "isolated", the default, for anything else than plain "annotated": the
    configuration itself is read later.
    """
    try:
        with open(CONFIG_FILE, "rb") as file:
            lines = file.read(LONGEST).splitlines()
    except OSError:
        return "isolated"
    for line in lines:
        key, equals, value = line.partition(b"=")
        if key.lstrip().startswith(b"["):
            break
        if equals and key.strip() in (b"scope", b'"scope"', b"'scope'"):
            plain = value.partition(b"#")[0].strip()
            return "annotated" if plain in (b'"annotated"', b"'annotated'") else "isolated"
    return "isolated"


def of_network(seen: "Glance") -> bool:
    """True if a network is ours, so that its start may be refused."""
    if not seen.ours(scope()):
        return False
    return seen.annotated or _is_configured() or was_handled(seen.uuid)


def of_guest(seen: "Glance") -> bool:
    """True if a guest has a NIC in a network of ours that runs."""
    from libvirt_natns import names

    namespaces = {names.namespace(network) for network in seen.networks}
    namespaces |= {names.former_namespace(network) for network in seen.networks}
    return not namespaces.isdisjoint(_list(NAMESPACES)) or any(map(_has_patch, seen.bridges))


def was_handled(uuid: str) -> bool:
    """True if a network has been handled, as far as readable files show it."""
    if not uuid:
        return False
    if uuid in _list(NETWORKS):
        return True
    try:
        from libvirt_natns.state.recorded import has_network

        return has_network(DATABASE, uuid)
    except Exception:  # a broken database, or module, has no answer
        return False


def _is_configured() -> bool:
    """True if the configuration can be read."""
    try:
        from libvirt_natns.documents import config

        config.load()
    except Exception:  # its reader, too, may be broken
        return False
    return True


def _has_patch(bridge: str) -> bool:
    """True if a bridge leads to a namespace of ours."""
    from libvirt_natns.names import PRIVATE_PREFIX

    ports = [] if "/" in bridge else _list(f"{LINKS}/{bridge}/brif")
    return any(port.startswith(PRIVATE_PREFIX) for port in ports)


def _list(directory: str) -> list[str]:
    try:
        return posix.listdir(directory)
    except OSError:
        return []
