# SPDX-License-Identifier: LGPL-2.1-or-later
"""ISC's DHCP client, dhclient(8): the client identifier of a lease, from the client's files.

The client notes its leases in files of statements (dhclient.leases(5)).  A server may return the
identifier with the lease.  Otherwise the configuration has it (dhclient.conf(5)), or the client
makes it of its DUID (``dhclient -i``).  Without any, the client sends no identifier.
"""

import re
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

from libvirt_natns.daemons.text_files import text_if_any
from libvirt_natns.kernel import processes

LEASES = (
    ("/var/lib/dhcp", "dhclient*.lease*"),
    ("/var/lib/dhclient", "dhclient*.lease*"),
    ("/var/lib/NetworkManager", "dhclient-*.lease"),
)
"""Directories of lease files, with the files' names: Debian's, Fedora's, NetworkManager's."""

CONFIGURATIONS = (
    "/var/lib/NetworkManager/dhclient-{nic}.conf",
    "/etc/dhcp/dhclient-{nic}.conf",
    "/etc/dhcp/dhclient.conf",
    "/etc/dhclient.conf",
)

LEASE = re.compile(r"^lease\s*\{(.*?)^\s*\}", re.MULTILINE | re.DOTALL)
VALUE = r'((?:"(?:[^"\\]|\\.)*"|[^;"])*);'
RETURNED = re.compile(rf"^\s*option\s+dhcp-client-identifier\s+{VALUE}", re.MULTILINE)
SENT = re.compile(rf"^\s*send\s+dhcp-client-identifier\s+{VALUE}", re.MULTILINE)
DUID = re.compile(rf"^\s*default-duid\s+{VALUE}", re.MULTILINE)
OF_INTERFACE = re.compile(
    r'^[ \t]*interface\s+"([^"]*)"\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}', re.MULTILINE
)
"""Statements of a configuration that are about a single NIC."""
OCTETS = re.compile(r"[0-9A-Fa-f]{1,2}(?::[0-9A-Fa-f]{1,2})+")
ESCAPE = re.compile(r"\\([0-7]{3}|.)", re.DOTALL)

RFC4361 = "ff"
"""The type of a client identifier that is made of an IAID and a DUID."""

ETHERNET = "01"
"""The type of a client identifier that is a MAC address."""


def client_id(nic: str, mac: str, address: IPv4Address) -> tuple[str | None, Path] | None:
    """Return the client identifier of a lease in hexadecimal digits, and the lease's file.

    The identifier is "" for a client that sends none, and None where the files do not tell.
    Returns None where the client has no lease of this address on this NIC.
    """
    found = [(lease, file) for file in _files() for lease in _leases(file, nic, address)]
    if not found:
        return None
    # The client adds a lease to the file's end whenever it is renewed.
    lease, file = found[-1]
    if returned := RETURNED.search(lease):
        return value(returned[1], mac), file
    for name in CONFIGURATIONS:
        if sent := SENT.search(_about(nic, text_if_any(Path(name.format(nic=nic))))):
            return value(sent[1], mac), file
    return (_by_duid(file, mac) if _runs_with_duid() else ""), file


def _about(nic: str, configuration: str) -> str:
    """Return the statements about a NIC: those for the NIC alone come first."""
    own = [block[2] for block in OF_INTERFACE.finditer(configuration) if block[1] == nic]
    return "\n".join([*own, OF_INTERFACE.sub("", configuration)])


def value(text: str, mac: str) -> str | None:
    """Return a value of option 61 in hexadecimal digits; None for an expression."""
    text = text.strip()
    if text.removeprefix("=").strip() == "hardware":
        return ETHERNET + mac.replace(":", "")
    if OCTETS.fullmatch(text):
        return "".join(word.zfill(2) for word in text.lower().split(":"))
    if text.startswith('"') and text.endswith('"') and len(text) > 1:
        return ESCAPE.sub(_unescaped, text[1:-1]).encode("latin-1", "replace").hex()
    return None


def _unescaped(match: re.Match[str]) -> str:
    digits = match[1]
    return chr(int(digits, 8) & 0xFF) if len(digits) == 3 else digits


def _files() -> Iterator[Path]:
    """Yield the lease files, those written last at the end."""
    files = [file for directory, names in LEASES for file in Path(directory).glob(names)]
    yield from sorted((file for file in files if file.is_file()), key=_written)


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _leases(file: Path, nic: str, address: IPv4Address) -> Iterator[str]:
    for found in LEASE.finditer(text_if_any(file)):
        words = " ".join(found[1].split())
        if f'interface "{nic}";' in words and f"fixed-address {address};" in words:
            yield found[1]


def _by_duid(file: Path, mac: str) -> str | None:
    """Return the identifier of an IAID, which is the end of the MAC address, and the DUID."""
    duid = DUID.search(text_if_any(file))
    octets = value(duid[1], mac) if duid else None
    return f"{RFC4361}{mac.replace(':', '')[-8:]}{octets}" if octets else None


def _runs_with_duid() -> bool:
    """True if a dhclient runs that makes its identifier of the DUID."""
    for pid in processes.with_word("-i"):
        words = processes.command(pid)
        if Path(words[0] if words else "").name == "dhclient":
            return True
    return False
