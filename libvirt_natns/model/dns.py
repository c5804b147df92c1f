# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's ``<dns>``: forwarders, and records that dnsmasq serves."""

from dataclasses import dataclass

from libvirt_natns.addresses import Address


@dataclass(frozen=True, slots=True)
class Forwarder:
    """libvirt's ``<forwarder>``: the DNS server for a domain's names.

    ``domain`` None means all names, ``address`` None the default servers.
    """

    domain: str | None = None
    address: Address | None = None


@dataclass(frozen=True, slots=True)
class DnsHost:
    """libvirt's ``<host>`` in ``<dns>``: names for an address."""

    ip: Address
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TextRecord:
    """libvirt's ``<txt>``."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """libvirt's ``<srv>``; ``target`` None or "." means that there is no such service."""

    service: str
    protocol: str
    domain: str | None = None
    target: str | None = None
    port: int = 0
    priority: int = 0
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Dns:
    """libvirt's ``<dns>``.

    ``forward_plain_names``: names without a dot are asked of servers outside, too.
    """

    forward_plain_names: bool = True
    forwarders: tuple[Forwarder, ...] = ()
    hosts: tuple[DnsHost, ...] = ()
    texts: tuple[TextRecord, ...] = ()
    services: tuple[ServiceRecord, ...] = ()
