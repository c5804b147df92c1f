# SPDX-License-Identifier: LGPL-2.1-or-later
"""The text of the configuration that the dnsmasq inside a namespace reads.

libvirt has translated the whole network XML for its own dnsmasq into
/var/lib/libvirt/dnsmasq/NAME.conf.  That text is taken as it is.  Lines that libvirt adds
because the network is isolated are left out, and lines that a router needs are added.
``dnsmasq_from_xml`` writes the text where libvirt runs no dnsmasq for the network.

The user's own ``<dnsmasq:options>`` always win over added lines.

In IPv6, dnsmasq announces the gateway to guests by router advertisements.  Each subnet of
64 bits is announced.  Guests make their own addresses there, except in a subnet with a
range or fixed addresses of DHCPv6.  The rest is dnsmasq's default: dnsmasq announces
itself as DNS server.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address, IPv6Network

from libvirt_natns.addresses import Address
from libvirt_natns.daemons import dnsmasq_files, dnsmasq_from_xml
from libvirt_natns.daemons.dnsmasq_files import Files, paths
from libvirt_natns.daemons.dnsmasq_from_xml import mtu_option, ra_only
from libvirt_natns.daemons.dnsmasq_routes import ALL_ROUTED, RoutedNics
from libvirt_natns.daemons.resolv_conf import DNS_PORT, Resolvers
from libvirt_natns.model.network import Network

LEAST_IPV6_MTU = 1280
"""Octets that every link must carry in IPv6; guests ignore a lower value."""

MTU_OPTION = re.compile(r"dhcp-option(-force)?\s*=\s*(option:mtu|26)\s*,")

LEASED_FOR = "1h"
"""Time for which guests keep an address of a leased prefix after its last advertisement."""

BLANKS = " \t\v\f\r"
"""Characters that dnsmasq skips at the ends of a keyword and its value."""


@dataclass(frozen=True, slots=True)
class Advertised:
    """Facts of the way outside that guests learn by router advertisements, and by DHCP.

    ``proxied`` subnets are advertised as not on the guests' link.  Guests then reach the
    part of the subnet that is outside through their gateway.  Without ``router6`` guests are
    not told to leave by their gateway in IPv6.  ``routed`` NICs are told so in IPv4.
    """

    proxied: tuple[IPv6Network, ...] = ()
    router6: bool = True
    routed: RoutedNics = ALL_ROUTED


ADVERTISED = Advertised()


def make(
    network: Network,
    libvirts: Files | None,
    resolvers: Resolvers,
    mtu: int | None,
    kept: Iterable[tuple[str, Address]] = (),
    advertised: Advertised = ADVERTISED,
) -> Files:
    """Return all files that the dnsmasq of a network reads.

    ``libvirts`` are libvirt's own files, None where it has written none.  ``mtu``, in octets,
    is announced where the path outside is narrower than the private bridge.  ``kept`` are
    addresses reserved for guests' NICs, by MAC, of both families.
    """
    mine = paths(network.uuid)
    if libvirts is None:
        lines, users = dnsmasq_from_xml.lines(network), _options(network)
    else:
        lines, users = _derive(network, libvirts)
    lines = [_off_link(line, advertised) for line in _with_mtu(lines, users, network, mtu)]
    lines += [_off_link(line, advertised) for line in _unannounced(lines, users, network)]
    lines += [*_ra_param(users, network, mtu, advertised), *_resolution(lines, users, resolvers)]
    hosts = dnsmasq_files.hosts(network) if libvirts is None else libvirts.hosts
    hosts += dnsmasq_files.reservations(kept)
    lines += advertised.routed.lines(network, users, hosts)
    lines += [f"pid-file={mine.pid}", *(line for line in users if _key(line) != "pid-file")]
    if f"dhcp-hostsfile={mine.hosts}" not in lines and any(s.dhcp for s in network.subnets):
        # libvirt names a hosts file only where the network has <host>s.
        lines.append(f"dhcp-hostsfile={mine.hosts}")
    return Files(
        "\n".join(lines) + "\n",
        hosts=advertised.routed.hosts(network, users, hosts),
        records=dnsmasq_files.records(network.dns) if libvirts is None else libvirts.records,
    )


# -- lines -------------------------------------------------------------------


def _key(line: str) -> str:
    return line.partition("=")[0].strip(BLANKS)


def _value(line: str) -> str:
    return line.partition("=")[2].strip(BLANKS)


def _statements(text: str) -> list[str]:
    """Return the lines of a text that say something: no comments, no empty lines."""
    # dnsmasq and libvirt take no other character for a line's end.
    return [line for line in text.split("\n") if line and not line.startswith("#")]


def _options(network: Network) -> list[str]:
    """Return the lines of the user's ``<dnsmasq:options>``."""
    return [line for option in network.dnsmasq_options for line in _statements(option)]


def _ipv6_places(words: list[str]) -> list[int]:
    """Return the positions of IPv6 addresses among the words."""
    return [place for place, word in enumerate(words) if _is_ipv6(word)]


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True


# -- derived from libvirt's --------------------------------------------------


def _derive(network: Network, libvirts: Files) -> tuple[list[str], list[str]]:
    """Return libvirt's lines changed for a router, and the user's, which libvirt writes last."""
    lines = _statements(libvirts.configuration)
    users = _options(network)
    end = len(lines) - len(users)
    if lines[end:] != users:
        # The text is not this network's.  Each line may be the user's, so all are kept.
        end = len(lines)
    own = [_moved(line, network.uuid) for line in lines[:end] if not _unwanted(line)]
    return own, lines[end:]


def _unwanted(line: str) -> bool:
    """True if a line of libvirt's own is about isolation or about its process."""
    # An empty option 3 tells guests that there is no router, as does the lifetime of
    # 0 seconds in router advertisements.
    return line in ("dhcp-option=3", "no-resolv", "ra-param=*,0,0") or _key(line) == "pid-file"


def _moved(line: str, uuid: str) -> str:
    """Return a line; a line that names a file of libvirt's names our copy of it instead."""
    ours = {"dhcp-hostsfile": paths(uuid).hosts, "addn-hosts": paths(uuid).records}
    key = _key(line)
    return f"{key}={ours[key]}" if key in ours else line


# -- added -------------------------------------------------------------------


def _resolution(lines: list[str], users: list[str], resolvers: Resolvers) -> list[str]:
    """Return the lines with the servers to ask; servers in the network's XML exclude others."""
    if "no-resolv" in users:
        return []
    # libvirt's own rule: with such a <forwarder>, the host's servers are not asked.
    if any(map(_is_default_server, lines)):
        return ["no-resolv"]
    if any(_key(line) == "resolv-file" for line in users):
        return []
    if any(map(_is_default_server, users)):
        return ["no-resolv"]
    if resolvers.file is not None:
        return [f"resolv-file={resolvers.file}"]
    port = "" if resolvers.port == DNS_PORT else f"#{resolvers.port}"
    return ["no-resolv", *(f"server={server}{port}" for server in resolvers.servers)]


def _is_default_server(line: str) -> bool:
    """True if a line names a server for all names, not for one domain only."""
    return _key(line) == "server" and not _value(line).startswith("/")


def _with_mtu(lines: list[str], users: list[str], network: Network, mtu: int | None) -> list[str]:
    if mtu is None or any(map(MTU_OPTION.match, users)):
        return lines
    announced = mtu_option(network.mtu) if network.mtu else None
    return [*(line for line in lines if line != announced), mtu_option(mtu)]


def _unannounced(lines: list[str], users: list[str], network: Network) -> Iterable[str]:
    """Yield lines that announce the subnets which no line mentions yet.

    libvirt does not know leased subnets.  libvirt also does not announce a subnet beside a
    subnet with DHCPv6, and leaves it to guests that are configured by hand.
    """
    ranges = [_value(line).split(",") for line in [*lines, *users] if _key(line) == "dhcp-range"]
    if any(word.strip().startswith("constructor:") for words in ranges for word in words):
        # The user's line announces all subnets.
        return
    starts = [IPv6Address(words[place]) for words in ranges for place in _ipv6_places(words)[:1]]
    for subnet in network.subnets:
        if subnet.autonomous and not any(start in subnet.network for start in starts):
            yield f"{ra_only(subnet)},64,{LEASED_FOR}"


def _off_link(line: str, advertised: Advertised) -> str:
    """Return a line; the range of a proxied subnet is marked as not on the link."""
    words = _value(line).split(",")
    places = _ipv6_places(words) if _key(line) == "dhcp-range" else []
    addresses = [IPv6Address(words[place]) for place in places]
    if not any(address in subnet for address in addresses for subnet in advertised.proxied):
        return line
    words.insert(places[-1] + 1, "off-link")
    return f"{_key(line)}={','.join(words)}"


def _ra_param(
    users: list[str], network: Network, mtu: int | None, advertised: Advertised
) -> Iterable[str]:
    """Yield the line about router advertisements where dnsmasq's defaults do not do."""
    six = any(subnet.network.version == 6 for subnet in network.subnets)
    if not six or (mtu is None and advertised.router6):
        return
    if any(_key(line) == "ra-param" for line in users):
        return
    size = "" if mtu is None else f"mtu:{max(mtu, LEAST_IPV6_MTU)},"
    # 0 is the usual interval; the lifetime of the router is the usual one, or 0 for no router.
    yield f"ra-param=*,{size}0" + ("" if advertised.router6 else ",0")


# -- read again --------------------------------------------------------------


def default_servers(configuration: str) -> list[str]:
    """Return the servers for all names in a configuration."""
    return [_value(line) for line in _statements(configuration) if _is_default_server(line)]


def resolv_file(configuration: str) -> str | None:
    """Return the file with servers that a configuration names; None without one."""
    lines = _statements(configuration)
    return next((_value(line) for line in lines if _key(line) == "resolv-file"), None)
