# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stations that answer for addresses that they do not have."""

import heapq
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address

from lab_nodes import Node

ARP_REQUEST, ARP_REPLY = 1, 2
SOLICITATION, ADVERTISEMENT = 135, 136
ICMPV6 = 58
ALL_NODES = IPv6Address("ff02::1")

Answer = tuple[IPv4Address | IPv6Address, bytes]
"""The address that was asked for, and the frame that claims it."""


class Liar:
    """What a station was asked for by probes, and answered; for its test to look at."""

    def __init__(self) -> None:
        self.answered: list[IPv4Address | IPv6Address] = []


@contextmanager
def lying(
    node: Node,
    claims: Callable[[IPv4Address | IPv6Address], bool],
    delay: float = 0.0,
) -> Iterator[Liar]:
    """Have a machine answer probes for the addresses that it ``claims``, ``delay`` s late."""
    mac = bytes.fromhex(node.mac.replace(":", ""))
    liar, over = Liar(), threading.Event()
    waiting: list[tuple[float, int, bytes]] = []

    def answer() -> None:
        while not over.is_set():
            try:
                found = _asked(packet.recv(2048), mac)
            except TimeoutError:
                found = None
            if found is not None and claims(found[0]):
                liar.answered.append(found[0])
                heapq.heappush(waiting, (time.monotonic() + delay, len(liar.answered), found[1]))
            while waiting and waiting[0][0] <= time.monotonic():
                packet.send(heapq.heappop(waiting)[2])

    with node.packet_socket(timeout=0.002) as packet:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield liar
        finally:
            over.set()
            thread.join(5)


def _asked(frame: bytes, mac: bytes) -> Answer | None:
    """What a probe of either family asks for, and the answer to it."""
    asker = frame[6:12]
    if asker == mac:
        return None
    if frame[12:14] == b"\x08\x06" and frame[21] == ARP_REQUEST and frame[28:32] == bytes(4):
        wanted = frame[38:42]
        head = asker + mac + frame[12:20] + bytes([0, ARP_REPLY])
        return IPv4Address(wanted), head + mac + wanted + asker + bytes(4)
    probes = frame[12:14] == b"\x86\xdd" and frame[20] == ICMPV6 and frame[54] == SOLICITATION
    if probes and frame[22:38] == bytes(16):
        address = IPv6Address(frame[62:78])
        return address, advertisement(mac, address)
    return None


def advertisement(mac: bytes, address: IPv6Address) -> bytes:
    """The frame by which a station tells all that it has an IPv6 address."""
    option = struct.pack("!BB6s", 2, 1, mac)
    length = 24 + len(option)
    flags = 0x20000000
    unsummed = struct.pack("!BBHI16s", ADVERTISEMENT, 0, 0, flags, address.packed) + option
    pseudo = address.packed + ALL_NODES.packed + struct.pack("!II", length, ICMPV6)
    total = sum(struct.unpack(f"!{(len(pseudo) + length) // 2}H", pseudo + unsummed))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    message = unsummed[:2] + struct.pack("!H", total ^ 0xFFFF) + unsummed[4:]
    head = b"\x33\x33\0\0\0\1" + mac + b"\x86\xdd"
    header = struct.pack("!IHBB", 6 << 28, length, ICMPV6, 255)
    return head + header + address.packed + ALL_NODES.packed + message
