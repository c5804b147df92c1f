# SPDX-License-Identifier: LGPL-2.1-or-later
"""Address conflict detection and announcement (RFC 5227), over raw sockets.

The probe is shorter than the RFC's five to nine seconds, since a starting
network waits for it: three probes within the time that the upstream's
``probe`` setting gives.  A station that answers later is missed.
"""

import os
import select
import socket
import struct
import time
from collections.abc import Collection
from ipaddress import IPv4Address

from libvirt_natns.errors import UpstreamError

ETH_P_ARP = 0x0806
BROADCAST = b"\xff" * 6
REQUEST = 1
PROBES = 3
ARP_FORMAT = "!HHBBH6s4s6s4s"


def _frame(mac: bytes, sender: IPv4Address, target: IPv4Address) -> bytes:
    """A broadcast ARP request of 42 octets, Ethernet header included."""
    ethernet = BROADCAST + mac + struct.pack("!H", ETH_P_ARP)
    return ethernet + struct.pack(
        ARP_FORMAT, 1, 0x0800, 6, 4, REQUEST, mac, sender.packed, bytes(6), target.packed
    )


def _claimed(frame: bytes, own: bytes, wanted: Collection[IPv4Address]) -> IPv4Address | None:
    """The wanted address that a received frame shows to be somebody else's.

    RFC 5227, 2.1.1: any ARP packet whose sender address is the wanted one, or
    another station's probe for it.
    """
    if len(frame) < 42 or frame[12:14] != struct.pack("!H", ETH_P_ARP):
        return None
    fields = struct.unpack(ARP_FORMAT, frame[14:42])
    mac, sender, target = fields[5], IPv4Address(fields[6]), IPv4Address(fields[8])
    if sender in wanted:
        return sender
    probe = int(sender) == 0 and mac != own
    return target if probe and target in wanted else None


def _open(link: str) -> socket.socket:
    packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP))
    packet.bind((link, ETH_P_ARP))
    return packet


def probe(link: str, addresses: Collection[IPv4Address], seconds: float) -> set[IPv4Address]:
    """Those of ``addresses`` that a station on the link's segment answers for.

    ``link`` is an interface of the calling network namespace; takes up to
    ``seconds``, less once every address was answered for.
    Raises UpstreamError where the link cannot be used.
    """
    try:
        with _open(link) as packet:
            return _listen(packet, packet.getsockname()[4], addresses, seconds)
    except OSError as error:
        raise UpstreamError(
            f"cannot probe for addresses on {link}", os.strerror(error.errno or 0)
        ) from error


def _listen(
    packet: socket.socket, mac: bytes, addresses: Collection[IPv4Address], seconds: float
) -> set[IPv4Address]:
    found: set[IPv4Address] = set()
    start = time.monotonic()
    sent = 0
    while len(found) < len(addresses):
        elapsed = time.monotonic() - start
        if elapsed >= seconds and sent == PROBES:
            break
        if sent < PROBES and elapsed >= sent * seconds / (PROBES + 1):
            for address in addresses:
                packet.send(_frame(mac, IPv4Address(0), address))
            sent += 1
        due = (sent if sent < PROBES else PROBES + 1) * seconds / (PROBES + 1)
        if select.select([packet], [], [], max(0.0, start + due - time.monotonic()))[0]:
            claimed = _claimed(packet.recv(2048), mac, addresses)
            if claimed is not None:
                found.add(claimed)
    return found


def announce(link: str, address: IPv4Address, mac: str) -> None:
    """Tell all neighbours on the link who has ``address`` now (RFC 5227, 2.3).

    Sent twice, without the RFC's pause of two seconds.  ``link`` is an
    interface of the calling namespace.
    """
    frame = _frame(bytes.fromhex(mac.replace(":", "")), address, address)
    with _open(link) as packet:
        packet.send(frame)
        packet.send(frame)
