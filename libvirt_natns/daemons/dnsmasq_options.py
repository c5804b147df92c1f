# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options of a network's ``<dnsmasq:options>`` that decide where a dnsmasq listens.

Limit: a file that ``conf-file`` or ``conf-dir`` names is not read.
"""

from collections.abc import Iterator

from libvirt_natns.model.network import Network

ServedPort = tuple[str, int]
"""A protocol, "udp" or "tcp", and a port."""

PXE = 4011
"""The port at which firmware asks a boot server of its own (PXE 2.1)."""
ALTERNATE_DHCP = 1067
"""dnsmasq's own choice of another port of DHCP."""

ELSEWHERE = frozenset({"listen-address", "interface"})
"""Options by which a dnsmasq takes addresses of bridges of other networks."""


def options(network: Network) -> Iterator[tuple[str, str]]:
    """Yield keyword and value of each line of the options; "" for a keyword alone."""
    for option in network.dnsmasq_options:
        for line in option.split("\n"):
            key, _, value = line.partition("=")
            if key.strip() and not line.startswith("#"):
                yield key.strip(), value.strip()


def served_ports(network: Network) -> tuple[ServedPort, ...]:
    """Return the ports that a dnsmasq serves beside those of DHCP, DNS and TFTP, in order."""
    found: set[ServedPort] = set()
    for key, value in options(network):
        if key in ("pxe-service", "pxe-prompt") or (key == "dhcp-range" and "proxy" in value):
            found.add(("udp", PXE))
        elif key == "dhcp-alternate-port":
            found.add(("udp", _port(value.partition(",")[0]) or ALTERNATE_DHCP))
        elif key == "port" and _port(value):
            found |= {("udp", _port(value)), ("tcp", _port(value))}
    return tuple(sorted(found))


def _port(text: str) -> int:
    """Return the port in a text; 0 for none."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
    return number if number < 1 << 16 else 0


def listens_elsewhere(network: Network) -> bool:
    """True if libvirt's dnsmasq of a network would take the address of a twin's bridge."""
    return network.taken_over and any(key in ELSEWHERE for key, _ in options(network))
