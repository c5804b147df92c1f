# SPDX-License-Identifier: LGPL-2.1-or-later
"""Probes and announcements of addresses of either family, over raw sockets.

The probe is shorter than the several seconds of RFC 5227 and RFC 4862, since a starting network
waits for it.  It sends three questions within the time of the upstream's ``probe`` setting.  A
station that answers later is missed.
"""

import ctypes
import fcntl
import select
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from libvirt_natns.addresses import Address
from libvirt_natns.errors import UpstreamError
from libvirt_natns.kernel import arp, ndp
from libvirt_natns.kernel.defer import Later, at_once

PROBES = 3
SO_RCVBUFFORCE = 33
SO_ATTACH_FILTER = 26
SOL_PACKET = 263
PACKET_ADD_MEMBERSHIP = 1
PACKET_MR_MULTICAST = 0
SIOCGIFFLAGS = 0x8913
IFF_RUNNING = 0x40

POLL = 0.001
CARRIER_LIMIT = 1.0
"""Seconds to wait for a link that was just set up; the kernel takes up to one."""

BUFFER = 1 << 20
"""Octets that the kernel may hold back: answers to a whole batch come at once."""


@dataclass(frozen=True, slots=True)
class ProbeProtocol:
    """How neighbours speak of a family's addresses.

    ``filter`` is a program for the kernel that picks this protocol's frames out of all frames of
    the ethertype.  ``group`` is the MAC that answers are sent to, unless that is the broadcast MAC.
    """

    ethertype: int
    question: Callable[[bytes, Address], bytes]
    announcement: Callable[[bytes, Address], bytes]
    claimed: Callable[[bytes, bytes, Collection[Address]], Address | None]
    filter: bytes = b""
    group: bytes = b""


PROTOCOLS = {
    4: ProbeProtocol(arp.ETHERTYPE, arp.question, arp.announcement, arp.claimed),
    6: ProbeProtocol(
        ndp.ETHERTYPE, ndp.question, ndp.announcement, ndp.claimed, ndp.FILTER, ndp.ALL_NODES_MAC
    ),
}


@dataclass(slots=True)
class ProbeSocket:
    """A socket that speaks one protocol, and the addresses that are asked for with it."""

    packet: socket.socket
    protocol: ProbeProtocol
    wanted: set[Address]

    @property
    def mac(self) -> bytes:
        """The link's own MAC address."""
        mac: bytes = self.packet.getsockname()[4]
        return mac

    def ask(self, found: Collection[Address]) -> None:
        """Send a question for each address that is not claimed yet."""
        mac = self.mac
        for address in self.wanted.difference(found):
            self.packet.send(self.protocol.question(mac, address))

    def hear(self) -> Address | None:
        """Return the address that the next frame shows to be another station's, if any."""
        return self.protocol.claimed(self.packet.recv(2048), self.mac, self.wanted)


@contextmanager
def _opened(
    link: str, version: int, purpose: str, wanted: Collection[Address], later: Later = at_once
) -> Iterator[ProbeSocket]:
    """Open a raw socket on a link for a family; a failure is an UpstreamError.

    The kernel takes some 10 ms to close a raw socket, since it waits until no CPU is handling a
    packet any more.  So ``later`` closes it.
    """
    protocol = PROTOCOLS[version]
    try:
        # Protocol 0 hears nothing, so no other link's packets are there when it is bound.
        packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            _prepare(packet, link, protocol)
            packet.bind((link, protocol.ethertype))
            yield ProbeSocket(
                packet, protocol, {each for each in wanted if each.version == version}
            )
        finally:
            later(packet.close)
    except OSError as error:
        raise UpstreamError(f"cannot {purpose} on {link}", error.strerror or str(error)) from error


def _prepare(packet: socket.socket, link: str, protocol: ProbeProtocol) -> None:
    packet.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    if protocol.filter:
        program = ctypes.create_string_buffer(protocol.filter, len(protocol.filter))
        count = len(protocol.filter) // 8
        packet.setsockopt(
            socket.SOL_SOCKET,
            SO_ATTACH_FILTER,
            struct.pack("@HP", count, ctypes.addressof(program)),
        )
    if protocol.group:
        index = socket.if_nametoindex(link)
        member = struct.pack(
            "@iHH8s", index, PACKET_MR_MULTICAST, len(protocol.group), protocol.group
        )
        packet.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, member)


def probe(
    link: str, addresses: Collection[Address], seconds: float, later: Later = at_once
) -> set[Address]:
    """Return the ``addresses`` that a station on the link's segment answers for.

    ``link`` is an interface of the calling network namespace; takes up to
    ``seconds``, less once every address was answered for.
    Raises UpstreamError where the link cannot be used.
    """
    with ExitStack() as stack:
        ears = [
            stack.enter_context(_opened(link, version, "probe for addresses", addresses, later))
            for version in sorted({address.version for address in addresses})
        ]
        return ask_all(ears, seconds / (PROBES + 1))


def ask_all(ears: Collection[ProbeSocket], step: float) -> set[Address]:
    """Send all probes, ``step`` seconds apart, and listen; returns the claimed addresses."""
    wanted = {address for ear in ears for address in ear.wanted}
    found: set[Address] = set()
    start = time.monotonic()
    for number in range(1, PROBES + 2):
        if found == wanted:
            break
        # After the last probe there is one more step, to listen only.
        for ear in ears if number <= PROBES else ():
            ear.ask(found)
        found |= listen(ears, wanted - found, start + number * step, step)
    return found


def listen(
    ears: Collection[ProbeSocket], wanted: set[Address], deadline: float, overtime: float
) -> set[Address]:
    """Return the addresses of ``wanted`` that are claimed until ``deadline``.

    All frames that have come by then are read, even if this process could not run in between.  If
    frames never cease, ``overtime``, in seconds, ends the reading.
    """
    found: set[Address] = set()
    poll = select.poll()
    by_descriptor = {ear.packet.fileno(): ear for ear in ears}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    while found != wanted:
        left = deadline - time.monotonic()
        ready = poll.poll(max(0.0, left) * 1000)
        if not ready or left < -overtime:
            break
        claimed = {by_descriptor[descriptor].hear() for descriptor, _ in ready}
        found |= {each for each in claimed if each in wanted}
    return found


def announce(link: str, address: Address, mac: str, probing: float = 0.0) -> bool:
    """Announce ``address`` to all neighbours on the link.

    Sent twice (RFC 5227, 2.3; RFC 4861, 7.2.6), without the pause of a second or two.  ``link`` is
    an interface of the calling namespace, and may have the address already: its own frames do not
    come back.  With ``probing``, in seconds, other stations are asked first.  If a station has the
    address, return False without an announcement.  Raises UpstreamError if the link cannot be used.
    """
    with _opened(link, address.version, f"announce {address}", [address]) as ear:
        frame = ear.protocol.announcement(bytes.fromhex(mac.replace(":", "")), address)
        _await_carrier(ear.packet, link)
        if probing and ask_all([ear], probing / (PROBES + 1)):
            return False
        ear.packet.send(frame)
        time.sleep(POLL)
        ear.packet.send(frame)
    return True


def _await_carrier(packet: socket.socket, link: str) -> None:
    """Wait, for a short time, until frames get past the other end of a patch.

    When a link is set up, the kernel takes note a little later, in a thread of its own.  Only then
    does the bridge at the other end let its port forward.
    """
    request = struct.pack("16s16x", link.encode())
    deadline = time.monotonic() + CARRIER_LIMIT
    while time.monotonic() < deadline:
        (flags,) = struct.unpack_from("=H", fcntl.ioctl(packet, SIOCGIFFLAGS, request), 16)
        if flags & IFF_RUNNING:
            return
        time.sleep(POLL)
