# SPDX-License-Identifier: LGPL-2.1-or-later
"""DHCP leases of a network's guests, and the end of a lease in a reservation's way.

A guest can lease every address of its network under made-up MAC addresses.  A stranger is
a MAC address that no NIC of the network seems to have.  Its lease is given up for a guest
that publishes something.  dnsmasq forgets a lease only at its start.  It reads its leases
then from libvirt's helper, which keeps them on file.
"""

import subprocess
from collections import Counter
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from libvirt_natns.addresses import Address, parsed
from libvirt_natns.daemons import dnsmasq_files, dnsmasq_process, lease_file
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.errors import DnsmasqError
from libvirt_natns.kernel import processes

LINKS = Path("/sys/class/net")
HELPER_LIMIT = 10.0
"""Seconds for libvirt's lease helper, which takes some 20 ms."""

ENTRY = 16
"""Octets of an entry in a bridge's brforward: MAC address, port, local or not, age, port's rest."""


def present(bridge: str) -> dict[Address, str]:
    """Return leases by address with their MAC, as libvirt's helper has them on file.

    The MAC address is "" where the helper does not learn it, as of some clients of DHCPv6.
    """
    leases: dict[Address, str] = {}
    for entry in lease_file.current(bridge):
        with suppress(ValueError, KeyError, TypeError):
            leases[parsed(entry["ip-address"])] = str(entry.get("mac-address", "")).lower()
    return leases


def is_stranger(bridge: str, mac: str, known: Container[str]) -> bool:
    """True if a MAC address seems to be no NIC's: neither ``known`` nor seen on the bridge.

    Guests on one port of the bridge have one MAC address, the tap's own but for its first
    octet.  Behind a port without such an address, as a container's, the bridge tells.
    """
    return mac != "" and mac not in known and mac[3:] not in _taps(bridge) | _alone(bridge)


def _taps(bridge: str) -> set[str]:
    """Return the MAC addresses of a bridge's ports without the first octet, which libvirt sets."""
    addresses = set()
    with suppress(OSError):
        for port in (LINKS / bridge / "brif").iterdir():
            addresses.add((LINKS / port.name / "address").read_text().strip()[3:])
    return addresses


def _alone(bridge: str) -> set[str]:
    """Return MAC addresses, without the first octet, that are alone on their bridge port."""
    try:
        table = (LINKS / bridge / "brforward").read_bytes()
    except OSError:
        return set()
    entries = [table[at : at + ENTRY] for at in range(0, len(table), ENTRY)]
    # The port's number, and whether the address is the bridge's or the port's own.
    learned = [(entry[6] | entry[12] << 8, entry[:6]) for entry in entries if not entry[7]]
    counted = Counter(port for port, _ in learned)
    return {mac.hex(":")[3:] for port, mac in learned if counted[port] == 1}


def squatted(daemon: Daemon) -> list[tuple[str, Address]]:
    """Return leases of strangers, MAC and address, that are reserved for guests."""
    hosts = daemon.files.hosts if daemon.files else ""
    reserved = {address: mac for mac, address in dnsmasq_files.by_mac(hosts)}
    if not reserved:
        return []
    leases = present(daemon.bridge)
    macs = set(reserved.values())
    return [
        (leases[address], address)
        for address, mac in reserved.items()
        if leases.get(address, mac) != mac and is_stranger(daemon.bridge, leases[address], macs)
    ]


def forget(bridge: str, mac: str, address: Address) -> None:
    """Have libvirt's helper forget a lease, while no dnsmasq of the bridge runs.

    Raises DnsmasqError.
    """
    helper = dnsmasq_process.lease_helper()
    if helper is None:
        return
    try:
        subprocess.run(
            [helper, "del", mac, str(address)],
            env={"PATH": processes.PATH, "VIR_BRIDGE_NAME": bridge, "DNSMASQ_INTERFACE": bridge},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=HELPER_LIMIT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise DnsmasqError(f"cannot end the lease of {address}", str(error)) from error
