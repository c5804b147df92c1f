# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which of the host's resolvers a namespace can reach."""

from ipaddress import IPv4Address
from pathlib import Path

import pytest

from libvirt_natns.daemons.resolv_conf import Resolvers, host_resolvers

FIRST = IPv4Address("192.168.0.53")
SECOND = IPv4Address("192.168.0.54")


@pytest.mark.parametrize(
    ("text", "servers", "polled"),
    [
        ("nameserver 192.168.0.53\n", (FIRST,), True),
        ("# x\nsearch lab\n\tnameserver  192.168.0.53 # y\noptions edns0\n", (FIRST,), True),
        ("nameserver 192.168.0.53\nnameserver 192.168.0.54\n", (FIRST, SECOND), True),
        # dnsmasq passes over the one that it cannot reach ...
        ("nameserver 2001:db8::53\nnameserver fe80::1%eth0\nnameserver 192.168.0.53\n",
         (FIRST,), True),
        # ... but asks a stub in its own namespace, and waits.
        ("nameserver 127.0.0.1\nnameserver 192.168.0.53\n", (FIRST,), False),
        ("nameserver ::1\nnameserver 192.168.0.53\n", (FIRST,), False),
        ("nameserver 127.0.0.53\n", (), False),
        ("nameserver 2001:db8::53\n", (), False),
        ("nameserver\nnameserver gateway\nnameservers 192.168.0.53\n", (), False),
        ("", (), False),
    ],
)  # fmt: skip
def test_one_source(
    text: str, servers: tuple[IPv4Address, ...], polled: bool, tmp_path: Path
) -> None:
    source = tmp_path / "resolv.conf"
    source.write_text(text)
    assert host_resolvers((source,)) == Resolvers(servers, source if polled else None)


def test_stub_leads_to_the_source_behind_it(tmp_path: Path) -> None:
    stub, missing, real, later = (tmp_path / name for name in ("stub", "missing", "real", "later"))
    stub.write_text("nameserver 127.0.0.53\n")
    real.write_text("nameserver 192.168.0.53\n")
    later.write_text("nameserver 192.168.0.54\n")
    assert host_resolvers((stub, missing, real, later)) == Resolvers((FIRST,), real)


def test_host_without_resolvers(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\n")
    assert host_resolvers((tmp_path / "missing", tmp_path, binary)) == Resolvers()
