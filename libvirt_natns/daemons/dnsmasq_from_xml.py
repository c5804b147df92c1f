# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dnsmasq configuration of a network that libvirt runs no dnsmasq for, made from its XML.

libvirt runs no dnsmasq for a network that is addressed by ``<natns:ip>``.  The lines here
have libvirt's own words and order, as if the network had an ``<ip>``.
"""

import re
from collections.abc import Iterable

from libvirt_natns.daemons.dnsmasq_files import paths
from libvirt_natns.model.dns import Dns, ServiceRecord, TextRecord
from libvirt_natns.model.network import Network
from libvirt_natns.model.subnet import Subnet

SPECIAL = re.compile(r"""[",#\\]|^ | $""")
"""Characters of a text that have a meaning in dnsmasq's syntax."""

LONGEST_LINE = 1000
"""Octets of a configuration line that dnsmasq surely reads whole; its own limit is a bit higher."""


def lines(network: Network) -> list[str]:
    """Return the lines that libvirt would write for an ``<ip>`` instead of ``<natns:ip>``."""
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
        *([mtu_option(network.mtu)] if network.mtu else []),
        *_advertising(network),
    ]


def _forwarders(dns: Dns) -> Iterable[str]:
    for forwarder in dns.forwarders:
        domain = f"/{forwarder.domain}/" if forwarder.domain else ""
        # "#" stands for the servers that answer for all other names.
        yield f"server={domain}{forwarder.address or '#'}"


def _domain(network: Network) -> Iterable[str]:
    if network.domain is None:
        return
    if network.domain_local:
        yield f"local=/{network.domain}/"
    yield f"domain={network.domain}"
    yield "expand-hosts"


def text_record(record: TextRecord) -> str:
    """Return the line of a <txt>, which dnsmasq gives out octet by octet.

    In dnsmasq's syntax a comma begins another string, "#" begins a comment, and blanks at
    the ends are dropped.  In quotes these characters stand for themselves, and there are
    escapes.  libvirt writes no quotes, so this line has quotes only where it needs them.
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
    # dnsmasq reads these values by position, so only values at the end may be left out.
    given = (record.port, record.priority, record.weight)
    count = max((place for place, value in enumerate(given, 1) if value), default=0)
    values = (record.port or 1, record.priority, record.weight)[:count]
    return ",".join([f"srv-host={name}", record.target or "", *map(str, values)])


def _dhcp(network: Network) -> Iterable[str]:
    served = [subnet for subnet in network.subnets if subnet.dhcp]
    if not served:
        return
    for subnet in sorted(served, key=lambda subnet: subnet.network.version):
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
        # Guests without a reservation get no address, yet dnsmasq must serve this subnet.
        yield f"dhcp-range={subnet.gateway},static" + (
            f",{subnet.network.prefixlen}" if six else ""
        )


def _advertising(network: Network) -> Iterable[str]:
    six = [subnet for subnet in network.subnets if subnet.network.version == 6]
    if any(subnet.dhcp for subnet in six):
        yield "enable-ra"
    else:
        yield from (ra_only(subnet) for subnet in six if subnet.autonomous)


def ra_only(subnet: Subnet) -> str:
    return f"dhcp-range={subnet.gateway},ra-only"


def mtu_option(mtu: int) -> str:
    return f"dhcp-option=option:mtu,{mtu}"
