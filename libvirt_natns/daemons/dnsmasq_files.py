# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files that a network's dnsmasq reads: their paths, and the lines of its hosts files."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.addresses import Address, parsed
from libvirt_natns.daemons.text_files import text_if_any
from libvirt_natns.model.dns import Dns
from libvirt_natns.model.network import Network

ELSEWHERE = IPv4Address("127.0.0.1")
"""The first address of entries that place a NIC in another network; no network has it."""

MACS_IN_A_LINE = 32
"""NICs in such an entry; dnsmasq reads lines of some 1000 octets."""

MAC = re.compile(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")


@dataclass(frozen=True, slots=True)
class Files:
    """The texts that a dnsmasq reads.

    ``hosts`` is its ``dhcp-hostsfile`` and ``records`` its ``addn-hosts``: dnsmasq reads
    both again on SIGHUP, unlike the configuration.
    """

    configuration: str
    hosts: str = ""
    records: str = ""


@dataclass(frozen=True, slots=True)
class Paths:
    """The paths of the files of a network's dnsmasq."""

    configuration: Path
    hosts: Path
    records: Path
    pid: Path


def paths(uuid: str) -> Paths:
    """Return the files of a network's dnsmasq, in its run-time directory."""
    stem = f"{names.network_directory(uuid)}/dnsmasq"
    return Paths(*[Path(stem + suffix) for suffix in (".conf", ".hosts", ".records", ".pid")])


def present(uuid: str) -> Files:
    """Return the files that a network's dnsmasq was given; empty texts for missing files."""
    files = paths(uuid)
    return Files(*map(text_if_any, (files.configuration, files.hosts, files.records)))


# -- hosts files -------------------------------------------------------------


def hosts(network: Network) -> str:
    """Return the ``dhcp-hostsfile``: the fixed addresses of the network's XML."""
    lines = []
    for host in (host for subnet in network.subnets for host in subnet.hosts):
        address = _in_hosts(host.ip)
        if host.ip.version == 6:
            words = [host.mac, host.id and f"id:{host.id}", host.name, address]
        else:
            words = [host.mac, address, host.name] if host.mac else [host.name, address]
        lines.append(",".join(word for word in words if word))
    return "".join(f"{line}\n" for line in lines)


def reservations(kept: Iterable[tuple[str, Address]]) -> str:
    """Return the lines of a ``dhcp-hostsfile`` that reserve addresses for guests' MACs."""
    return "".join(f"{mac},{_in_hosts(address)}\n" for mac, address in kept)


def elsewhere(macs: Iterable[str]) -> str:
    """Return lines of a ``dhcp-hostsfile`` that place NICs in another network, by MAC address."""
    listed = list(macs)
    groups = (listed[at : at + MACS_IN_A_LINE] for at in range(0, len(listed), MACS_IN_A_LINE))
    # dnsmasq takes no address twice.
    return "".join(f"{','.join(group)},{ELSEWHERE + at}\n" for at, group in enumerate(groups))


def entered(hosts: str) -> Iterator[str]:
    """Yield the MAC addresses with an entry for IPv4 in a ``dhcp-hostsfile``."""
    for line in hosts.split("\n"):
        mac, _, rest = line.partition(",")
        if MAC.fullmatch(mac) and "[" not in rest:
            yield mac.lower()


def _in_hosts(address: Address) -> str:
    return str(address) if address.version == 4 else f"[{address}]"


def by_mac(text: str) -> Iterator[tuple[str, Address]]:
    """Yield MAC and address of each entry in a ``dhcp-hostsfile`` that has both."""
    for line in text.split("\n"):
        mac, *others = line.split(",")
        for word in others if MAC.fullmatch(mac) else ():
            with suppress(ValueError):
                address = parsed(word.strip("[]"))
                if not address.is_loopback:
                    yield mac.lower(), address


def reserved(text: str) -> Iterator[tuple[str, Address]]:
    """Yield MAC and address of each reservation in a ``dhcp-hostsfile``.

    Entries with anything else, such as a name, are no reservations of ours.
    """
    for line in text.split("\n"):
        if line.count(",") == 1:
            yield from by_mac(line)


def records(dns: Dns | None) -> str:
    """Return the ``addn-hosts``: names beside the names of DHCP clients."""
    entries = dns.hosts if dns else ()
    return "".join("\t".join((str(entry.ip), *entry.names)) + "\n" for entry in entries)
