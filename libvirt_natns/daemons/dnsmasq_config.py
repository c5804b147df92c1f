# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the dnsmasq of a namespace is told: pure text, no process.

libvirt has already translated the whole network XML for its own dnsmasq into
/var/lib/libvirt/dnsmasq/NAME.conf.  That text is taken as it is, minus what
libvirt adds because the network is isolated, plus what a router needs.  Only
for a network addressed by ``<natns:ip>``, which libvirt runs no dnsmasq for,
is it written here, in libvirt's own words and order.

What the user's own ``<dnsmasq:options>`` say always wins over what is added.

In IPv6, dnsmasq is what tells guests of their gateway, by router advertisements:
each subnet of 64 bits is in them.  Guests make their own addresses there, but where
it has a range or fixed addresses of DHCPv6.  The rest is dnsmasq's default: it names
itself as DNS server.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import AddressValueError, IPv6Address, IPv6Network
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.addresses import Address, parsed
from libvirt_natns.daemons.resolv_conf import Resolvers
from libvirt_natns.model.dns import Dns, ServiceRecord, TextRecord
from libvirt_natns.model.network import Network
from libvirt_natns.model.subnet import Subnet
from libvirt_natns.records import dataclass

LEAST_IPV6_MTU = 1280
"""What every link must carry in IPv6; guests ignore less."""

MTU_OPTION = re.compile(r"dhcp-option(-force)?\s*=\s*(option:mtu|26)\s*,")


LEASED_FOR = "1h"
"""How long guests keep an address of a leased prefix after its last advertisement."""

BLANKS = " \t\v\f\r"
"""What dnsmasq passes over at the ends of a keyword and its value."""

MAC = re.compile(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")

SPECIAL = re.compile(r"""[",#\\]|^ | $""")

LONGEST_LINE = 1000
"""Octets of a line of its configuration that dnsmasq reads whole, with some to spare."""


@dataclass(frozen=True, slots=True)
class Files:
    """What a dnsmasq reads, as texts.

    ``hosts`` is its ``dhcp-hostsfile`` and ``records`` its ``addn-hosts``: it
    reads both again on SIGHUP, unlike the configuration.
    """

    configuration: str
    hosts: str = ""
    records: str = ""


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the files of a network's dnsmasq are."""

    configuration: Path
    hosts: Path
    records: Path
    pid: Path


def paths(uuid: str) -> Paths:
    """The files of a network's dnsmasq, in its run-time directory."""
    stem = f"{names.network_directory(uuid)}/dnsmasq"
    return Paths(*[Path(stem + suffix) for suffix in (".conf", ".hosts", ".records", ".pid")])


def make(
    network: Network,
    libvirts: Files | None,
    resolvers: Resolvers,
    mtu: int | None,
    kept: Iterable[tuple[str, Address]] = (),
    *,
    proxied: tuple[IPv6Network, ...] = (),
    router6: bool = True,
) -> Files:
    """All that the dnsmasq of a network reads.

    ``libvirts`` are libvirt's own files, None where it has written none; ``mtu``, in
    octets, is announced where the path outside is narrower than the private bridge.
    ``kept`` are addresses reserved for guests' NICs, by MAC, of both families.  The
    ``proxied`` subnets are advertised as not on the guests' link, so that they reach
    the other part of it, outside, through their gateway.  Without ``router6`` they
    are not told to leave by it in IPv6.
    """
    mine = paths(network.uuid)
    if libvirts is None:
        lines, users = _write(network), _options(network)
    else:
        lines, users = _derive(network, libvirts)
    lines = [_off_link(line, proxied) for line in _with_mtu(lines, users, network, mtu)]
    lines += [_off_link(line, proxied) for line in _advertised(lines, users, network)]
    lines += [*_ra_param(users, network, mtu, router6), *_resolution(lines, users, resolvers)]
    lines += [f"pid-file={mine.pid}", *(line for line in users if _key(line) != "pid-file")]
    if f"dhcp-hostsfile={mine.hosts}" not in lines and any(s.dhcp for s in network.subnets):
        # libvirt names one only where the network has <host>s.
        lines.append(f"dhcp-hostsfile={mine.hosts}")
    reserved = "".join(f"{mac},{_in_hosts(address)}\n" for mac, address in kept)
    return Files(
        "\n".join(lines) + "\n",
        hosts=(_hosts(network) if libvirts is None else libvirts.hosts) + reserved,
        records=_records(network.dns) if libvirts is None else libvirts.records,
    )


# -- lines -------------------------------------------------------------------


def _key(line: str) -> str:
    return line.partition("=")[0].strip(BLANKS)


def _value(line: str) -> str:
    return line.partition("=")[2].strip(BLANKS)


def _statements(text: str) -> list[str]:
    # Neither dnsmasq nor libvirt takes any other character for a line's end.
    return [line for line in text.split("\n") if line and not line.startswith("#")]


def _options(network: Network) -> list[str]:
    """The lines of the user's ``<dnsmasq:options>``."""
    return [line for option in network.dnsmasq_options for line in _statements(option)]


def _ipv6_places(words: list[str]) -> list[int]:
    """Which of the words are addresses of IPv6."""
    return [place for place, word in enumerate(words) if _is_ipv6(word)]


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True


# -- derived from libvirt's --------------------------------------------------


def _derive(network: Network, libvirts: Files) -> tuple[list[str], list[str]]:
    """libvirt's lines fit for a router, and the user's, which libvirt writes last."""
    lines = _statements(libvirts.configuration)
    users = _options(network)
    end = len(lines) - len(users)
    if lines[end:] != users:
        # Not a text of this network's: better keep what may be the user's.
        end = len(lines)
    own = [_moved(line, network.uuid) for line in lines[:end] if not _unwanted(line)]
    return own, lines[end:]


def _unwanted(line: str) -> bool:
    """Whether a line of libvirt's own is about isolation or its process."""
    # An empty option 3 tells guests that there is no router, as does the lifetime of
    # 0 seconds in router advertisements.
    return line in ("dhcp-option=3", "no-resolv", "ra-param=*,0,0") or _key(line) == "pid-file"


def _moved(line: str, uuid: str) -> str:
    """A line that names a file of libvirt's, naming our copy of it."""
    ours = {"dhcp-hostsfile": paths(uuid).hosts, "addn-hosts": paths(uuid).records}
    key = _key(line)
    return f"{key}={ours[key]}" if key in ours else line


# -- written as libvirt would ------------------------------------------------


def _write(network: Network) -> list[str]:
    """What libvirt would write, had the network an ``<ip>`` instead of ``<natns:ip>``."""
    dns = network.dns
    return [
        "strict-order",
        *(_forwarders(dns) if dns else ["port=0"]),
        *_domain(network),
        *(["domain-needed", "local=//"] if dns and not dns.forward_plain_names else []),
        "except-interface=lo",
        "bind-dynamic",
        f"interface={network.bridge}",
        *(text_record(text) for text in (dns.texts if dns else ())),
        *(_service(record) for record in (dns.services if dns else ())),
        *_dhcp(network),
        *([f"addn-hosts={paths(network.uuid).records}"] if dns else []),
        *([_mtu_option(network.mtu)] if network.mtu else []),
        *_advertising(network),
    ]


def _forwarders(dns: Dns) -> Iterable[str]:
    for forwarder in dns.forwarders:
        domain = f"/{forwarder.domain}/" if forwarder.domain else ""
        # Without an address: the servers that are asked for all other names.
        yield f"server={domain}{forwarder.address or '#'}"


def _domain(network: Network) -> Iterable[str]:
    if network.domain is None:
        return
    if network.domain_local:
        yield f"local=/{network.domain}/"
    yield f"domain={network.domain}"
    yield "expand-hosts"


def text_record(record: TextRecord) -> str:
    """A <txt>, which dnsmasq gives out octet by octet.

    In its syntax a comma begins another string, "#" a comment, blanks at the ends are
    nothing: inside of quotes they are themselves, and there are escapes.  libvirt writes
    no quotes, so that we do only where they are needed.
    """
    value = record.value
    if SPECIAL.search(value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"txt-record={record.name},{value}"


def _service(record: ServiceRecord) -> str:
    name = f"_{record.service}._{record.protocol}"
    if record.domain:
        name += f".{record.domain}"
    if record.target in (None, ".", ""):
        return f"srv-host={name}"
    # They count by their place, so none before the last one can be left out.
    given = (record.port, record.priority, record.weight)
    last = max((place for place, value in enumerate(given, 1) if value), default=0)
    values = (record.port or 1, record.priority, record.weight)[:last]
    return ",".join([f"srv-host={name}", record.target or "", *map(str, values)])


def _dhcp(network: Network) -> Iterable[str]:
    served = [subnet for subnet in network.subnets if subnet.dhcp]
    if not served:
        return
    for subnet in sorted(served, key=lambda each: each.network.version):
        yield from _ranges(subnet)
        if subnet.network.version == 4:
            yield from ("dhcp-no-override", "dhcp-authoritative")
    size = sum(span.size for subnet in served for span in subnet.ranges)
    if size:
        yield f"dhcp-lease-max={size}"
    yield f"dhcp-hostsfile={paths(network.uuid).hosts}"


def _ranges(subnet: Subnet) -> Iterable[str]:
    six = subnet.network.version == 6
    for span in subnet.ranges:
        size = subnet.network.prefixlen if six else subnet.network.netmask
        yield f"dhcp-range={span.first},{span.last},{size}"
    if not subnet.ranges:
        # No address for strangers, yet dnsmasq must know that it serves here.
        yield f"dhcp-range={subnet.gateway},static" + (
            f",{subnet.network.prefixlen}" if six else ""
        )


def _advertising(network: Network) -> Iterable[str]:
    six = [subnet for subnet in network.subnets if subnet.network.version == 6]
    if any(subnet.dhcp for subnet in six):
        yield "enable-ra"
    else:
        yield from (_ra_only(subnet) for subnet in six if subnet.autonomous)


def _ra_only(subnet: Subnet) -> str:
    return f"dhcp-range={subnet.gateway},ra-only"


def _hosts(network: Network) -> str:
    """The ``dhcp-hostsfile``: who gets which fixed address."""
    lines = []
    for host in (host for subnet in network.subnets for host in subnet.hosts):
        address = _in_hosts(host.ip)
        if host.ip.version == 6:
            words = [host.mac, host.id and f"id:{host.id}", host.name, address]
        else:
            words = [host.mac, address, host.name] if host.mac else [host.name, address]
        lines.append(",".join(word for word in words if word))
    return "".join(f"{line}\n" for line in lines)


def _in_hosts(address: Address) -> str:
    """An address in a ``dhcp-hostsfile``."""
    return str(address) if address.version == 4 else f"[{address}]"


def reserved(text: str) -> Iterable[tuple[str, Address]]:
    """MACs with their addresses from a ``dhcp-hostsfile``: of entries of nothing else."""
    for line in text.splitlines():
        mac, comma, address = line.partition(",")
        if comma and MAC.fullmatch(mac):
            with suppress(ValueError):
                yield mac.lower(), parsed(address.strip("[]"))


def _records(dns: Dns | None) -> str:
    """The ``addn-hosts``: names beside those of DHCP clients."""
    hosts = dns.hosts if dns else ()
    return "".join("\t".join((str(host.ip), *host.names)) + "\n" for host in hosts)


# -- what is added -----------------------------------------------------------


def _resolution(lines: list[str], users: list[str], resolvers: Resolvers) -> list[str]:
    """Whom to ask.  Those whom the network's own XML names are asked alone."""
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
    return ["no-resolv", *(f"server={server}" for server in resolvers.servers)]


def _is_default_server(line: str) -> bool:
    """Whether a line names a server for all names, not for one domain's only."""
    return _key(line) == "server" and not _value(line).startswith("/")


def _mtu_option(mtu: int) -> str:
    return f"dhcp-option=option:mtu,{mtu}"


def _with_mtu(lines: list[str], users: list[str], network: Network, mtu: int | None) -> list[str]:
    if mtu is None or any(map(MTU_OPTION.match, users)):
        return lines
    announced = _mtu_option(network.mtu) if network.mtu else None
    return [*(line for line in lines if line != announced), _mtu_option(mtu)]


def _advertised(lines: list[str], users: list[str], network: Network) -> Iterable[str]:
    """What makes subnets known to guests of which no line says anything yet.

    Those are leased ones, which libvirt knows nothing of, and those beside one with
    DHCPv6, which it leaves to guests that are configured by hand.
    """
    said = [_value(line).split(",") for line in [*lines, *users] if _key(line) == "dhcp-range"]
    if any(word.strip().startswith("constructor:") for words in said for word in words):
        # The user's: for whatever subnets there are.
        return
    starts = [IPv6Address(words[place]) for words in said for place in _ipv6_places(words)[:1]]
    for subnet in network.subnets:
        if subnet.autonomous and not any(start in subnet.network for start in starts):
            yield f"{_ra_only(subnet)},64,{LEASED_FOR}"


def _off_link(line: str, proxied: tuple[IPv6Network, ...]) -> str:
    """A line, or, for a range of a proxied subnet, one that says so."""
    words = _value(line).split(",")
    places = _ipv6_places(words) if _key(line) == "dhcp-range" else []
    if not any(IPv6Address(words[place]) in each for place in places for each in proxied):
        return line
    words.insert(places[-1] + 1, "off-link")
    return f"{_key(line)}={','.join(words)}"


def _ra_param(users: list[str], network: Network, mtu: int | None, router6: bool) -> Iterable[str]:
    """What router advertisements say beyond dnsmasq's defaults."""
    six = any(subnet.network.version == 6 for subnet in network.subnets)
    if not six or (mtu is None and router6) or any(_key(line) == "ra-param" for line in users):
        return
    size = "" if mtu is None else f"mtu:{max(mtu, LEAST_IPV6_MTU)},"
    # The usual interval, and unless otherwise said the usual lifetime of the router.
    yield f"ra-param=*,{size}0" + ("" if router6 else ",0")
