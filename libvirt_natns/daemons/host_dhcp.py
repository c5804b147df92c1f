# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client identifier (DHCP's option 61) with which a client of the host holds a NIC's lease.

A DHCP server gives the same address to the same identifier only.  Each client keeps the
identifier in a place of its own: systemd-networkd (also for netplan) in its lease, dhclient and
dhcpcd in their leases and configurations.  NetworkManager tells it over D-Bus (nmcli(1)).

Known limits: other clients are not known.  busybox's udhcpc sends the MAC address, as we do.
Sources: sd-dhcp-lease.c, dhclient.leases(5), dhcpcd.conf(5), nmcli(1), RFC 2132, RFC 4361.
"""

import re
import subprocess
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from libvirt_natns.daemons import dhclient_files
from libvirt_natns.daemons.dhclient_files import ETHERNET, RFC4361
from libvirt_natns.daemons.text_files import text_if_any
from libvirt_natns.kernel import processes

NETWORKD = Path("/run/systemd/netif/leases")
NETWORK_MANAGER = Path("/run/NetworkManager/devices")
NMCLI_LIMIT = 10.0
"""Seconds for an answer of NetworkManager."""

DHCPCD = Path("/var/lib/dhcpcd")
DHCPCD_DUIDS = (DHCPCD / "duid", Path("/etc/dhcpcd.duid"))
DHCPCD_CONFIGURATION = Path("/etc/dhcpcd.conf")

BOOTP_ADDRESS = slice(16, 20)
BOOTP_OPTIONS = 240
"""Octets of a DHCP message ahead of its options, with the magic cookie."""

PAD, CLIENT_ID, END = 0, 61, 255

HEX = re.compile(r"(?:[0-9a-f]{2}){2,255}")
"""A client identifier: a type, and at least one octet."""


@dataclass(frozen=True, slots=True)
class LeasedNic:
    """A NIC with a leased address."""

    name: str
    index: int
    mac: str
    address: IPv4Address


@dataclass(frozen=True, slots=True)
class HostClient:
    """The DHCP client of the host that holds a lease.

    ``client_id`` in hexadecimal digits; "" for a client that sends none, None where the
    client's files do not tell.
    """

    name: str
    client_id: str | None


def holder(nic: LeasedNic) -> HostClient | None:
    """Return the client that holds a NIC's lease; None where no client is known to."""
    finders = (_networkd, _network_manager, _dhcpcd, _dhclient)
    holders = [found for find in finders if (found := find(nic)) is not None]
    # NetworkManager may have started dhclient, and dhclient's files then tell more.
    telling = (found for found in holders if found.client_id is not None)
    return next(telling, holders[0] if holders else None)


def checked(digits: str) -> str | None:
    """Return an identifier in the form of ``HostClient``; None for other text."""
    plain = digits.replace(":", "").strip().lower()
    return plain if HEX.fullmatch(plain) else None


def _networkd(nic: LeasedNic) -> HostClient | None:
    values = dict(
        line.partition("=")[::2] for line in text_if_any(NETWORKD / str(nic.index)).splitlines()
    )
    if values.get("ADDRESS") != str(nic.address):
        return None
    return HostClient("systemd-networkd", checked(values.get("CLIENTID", "")))


def _network_manager(nic: LeasedNic) -> HostClient | None:
    if "\nconnection-uuid=" not in text_if_any(NETWORK_MANAGER / str(nic.index)):
        return None
    options = _nmcli(nic.name)
    if f"ip_address = {nic.address}\n" not in options:
        return None
    said = re.search(r"dhcp_client_identifier = ([0-9A-Fa-f:]+)$", options, re.MULTILINE)
    return HostClient("NetworkManager", checked(said[1]) if said else None)


def _nmcli(nic: str) -> str:
    """Return the options of a NIC's DHCP lease, one a line; "" without an answer."""
    program = processes.program("nmcli")
    command = ("--terse", "--escape", "no", "--fields", "DHCP4.OPTION", "device", "show", nic)
    try:
        done = subprocess.run(
            [program or "nmcli", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=NMCLI_LIMIT,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _dhcpcd(nic: LeasedNic) -> HostClient | None:
    try:
        message = (DHCPCD / f"{nic.name}.lease").read_bytes()
    except OSError:
        return None
    if message[BOOTP_ADDRESS] != nic.address.packed:
        return None
    returned = _option(message, CLIENT_ID)
    if returned:
        return HostClient("dhcpcd", checked(returned.hex()))
    return HostClient("dhcpcd", _of_dhcpcd_conf(nic.mac.replace(":", "")))


def _option(message: bytes, wanted: int) -> bytes:
    """Return an option of a DHCP message; empty where the message lacks it."""
    place = BOOTP_OPTIONS
    while place + 1 < len(message) and message[place] != END:
        if message[place] == PAD:
            place += 1
            continue
        content = message[place + 2 : place + 2 + message[place + 1]]
        if message[place] == wanted:
            return content
        place += 2 + message[place + 1]
    return b""


def _of_dhcpcd_conf(mac: str) -> str | None:
    """Return the identifier that the configuration asks for; the last line of its kind counts."""
    client_id: str | None = ""
    for line in text_if_any(DHCPCD_CONFIGURATION).splitlines():
        word, *values = line.split() or [""]
        if word == "clientid":
            client_id = checked(values[0]) if values else ETHERNET + mac
        elif word == "duid":
            texts = (text_if_any(file) for file in DHCPCD_DUIDS)
            duid = next((checked(text) for text in texts if text), None)
            client_id = f"{RFC4361}{mac[-8:]}{duid}" if duid else None
    return client_id


def _dhclient(nic: LeasedNic) -> HostClient | None:
    found = dhclient_files.client_id(nic.name, nic.mac, nic.address)
    if found is None:
        return None
    client_id, _ = found
    return HostClient("dhclient", checked(client_id) if client_id else client_id)
