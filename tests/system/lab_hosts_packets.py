# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that keep sending, and worlds of each kind of upstream for them."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import lab_vps
from lab import INTERNET, FastGuest, natns, remove_config, run, wait_for, write_config
from lab_base import Closing
from lab_boundary import on_a_link
from lab_domains import STATE
from lab_ipv6 import GATEWAY6, DualProvider, static6
from lab_vps import Vps

from libvirt_natns.kernel.netns import entered

PAUSE = 0.05
"""Seconds between two datagrams."""


class Caller(Closing):
    """A client that sends datagrams from one port without an end, answered or not."""

    def __init__(self, namespace: str | None, address: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with entered(namespace):
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.settimeout(PAUSE)
        self._target = (address, port)
        self.name = f"a client in {namespace or 'the host'} of {address}"
        self.sent = self.answers = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()

    def _call(self) -> None:
        while not self._ended.is_set():
            with suppress(OSError):
                self._socket.sendto(b"again", self._target)
            self.sent += 1
            with suppress(OSError):
                self._socket.recv(100)
                self.answers += 1
                self._ended.wait(PAUSE)

    def goes_on(self) -> None:
        """Wait until several more datagrams were sent."""
        before = self.sent
        wait_for(lambda: self.sent > before + 4, what="more datagrams")

    def is_answered(self, timeout: float = 4.0) -> None:
        """Wait for an answer from now on.  Raises LabError."""
        before = self.answers
        wait_for(lambda: self.answers > before + 1, timeout, f"an answer to {self.name}")

    def is_silent(self) -> None:
        """Wait until nothing is answered any more.  Raises LabError."""

        def unanswered() -> bool:
            before = self.answers
            self.goes_on()
            return self.answers == before

        wait_for(unanswered, what=f"no answer to {self.name}")

    def down(self) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()


@dataclass(frozen=True)
class Place:
    """A kind of upstream: clients by namespace, and the addresses at which ports are published.

    ``metadata`` is for the networks that are to have these addresses.  ``servers`` are addresses
    of the first client, which guests reach.
    """

    clients: tuple[str | None, ...]
    addresses: tuple[str, ...]
    servers: tuple[str, ...]
    metadata: str = ""


FAR, HERE = "10.8.0.1", "10.8.0.2"
A4, A6 = "192.168.0.150", "2001:db8:77::150"
PINNED = f'<natns:upstream name="provider" address="{A4}" address6="{A6}"/>'


@contextmanager
def place(kind: str, firewall: str, more: str = "") -> Iterator[Place]:
    """The world of a kind of upstream, which is the default one; ``more`` are its keys."""
    makers = {"host": _host, "bridge": _bridge, "macvlan": _bridge, "router": _router}
    with ExitStack() as stack:
        stack.callback(remove_config)
        for file in STATE.glob("state.db*"):
            file.unlink()
        yield makers[kind](stack, kind, f'firewall = "{firewall}"\n', more)


def _host(stack: ExitStack, _: str, config: str, more: str) -> Place:
    write_config(f'{config}[upstreams.host]\nkind = "host"\n{more}\n')
    far = on_a_link(stack, "far", "p-far", HERE, FAR)
    prefix = "2001:db8:8::"
    run("ip", "address", "add", f"{prefix}2/64", "dev", "p-far", "nodad")
    static6(far, f"{prefix}1/64", f"{prefix}2")
    return Place(("far", None), (HERE, f"{prefix}2"), (FAR, f"{prefix}1"))


def _bridge(stack: ExitStack, kind: str, config: str, more: str) -> Place:
    provider = stack.enter_context(DualProvider(host6=False))
    more += '\nattach = "macvlan"' if kind == "macvlan" else ""
    write_config(config + provider.config6(more=more).replace('firewall = "auto"\n', ""))
    client = provider.neighbour("client", "192.168.0.77/24")
    static6(client, "2001:db8:77::77/64", GATEWAY6)
    return Place(("client",), (A4, A6), ("192.168.0.77", "2001:db8:77::77"), PINNED)


def _router(stack: ExitStack, _: str, config: str, more: str) -> Place:
    stack.enter_context(Vps())
    write_config(f'{config}upstream = "wan"\n{lab_vps.CONFIG}{more}\n')
    natns("router", "up")
    servers = (INTERNET, lab_vps.INTERNET6)
    # In IPv6 the host has addresses of its own, with all their ports.
    return Place((lab_vps.NAMESPACE, None), (lab_vps.ADDRESS,), servers)


@contextmanager
def serving_guest(bridge: str) -> Iterator[FastGuest]:
    """A guest of both families that answers on UDP port 22."""
    with FastGuest(bridge, name="guest") as guest:
        guest.static("10.0.0.5/24", "10.0.0.1")
        static6(guest, "fd00:10::5/64", "fd00:10::1")
        guest.serve("udp", 22)
        guest.serve("udp", 22, address="::")
        yield guest
