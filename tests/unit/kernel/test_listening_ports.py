# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listeners of the host, and which of them a forward would take clients from."""

import socket
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from libvirt_natns.kernel import listening_ports


def test_listeners_with_their_addresses() -> None:
    with ExitStack() as stack:
        ports = []
        for family, kind, address in (
            (socket.AF_INET, socket.SOCK_STREAM, "127.0.0.53"),
            (socket.AF_INET, socket.SOCK_DGRAM, "0.0.0.0"),
            (socket.AF_INET6, socket.SOCK_STREAM, "::1"),
        ):
            opened = stack.enter_context(socket.socket(family, kind))
            opened.bind((address, 0))
            if kind == socket.SOCK_STREAM:
                opened.listen()
            ports.append(opened.getsockname()[1])
        tcp, udp = (listening_ports.listeners(proto) for proto in ("tcp", "udp"))
    assert (ip_address("127.0.0.53"), ports[0]) in tcp
    assert (ip_address("0.0.0.0"), ports[1]) in udp
    assert (ip_address("::1"), ports[2]) in tcp


@pytest.mark.parametrize(
    ("listens", "forward", "is_taken"),
    [
        ("127.0.0.53", "192.168.77.2", False),
        ("192.168.122.1", "192.168.77.2", False),
        ("192.168.77.2", "192.168.77.2", True),
        ("0.0.0.0", "192.168.77.2", True),
        # By the wildcard of IPv6, too: most programs listen in both families so.
        ("::", "192.168.77.2", True),
        ("::1", "192.168.77.2", False),
        # On all addresses: also those of the loopback link, where the host asks its resolver.
        ("127.0.0.53", "0.0.0.0", True),
        ("::1", "0.0.0.0", False),
        ("2001:db8::1", "2001:db8::2", False),
        ("2001:db8::1", "2001:db8::1", True),
        ("2001:db8::1", "::", True),
        ("0.0.0.0", "2001:db8::1", False),
    ],
)
def test_a_forward_takes_from_its_own_address(listens: str, forward: str, is_taken: bool) -> None:
    found = {(ip_address(listens), 53)}
    assert listening_ports.taken(found, ip_address(forward)) == ({53} if is_taken else set())
