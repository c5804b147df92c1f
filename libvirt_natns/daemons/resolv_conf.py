# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's real DNS resolvers.

/etc/resolv.conf may name only a stub on the loopback interface, which no
namespace can reach; the programs that put it there keep the real servers in a
file of their own.  Servers count that can be reached by a family which the namespace
has outside; one with a link-local address never does, for that is another link there.
"""

from collections.abc import Collection
from ipaddress import ip_address
from pathlib import Path

from libvirt_natns.addresses import FAMILIES, Address, Family
from libvirt_natns.records import dataclass

SOURCES = (
    Path("/etc/resolv.conf"),
    Path("/run/systemd/resolve/resolv.conf"),
    Path("/run/NetworkManager/no-stub-resolv.conf"),
    Path("/run/resolvconf/resolv.conf"),
    Path("/run/dnsmasq/resolv.conf"),
)


@dataclass(frozen=True, slots=True)
class Resolvers:
    """Whom a namespace's dnsmasq asks: a file that it polls, or fixed servers.

    The file is used where dnsmasq can take it as it is, so that a laptop that
    changes networks takes its guests along.  It passes over servers of a family
    by which it reaches nobody, but would ask a stub that is not there.
    """

    servers: tuple[Address, ...] = ()
    file: Path | None = None


def _nameservers(text: str) -> list[Address]:
    found = []
    for line in text.split("\n"):
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append(ip_address(words[1]))
            except ValueError:
                continue
    return found


def host_resolvers(
    sources: tuple[Path, ...] = SOURCES, families: Collection[Family] = FAMILIES[:1]
) -> Resolvers:
    """The resolvers of the first source that names one outside the host.

    ``families`` are those that count.
    """
    for source in sources:
        try:
            listed = _nameservers(source.read_bytes().decode(errors="replace"))
        except OSError:
            continue
        usable = [a for a in listed if _is_outside(a) and a.version in families]
        if usable:
            stub = any(address.is_loopback for address in listed)
            return Resolvers(tuple(usable), None if stub else source)
    return Resolvers()


def _is_outside(address: Address) -> bool:
    """Whether an address means the same in another namespace."""
    return not (address.is_loopback or address.is_link_local)
