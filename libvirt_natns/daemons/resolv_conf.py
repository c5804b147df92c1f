# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's real DNS resolvers.

/etc/resolv.conf may name only a stub on the loopback interface, which no namespace can
reach.  The programs that write a stub there keep the real servers in a file of their own.
A server counts if the namespace has a way outside in the server's family.  A server with a
link-local address never counts, as the address means another link in a namespace.
"""

from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from libvirt_natns.addresses import FAMILIES, Address, Family

SOURCES = (
    Path("/etc/resolv.conf"),
    Path("/run/systemd/resolve/resolv.conf"),
    Path("/run/NetworkManager/no-stub-resolv.conf"),
    Path("/run/resolvconf/resolv.conf"),
    Path("/run/dnsmasq/resolv.conf"),
)


DNS_PORT = 53


@dataclass(frozen=True, slots=True)
class Resolvers:
    """The servers that a namespace's dnsmasq asks: a file that it polls, or fixed servers.

    The file is used where dnsmasq can take it as it is.  The guests of a laptop then follow the
    laptop to other networks.  dnsmasq skips servers of a family in which it has no way outside.
    But it would ask a stub, which is not there.  ``port`` is the port of all servers.
    """

    servers: tuple[Address, ...] = ()
    file: Path | None = None
    port: int = DNS_PORT


def nameservers(text: str) -> list[Address]:
    """Return the servers that a file names, in its order."""
    servers = []
    for line in text.split("\n"):
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                servers.append(ip_address(words[1]))
            except ValueError:
                continue
    return servers


def host_resolvers(
    sources: tuple[Path, ...] = SOURCES, families: Collection[Family] = FAMILIES[:1]
) -> Resolvers:
    """Return the resolvers of the first source that names a server outside the host.

    Only servers of ``families`` count.
    """
    for source in sources:
        try:
            listed = nameservers(source.read_bytes().decode(errors="replace"))
        except OSError:
            continue
        usable = [a for a in listed if is_outside(a) and a.version in families]
        if usable:
            stub = any(address.is_loopback for address in listed)
            return Resolvers(tuple(usable), None if stub else source)
    return Resolvers()


def is_outside(address: Address) -> bool:
    """True if an address means the same in another namespace."""
    return not (address.is_loopback or address.is_link_local)
