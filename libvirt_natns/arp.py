# SPDX-License-Identifier: LGPL-2.1-or-later
"""Address conflict detection and announcement (RFC 5227), over raw sockets.

The probe is shorter than the RFC's five to nine seconds, since a starting
network waits for it: three probes within the time that the upstream's
``probe`` setting gives.  A station that answers later is missed.
"""

import fcntl
import select
import socket
import struct
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address

from libvirt_natns.addresses import Address
from libvirt_natns.errors import UpstreamError
from libvirt_natns.later import Later, at_once

ETH_P_ARP = 0x0806
BROADCAST = b"\xff" * 6
IPV4_ON_ETHERNET = (1, 0x0800, 6, 4)
REQUEST = 1
PROBES = 3
ARP_FORMAT = "!HHBBH6s4s6s4s"
SO_RCVBUFFORCE = 33
SIOCGIFFLAGS = 0x8913
IFF_RUNNING = 0x40
FRAME_LENGTH = 14 + struct.calcsize(ARP_FORMAT)

POLL = 0.001
CARRIER_LIMIT = 1.0
"""Seconds that a link which was just set up is waited for; the kernel takes up
to one."""

BUFFER = 1 << 20
"""Octets that the kernel may hold back: answers to a whole batch come at once."""


def _frame(mac: bytes, sender: Address, target: Address) -> bytes:
    """A broadcast ARP request of 42 octets, Ethernet header included."""
    ethernet = BROADCAST + mac + struct.pack("!H", ETH_P_ARP)
    return ethernet + struct.pack(
        ARP_FORMAT, *IPV4_ON_ETHERNET, REQUEST, mac, sender.packed, bytes(6), target.packed
    )


def _claimed(frame: bytes, own: bytes, wanted: Collection[Address]) -> Address | None:
    """The wanted address that a received frame shows to be somebody else's.

    RFC 5227, 2.1.1: any ARP packet whose sender address is the wanted one, or
    another station's probe for it.
    """
    if len(frame) < FRAME_LENGTH or frame[12:14] != struct.pack("!H", ETH_P_ARP):
        return None
    fields = struct.unpack(ARP_FORMAT, frame[14:FRAME_LENGTH])
    if fields[:4] != IPV4_ON_ETHERNET:
        return None
    mac, sender, target = fields[5], IPv4Address(fields[6]), IPv4Address(fields[8])
    if sender in wanted:
        return sender
    probe = int(sender) == 0 and mac != own
    return target if probe and target in wanted else None


@contextmanager
def _opened(link: str, purpose: str, later: Later = at_once) -> Iterator[socket.socket]:
    """A raw socket for ARP on a link; what fails with it is an UpstreamError.

    The kernel takes some 10 ms to close one, for which it waits until no CPU is
    handling a packet any more: ``later`` does it.
    """
    try:
        # Protocol 0 hears nothing, so no other link's packets are there when it is bound.
        packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            packet.bind((link, ETH_P_ARP))
            yield packet
        finally:
            later(packet.close)
    except OSError as error:
        raise UpstreamError(f"cannot {purpose} on {link}", error.strerror or str(error)) from error


def probe(
    link: str, addresses: Collection[Address], seconds: float, later: Later = at_once
) -> set[Address]:
    """Those of ``addresses`` that a station on the link's segment answers for.

    ``link`` is an interface of the calling network namespace; takes up to
    ``seconds``, less once every address was answered for.
    Raises UpstreamError where the link cannot be used.
    """
    with _opened(link, "probe for addresses", later) as packet:
        packet.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        return _ask(packet, set(addresses), seconds / (PROBES + 1))


def _ask(packet: socket.socket, addresses: set[Address], step: float) -> set[Address]:
    """Send all probes, ``step`` seconds apart, and listen; returns the claimed addresses."""
    mac = packet.getsockname()[4]
    found: set[Address] = set()
    start = time.monotonic()
    for number in range(1, PROBES + 2):
        if found == addresses:
            break
        # After the last probe there is one more step, to listen only.
        for address in addresses - found if number <= PROBES else ():
            packet.send(_frame(mac, IPv4Address(0), address))
        found |= _listen(packet, mac, addresses - found, start + number * step, step)
    return found


def _listen(
    packet: socket.socket,
    own: bytes,
    wanted: set[Address],
    deadline: float,
    overtime: float,
) -> set[Address]:
    """Those of ``wanted`` that are claimed until ``deadline``.

    What has come by then is read also when this process was kept from running;
    ``overtime``, in seconds, ends that where packets never cease.
    """
    found: set[Address] = set()
    poll = select.poll()
    poll.register(packet, select.POLLIN)
    while found != wanted:
        left = deadline - time.monotonic()
        if not poll.poll(max(0.0, left) * 1000) or left < -overtime:
            break
        claimed = _claimed(packet.recv(2048), own, wanted)
        if claimed is not None:
            found.add(claimed)
    return found


def announce(link: str, address: Address, mac: str, probing: float = 0.0) -> bool:
    """Tell all neighbours on the link who has ``address`` now (RFC 5227, 2.3).

    Sent twice, without the RFC's pause of two seconds.  ``link`` is an
    interface of the calling namespace, and may have the address already: what
    is sent through it does not come back.  With ``probing``, in seconds, others
    are asked first: returns False, and says nothing, where one of them has it.
    Raises UpstreamError where the link cannot be used.
    """
    frame = _frame(bytes.fromhex(mac.replace(":", "")), address, address)
    with _opened(link, f"announce {address}") as packet:
        _await_carrier(packet, link)
        if probing and _ask(packet, {address}, probing / (PROBES + 1)):
            return False
        packet.send(frame)
        time.sleep(POLL)
        packet.send(frame)
    return True


def _await_carrier(packet: socket.socket, link: str) -> None:
    """Wait, for a short time, until what is sent gets past the other end of a patch.

    When a link is set up, the kernel takes note a little later, in a thread of
    its own; only then does the bridge at the other end let its port forward.
    """
    request = struct.pack("16s16x", link.encode())
    deadline = time.monotonic() + CARRIER_LIMIT
    while time.monotonic() < deadline:
        (flags,) = struct.unpack_from("=H", fcntl.ioctl(packet, SIOCGIFFLAGS, request), 16)
        if flags & IFF_RUNNING:
            return
        time.sleep(POLL)
