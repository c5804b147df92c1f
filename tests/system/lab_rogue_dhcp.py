# SPDX-License-Identifier: LGPL-2.1-or-later
"""A DHCP server that sends whatever a test wants, which no real one would."""

import socket
import struct
import threading
from ipaddress import IPv4Address, IPv4Network

from lab_base import Closing
from lab_nodes import INTERFACE, Node

from libvirt_natns.kernel.netns import entered

DISCOVER, OFFER, REQUEST, ACK = 1, 2, 3, 5
COOKIE = bytes.fromhex("63825363")
MASK, ROUTER, DNS, HOSTNAME, DOMAIN, MTU = 1, 3, 6, 12, 15, 26
STATIC_ROUTES, LEASE_TIME, KIND, SERVER, CLASSLESS = 33, 51, 53, 54, 121
SO_BINDTODEVICE = 25

Options = dict[int, bytes]


def addresses(*texts: str) -> bytes:
    """The value of an option that is a list of addresses."""
    return b"".join(IPv4Address(each).packed for each in texts)


def classless(*routes: tuple[str, str]) -> bytes:
    """The value of option 121: destinations, each with its gateway."""
    found = b""
    for destination, gateway in routes:
        network = IPv4Network(destination)
        octets = (network.prefixlen + 7) // 8
        found += bytes([network.prefixlen]) + network.network_address.packed[:octets]
        found += IPv4Address(gateway).packed
    return found


class RogueDhcp(Closing):
    """Leases ``address`` to each client, for 900 s, with these options; use it in a ``with``.

    ``address`` and ``options`` may be changed while it runs.  ``acknowledged`` counts its leases.
    """

    def __init__(self, node: Node, address: str, options: Options) -> None:
        self.address, self.options = address, options
        self.acknowledged = 0
        self._own = node.addresses()[0].partition("/")[0]
        self._over = threading.Event()
        with entered(node.name):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, INTERFACE.encode())
        self._socket.bind(("", 67))
        self._socket.settimeout(0.1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def down(self) -> None:
        """Stop answering."""
        self._over.set()
        self._thread.join(5)
        self._socket.close()

    def _serve(self) -> None:
        while not self._over.is_set():
            try:
                request = self._socket.recv(2048)
            except TimeoutError:
                continue
            kind = _kind(request)
            if kind in (DISCOVER, REQUEST):
                answer = self._answer(request, OFFER if kind == DISCOVER else ACK)
                self.acknowledged += kind == REQUEST
                self._socket.sendto(answer, ("255.255.255.255", 68))

    def _answer(self, request: bytes, kind: int) -> bytes:
        options: Options = {
            KIND: bytes([kind]),
            SERVER: IPv4Address(self._own).packed,
            LEASE_TIME: struct.pack("!I", 900),
            MASK: addresses("255.255.255.0"),
            **self.options,
        }
        head = bytes([2, 1, 6, 0]) + request[4:8] + bytes(2) + b"\x80\0" + bytes(4)
        head += IPv4Address(self.address).packed + bytes(8) + request[28:44] + bytes(192)
        body = b"".join(bytes([code, len(value)]) + value for code, value in options.items())
        return head + COOKIE + body + b"\xff"


def _kind(request: bytes) -> int:
    """The type of a client's message; 0 for none."""
    place = 240
    while place + 2 < len(request) and request[place] != 255:
        if request[place] == KIND:
            return request[place + 2]
        place += 1 if request[place] == 0 else 2 + request[place + 1]
    return 0
