# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every name that libvirt-natns gives to something in the kernel or on disk.

Names are made from a network's name or uuid, and never cut off.  A name that does not fit is
replaced by a readable slug with a hash of the whole.
"""

import hashlib
import os
import re
import sys
from functools import cache
from pathlib import Path

CONFIG_FILE = Path("/etc/libvirt-natns/config.toml")
STATE_DIRECTORY = Path("/var/lib/libvirt-natns")
RUN_DIRECTORY = Path("/run/libvirt-natns")
NETNS_DIRECTORY = Path("/run/netns")
MACHINE_ID = Path("/etc/machine-id")

XML_NAMESPACE = "urn:libvirt-natns:1"

UPSTREAM_LINK = "upstream"
"""The namespace's end of the patch into the upstream."""

IFNAMSIZ = 15
"""Longest interface name that the kernel takes, in characters."""

PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}")
SLUG_LENGTH = 32

ROUTER_PREFIX = "natns-router-"
ROUTER_HOST_LINK = "host"
"""The router namespace's end of the patch to the host."""

ROUTER_TRANSIT = "transit"
"""The bridge in the router namespace to which namespaces of networks attach."""

PRIVATE_PREFIX = "natin-"
UPSTREAM_PREFIX = "natup-"

RELAY_PREFIX = "relay-"

GUEST_PREFIX = "vnet"
"""libvirt's names of guests' ports of a bridge: taps, and containers' veth pairs."""


def library() -> Path:
    """Return the directory that holds this very package."""
    return Path(__file__).resolve().parent.parent


def resource(name: str) -> Path:
    """Return a file that is shipped with the package, such as "hooks/network"."""
    return Path(__file__).resolve().parent / name


def python_command(program: str, *arguments: str, options: str = "-I") -> tuple[str, ...]:
    """Return the command line of another process that runs a Python program with this package.

    The interpreter and the package are this process's own, regardless of the other's PATH and
    directory.  ``options`` are the interpreter's.
    """
    path = f"import sys; sys.path.append({os.fspath(library())!r}); "
    return (sys.executable, options, "-c", path + program, *arguments)


WHOLE_DIGEST = 64
"""Hexadecimal digits of a whole SHA-256."""


def digest(text: str, length: int = 8) -> str:
    """Return the first ``length`` hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def slug(name: str) -> str:
    """Return ``name`` if it is a plain file name, else a readable slug with a hash."""
    return name if PLAIN.fullmatch(name) else _readable(name, SLUG_LENGTH)


def _readable(name: str, length: int) -> str:
    """Return a readable file name with a hash; ``length`` is that of its first part."""
    readable = re.sub(r"[^A-Za-z0-9_.+]+", "-", name).strip("-.")[:length]
    return f"{readable or 'network'}-{digest(name)}"


def network_slug(name: str) -> str:
    """Return a network's name if it is a plain file name, else a slug that is no plain name.

    A slug of another form could be another network's name.
    """
    return name if PLAIN.fullmatch(name) else f"+{_readable(name, SLUG_LENGTH - 1)}"


def namespace(network: str) -> str:
    """Return the namespace of the network of that name."""
    return f"nat-{network_slug(network)}"


def former_namespace(network: str) -> str:
    """Return the namespace that earlier versions gave the network of that name."""
    return f"nat-{slug(network)}"


def namespace_path(name: str) -> str:
    """Return the file under which ``ip netns`` knows a namespace."""
    return os.fspath(NETNS_DIRECTORY / name)


def private_patch(uuid: str) -> str:
    """Return the host end of the patch between a private bridge and its namespace."""
    return PRIVATE_PREFIX + digest(uuid, IFNAMSIZ - len(PRIVATE_PREFIX))


def upstream_patch(uuid: str) -> str:
    """Return the host end of the patch between an upstream bridge and a namespace."""
    return UPSTREAM_PREFIX + digest(uuid, IFNAMSIZ - len(UPSTREAM_PREFIX))


def link_group(uuid: str) -> int:
    """Return a network's number for a group of links (ip-link(8)), out of the way of others'."""
    return 1 << 30 | int(digest(uuid, 7), 16)


def altname(patch: str, network: str) -> str:
    """Return the altname of a patch's host end; ``patch`` is "private" or "upstream"."""
    return f"natns-{patch}-{network_slug(network)}"


def transit_bridge(upstream: str) -> str:
    """Return the private transit bridge of an upstream of kind "host"."""
    name = f"natns-{upstream}"
    plain = re.fullmatch(r"[a-z0-9-]+", upstream) and len(name) <= IFNAMSIZ
    return name if plain else f"natns-{digest(upstream)}"


def router_namespace(upstream: str) -> str:
    """Return the namespace of an upstream of kind "router"."""
    return f"{ROUTER_PREFIX}{slug(upstream)}"


def router_patch(upstream: str) -> str:
    """Return the host end of the patch between the host and its router namespace."""
    return transit_bridge(upstream)


def router_file(upstream: str, kind: str) -> Path:
    """Return a file of a router's lasting state; ``kind`` is the file's suffix."""
    return STATE_DIRECTORY / "routers" / f"{slug(upstream)}.{kind}"


@cache
def machine_id() -> str:
    """Return the machine's id (machine-id(5)); "" if it has none."""
    try:
        return MACHINE_ID.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def mac(uuid: str, end: str) -> str:
    """Return a stable MAC address for one end of a network's patches.

    Ends: ``inner`` and ``upstream`` in the namespace, ``private-port`` and ``upstream-port`` in
    the host.  A bridge without an address of its own takes its lowest port's.  So the ports'
    addresses start with fe, as libvirt's do: an uplink bridge keeps the address that its neighbours
    know.

    A network's XML is often copied from host to host with its uuid.  So the address on the
    upstream's segment depends on the machine, too.
    """
    seed = f"{end} {uuid} {machine_id()}" if end == "upstream" else f"{end} {uuid}"
    octets = bytearray(hashlib.sha256(seed.encode()).digest()[:6])
    octets[0] = 0xFE if end.endswith("-port") else 0x0A
    return ":".join(f"{octet:02x}" for octet in octets)


def client_id(uuid: str) -> str:
    """Return a network's client-id for a DHCP server (option 61), in hexadecimal digits.

    It has the form of RFC 4361, with a uuid (RFC 6355) made from the network and the machine: see
    ``mac``.
    """
    return "ff" + "00000001" + "0004" + digest(f"dhcp {uuid} {machine_id()}", 32)


def guest_directory(uuid: str) -> Path:
    """Return the run-time mark of a guest with metadata of ours, which is also its lock."""
    return RUN_DIRECTORY / "guests" / uuid


def network_directory(uuid: str) -> Path:
    """Return the directory of a network's run-time files."""
    return RUN_DIRECTORY / "networks" / uuid


def dhcp_directory(uuid: str) -> Path:
    """Return the directory of a network's DHCP client; the code that ends the client removes
    it."""
    # The clients have no common directory: removing it with the last would disturb the next.
    return RUN_DIRECTORY / f"dhcp-{uuid}"


def relay_directory(bridge: str) -> Path:
    """Return the directory of the run-time files of the DNS relay on a transit bridge."""
    return RUN_DIRECTORY / f"{RELAY_PREFIX}{bridge}"
