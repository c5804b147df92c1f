# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's real DNS resolvers.

/etc/resolv.conf may name only a stub on the loopback interface, which no
namespace can reach; the programs that put it there keep the real servers in a
file of their own.  IPv6 servers are left out: a namespace has no IPv6 yet.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

SOURCES = (
    Path("/etc/resolv.conf"),
    Path("/run/systemd/resolve/resolv.conf"),
    Path("/run/NetworkManager/no-stub-resolv.conf"),
    Path("/run/resolvconf/resolv.conf"),
)


@dataclass(frozen=True, slots=True)
class Resolvers:
    """Whom a namespace's dnsmasq asks: a file that it polls, or fixed servers.

    The file is used where every server in it can be reached, so that a laptop
    that changes networks takes its guests along.
    """

    servers: tuple[IPv4Address, ...] = ()
    file: Path | None = None


def _nameservers(text: str) -> list[IPv4Address | IPv6Address]:
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append(ip_address(words[1]))
            except ValueError:
                continue
    return found


def host_resolvers(sources: tuple[Path, ...] = SOURCES) -> Resolvers:
    """The resolvers of the first source that names one outside the host."""
    for source in sources:
        try:
            listed = _nameservers(source.read_text(errors="replace"))
        except OSError:
            continue
        usable = [a for a in listed if isinstance(a, IPv4Address) and not a.is_loopback]
        if usable:
            whole = len(usable) == len(listed)
            return Resolvers(tuple(usable), source if whole else None)
    return Resolvers()
