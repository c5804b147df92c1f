# SPDX-License-Identifier: LGPL-2.1-or-later
"""Servers that tell a client which address they saw, and remember it.

They run as threads of the test's own process: a socket belongs for good to the
network namespace in which it was opened, so a listener opened inside a namespace
serves that namespace, and what it saw is a plain list in the test.
"""

import socket
import socketserver
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from lab_base import LabError

from libvirt_natns.kernel.netns import entered

WEB_PORT = 80
ECHO_PORT = 7


@dataclass(frozen=True)
class Contact:
    """One request that a server got: who sent it, as the server saw it."""

    protocol: Literal["http", "tcp", "udp"]
    address: str
    port: int
    payload: str


class _Threads:
    """What all servers share: a thread of their own, daemonic handlers."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256
    block_on_close = False
    name: str
    contacts: list[Contact]
    socket: socket.socket
    address_family: int

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            # Or "::" would be IPv4's addresses, too.
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()  # type: ignore[misc]


class _TcpServer(_Threads, socketserver.ThreadingTCPServer):
    pass


class _UdpServer(_Threads, socketserver.ThreadingUDPServer):
    max_packet_size = 65535


class _WebHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _TcpServer

    def do_GET(self) -> None:
        """Answer /, /name, /bytes/N and /stream?count=N&interval=SECONDS."""
        address, port = self.client_address[:2]
        self.server.contacts.append(Contact("http", address, port, self.path))
        url = urlsplit(self.path)
        if url.path == "/stream":
            query = parse_qs(url.query)
            return self._stream({key: float(values[0]) for key, values in query.items()})
        if url.path.startswith("/bytes/"):
            return self._answer(b"x" * int(url.path.removeprefix("/bytes/")))
        if url.path == "/name":
            return self._answer(f"{self.server.name}\n".encode())
        return self._answer(f"{address}:{port}\n".encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, query: dict[str, float]) -> None:
        """One numbered line after the other; the connection ends with the last."""
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(int(query.get("count", 1e9))):
            self.wfile.write(f"{number}\n".encode())
            time.sleep(query.get("interval", 0.05))

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401
        """Nothing: what came in is in ``contacts``."""


class _TcpEcho(socketserver.StreamRequestHandler):
    server: _TcpServer

    def handle(self) -> None:
        address, port = self.client_address[:2]
        contacts = self.server.contacts
        contacts.append(Contact("tcp", address, port, ""))
        try:
            self.wfile.write(f"{address}:{port}\n".encode())
            while data := self.request.recv(65536):
                contacts.append(Contact("tcp", address, port, data.decode(errors="replace")))
                self.wfile.write(data)
        except OSError:
            return


class _UdpEcho(socketserver.BaseRequestHandler):
    server: _UdpServer

    def handle(self) -> None:
        address, port = self.client_address[:2]
        data, reply = self.request
        self.server.contacts.append(Contact("udp", address, port, data.decode(errors="replace")))
        reply.sendto(f"{address}:{port}\n".encode() + data, self.client_address)


class Server:
    """A running server; ``contacts`` lists what it saw, oldest first.

    * ``http``: ``/`` answers ``ADDRESS:PORT`` of the client, ``/name`` the
      server's name, ``/bytes/N`` that many bytes, and
      ``/stream?count=N&interval=S`` numbered lines (endless without a count).
      Connections are kept alive.
    * ``tcp``: greets with the line ``ADDRESS:PORT``, then echoes.
    * ``udp``: answers each datagram with the line ``ADDRESS:PORT`` and its data.
    """

    def __init__(
        self,
        namespace: str | None,
        protocol: Literal["http", "tcp", "udp"],
        port: int,
        *,
        address: str = "",
        name: str = "",
    ) -> None:
        handlers = {"http": _WebHandler, "tcp": _TcpEcho, "udp": _UdpEcho}
        kind: type[_TcpServer] | type[_UdpServer]
        kind = _UdpServer if protocol == "udp" else _TcpServer
        kind.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with entered(namespace):
                self._server = kind((address, port), handlers[protocol])
        except OSError as error:
            raise LabError(f"cannot serve {protocol} port {port}: {error}") from error
        self.contacts: list[Contact] = []
        self._server.contacts = self.contacts
        self._server.name = name
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    def addresses(self) -> set[str]:
        """The addresses of all clients so far."""
        return {contact.address for contact in self.contacts}

    def close(self) -> None:
        """Stop listening; connections that are open stay so."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
