# SPDX-License-Identifier: LGPL-2.1-or-later
"""Masks for a text that will be public: secrets, public addresses, and addresses of hardware.

A masked address keeps the part that tells a fault: addresses of one public subnet are still seen
to be of one subnet.  Each address has one mask within a report.

Limit: a secret is known by its name ("password", "token" ...) or its form (a private key).  So
the parts of a report do not read files of others in the first place.
"""

import re
from ipaddress import IPv4Address, IPv6Address, IPv6Network

HIDDEN = "(masked)"

_NAMES = (
    r"[\w.-]{0,40}(?:passw(?:or)?d|passphrase|secret|token|api[_-]?key|private[_-]?key|preshared[_-]?key"
    r"|psk|credential|authorization|cookie)[\w.-]{0,40}"
)
SECRET = re.compile(
    rf"(?i)(?P<name>\b{_NAMES}[\"']?\s*[=:]\s*|--{_NAMES}\s+)"
    r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\n]*)"
)
"""A secret with its name; without quotes it may end with the line alone."""

KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S
)
USER = re.compile(r"(?<=://)[^/\s@]+@")
"""The user, and maybe the password, in a URL."""

IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)")
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
MAC = re.compile(r"(?<![\w:])[0-9A-Fa-f]{1,2}(?::[0-9A-Fa-f]{1,2}){5}(?![\w:])")

TRANSLATED = (IPv6Network("64:ff9b::/96"), IPv6Network("2002::/16"), IPv6Network("2001::/32"))
"""Prefixes with an IPv4 address inside: NAT64, 6to4 and Teredo."""

GROUP = 1 << 0
"""Of the first octet of a MAC address: the address of a group of stations."""
LOCAL = 1 << 1
"""Of the first octet of a MAC address: no vendor gave the address, but a program."""
VENDORS_OF_GUESTS = ("00:16:3e", "00:0c:29", "00:50:56", "00:15:5d")
"""Vendors' parts that programs give to virtual NICs."""


class Masks:
    """Masks of one report: the same address always has the same mask."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def masked(self, text: str) -> str:
        """Return a text without secrets, public addresses and hardware addresses."""
        text = without_keys(text)
        text = USER.sub(f"{HIDDEN}@", text)
        text = SECRET.sub(lambda found: f"{found['name']}{HIDDEN}", text)
        text = MAC.sub(lambda found: self._mac(found[0]), text)
        text = IPV4.sub(lambda found: self._ipv4(found[0]), text)
        return IPV6.sub(lambda found: self._ipv6(found[0]), text)

    def _number(self, kind: str, value: str) -> int:
        """Return the number of a value, by the order in which values came."""
        return self._numbers.setdefault(
            f"{kind} {value}", sum(key.startswith(f"{kind} ") for key in self._numbers) + 1
        )

    def _ipv4(self, text: str) -> str:
        try:
            address = IPv4Address(text)
        except ValueError:
            return text
        if not address.is_global or address.is_multicast:
            return text
        subnet, _, station = text.rpartition(".")
        return f"public{self._number('v4', subnet)}.{station}"

    def _ipv6(self, text: str) -> str:
        try:
            address = IPv6Address(text)
        except ValueError:
            return text
        if any(address in prefix for prefix in TRANSLATED):
            return f"translated{self._number('64', str(address))}"
        groups = [group.lstrip("0") or "0" for group in address.exploded.split(":")]
        station = self._station(address)
        if station is not None:
            groups[4:] = [station]
        if not address.is_global or address.is_multicast:
            return text if station is None else _joined(groups)
        return _joined([f"public6-{self._number('v6', ':'.join(groups[:3]))}", *groups[3:]])

    def _station(self, address: IPv6Address) -> str | None:
        """Return a mask for the part of an address that its NIC's MAC address made (RFC 4291)."""
        octets = address.packed[8:]
        if octets[3:5] != b"\xff\xfe" or not octets[0] & LOCAL:
            return None
        mac = bytes([octets[0] ^ LOCAL, *octets[1:3], *octets[5:]]).hex(":")
        masked = self._mac(mac)
        return None if masked == mac else f"({masked})"

    def _mac(self, text: str) -> str:
        octets = [octet.zfill(2).lower() for octet in text.split(":")]
        vendor, first = ":".join(octets[:3]), int(octets[0], 16)
        if first & (GROUP | LOCAL) or vendor in VENDORS_OF_GUESTS or not text.strip("0:"):
            return text
        return f"{vendor}:nic{self._number('mac', ':'.join(octets))}"


def without_keys(text: str) -> str:
    """Return a text without private keys, which alone have several lines."""
    return KEY.sub(HIDDEN, text)


def _joined(groups: list[str]) -> str:
    """Return the groups of an address, with its zeros left out once."""
    return re.sub(r":0(?::0)+(?=:|$)", "::", ":".join(groups), count=1).replace(":::", "::")
