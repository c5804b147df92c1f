# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ways out of a host in both families, each from lines that an administrator or a VPN types.

A way is a link of the host's with a router behind it, and behind that the Internet: servers
that say as whom they see a client.  Each way has the same servers, as the real Internet.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from lab import FastGuest, Node, run
from lab_boundary import on_a_link
from lab_domains import asked
from lab_ipv6 import settle, static6

PORT = 8080
SERVERS = tuple(f"203.0.113.{number}" for number in range(80, 96))
SERVERS6 = tuple(f"2001:db8:ffff::{number}" for number in range(80, 96))
GUEST, GUEST6 = "10.0.0.5", "fd00:10::5"


@dataclass(frozen=True)
class Way:
    """A link ``p-NAME`` of the host's, with its addresses here and its router's there."""

    name: str
    here: str
    there: str
    here6: str
    there6: str

    @property
    def link(self) -> str:
        return f"p-{self.name}"

    def seen(self, family: int) -> str:
        """The host's address on this way."""
        return self.here if family == 4 else self.here6


TUNNEL = Way("far", "10.8.0.2", "10.8.0.1", "2001:db8:8::2", "2001:db8:8::1")
LAN = Way("lan", "192.168.7.2", "192.168.7.1", "2001:db8:7::2", "2001:db8:7::1")


@contextmanager
def way_out(way: Way, *lines: str) -> Iterator[Node]:
    """A way, and the lines by which the host uses it; rules and tables go with it again."""
    with ExitStack() as stack:
        far = on_a_link(stack, way.name, way.link, way.here, way.there)
        _speak_ipv6(way, far)
        for address in (*SERVERS, *SERVERS6):
            run("ip", "-n", far.name, "address", "add", address, "dev", "lo")
        far.serve("tcp", PORT)
        far.serve("tcp", PORT, address="::")
        stack.enter_context(lines_in_force(*lines))
        yield far


def _speak_ipv6(way: Way, far: Node) -> None:
    run("sysctl", "-qw", f"net.ipv6.conf.{way.link}.accept_dad=0")
    run("ip", "address", "add", f"{way.here6}/64", "dev", way.link, "nodad")
    settle(far)
    static6(far, f"{way.there6}/64", way.here6)


@contextmanager
def lines_in_force(*lines: str) -> Iterator[None]:
    """Commands whose rules and tables are removed again; routes go with their link."""
    with ExitStack() as stack:
        for line in lines:
            words = line.split()
            if "rule" in words and words[0] == "ip":
                undo = ["del" if word == "add" else word for word in words]
                stack.callback(run, *undo, check=False)
            elif words[:3] == ["nft", "add", "table"]:
                stack.callback(run, "nft", "delete", *words[2:], check=False)
            run(*words)
        yield


def both(*lines: str) -> tuple[str, ...]:
    """The lines in IPv4 and in IPv6, with the values of the tunnel for each."""
    values = (
        {"ip": "ip -4", "via": TUNNEL.there, "all": "0.0.0.0/0", "low": "0.0.0.0/1",
         "high": "128.0.0.0/1", "servers": "203.0.113.0/24"},
        {"ip": "ip -6", "via": TUNNEL.there6, "all": "::/0", "low": "::/1",
         "high": "8000::/1", "servers": "2001:db8:ffff::/48"},
    )  # fmt: skip
    return tuple(line.format(**each) for each in values for line in lines)


def default_by(way: Way, metric: int) -> tuple[str, ...]:
    """Default routes by a way in both families."""
    return tuple(
        f"ip -{family} route add default via {router} metric {metric}"
        for family, router in ((4, way.there), (6, way.there6))
    )


def dual_guest(stack: ExitStack, bridge: str, name: str = "guest") -> FastGuest:
    """A guest with an address of either family."""
    guest = stack.enter_context(FastGuest(bridge, name=name))
    settle(guest)
    guest.static(f"{GUEST}/24", "10.0.0.1")
    static6(guest, f"{GUEST6}/64", "fd00:10::1")
    return guest


def seen_as(
    namespace: str | None, family: int, servers: int = 1, timeout: float = 1.0
) -> set[str | None]:
    """As whom servers see somebody; None among them for a server that does not answer."""
    addresses: Sequence[str] = SERVERS if family == 4 else SERVERS6
    return {asked(namespace, "tcp", each, PORT, timeout) for each in addresses[:servers]}


def leaves_by(way: Way, namespace: str | None = "guest") -> bool:
    """Whether somebody leaves by a way in both families."""
    return all(seen_as(namespace, family) == {way.seen(family)} for family in (4, 6))
