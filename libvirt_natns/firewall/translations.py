# SPDX-License-Identifier: LGPL-2.1-or-later
"""Translations of a namespace, read back from the rules that the kernel holds.

The module serves after a loss of the state database.  Chosen ports and static NAT are then
in force in the kernel and recorded nowhere else.  Ranges of ports are left out, as their
numbers stand in the guest's metadata.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from libvirt_natns.addresses import Address, parsed
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import iptables, nftables

ADDRESS = r"([0-9a-f.:]+)"
ALONE = r"(?:32|128|255\.255\.255\.255|(?:ffff:){7}ffff)"

# A map's element, and a rule for some clients only.
NFT_ELEMENT = re.compile(rf"{ADDRESS} \. (\w+) \. (\d+) : {ADDRESS} \. (\d+)")
NFT_PORT = re.compile(r"\b(tcp|udp|sctp) dport (\d+) dnat ip6? to (\S+)")
NFT_SOURCE = re.compile(rf"\bip6? saddr {ADDRESS} snat ip6? to {ADDRESS}")

IPTABLES_PORT = re.compile(r"-p (\w+)\b.* --dports? (\d+) .*-j DNAT\b.* --to-destination (\S+)")
IPTABLES_SOURCE = re.compile(rf"(?<!! )-s {ADDRESS}/{ALONE} .*-j SNAT\b.* --to-source {ADDRESS}")

PROTOCOLS = {"6": "tcp", "17": "udp", "132": "sctp"}
"""Protocols by the numbers that nft shows in elements."""


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """A port that is translated to another port of a guest."""

    proto: str
    port: int
    target: Address
    to: int


@dataclass(frozen=True, slots=True)
class Translations:
    """All translations of a namespace; ``own`` has static NAT by guests' private addresses."""

    ports: tuple[PublishedPort, ...]
    own: dict[Address, Address]


def of_namespace(namespace: str) -> Translations:
    """Return the translations in a namespace, of either backend.

    Raises KernelError where the namespace is missing.
    """
    texts = []
    for backend in (nftables, iptables):
        # A backend may be missing on this machine.
        with suppress(FirewallError):
            texts.append(backend.listing(namespace))
    return parse("\n".join(texts))


def parse(text: str) -> Translations:
    """Return the translations in the listings of backends."""
    static = [*NFT_SOURCE.findall(text), *IPTABLES_SOURCE.findall(text)]
    own = {parsed(target): parsed(address) for target, address in static}
    return Translations(tuple(dict.fromkeys(_ports(text))), own)


def _ports(text: str) -> Iterator[PublishedPort]:
    for _, proto, port, target, to in NFT_ELEMENT.findall(text):
        yield PublishedPort(PROTOCOLS.get(proto, proto), int(port), parsed(target), int(to))
    for pattern in (NFT_PORT, IPTABLES_PORT):
        for proto, port, destination in pattern.findall(text):
            target, to = _destination(destination)
            yield PublishedPort(proto, int(port), target, to or int(port))


def _destination(text: str) -> tuple[Address, int]:
    """Return an address and its port; the port is 0 where the text has none."""
    if text.startswith("["):
        address, _, port = text[1:].partition("]:")
    elif text.count(":") == 1:
        address, _, port = text.partition(":")
    else:
        address, port = text, "0"
    return parsed(address), int(port)
