# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's ``<bandwidth>`` of a network holds for what passes our router, in both directions."""

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
from lab import Node, Provider, Service, isolated, natns, run, wait_for, write_config
from lab_boundary import FORWARDING, guest_on, nat_network
from lab_domains import networks

from libvirt_natns.kernel.netns import entered

AVERAGE, PEAK, BURST = 128, 256, 200
"""As libvirt has them: units of 1000 octets a second, and KiB."""
BANDWIDTH = (
    f"<bandwidth><inbound average='{AVERAGE}' peak='{PEAK}' burst='{BURST}'/>"
    f"<outbound average='{AVERAGE}' burst='{BURST}'/></bandwidth>"
)
WINDOW = 1.5
"""Seconds for which octets are counted."""
ON_THE_WAY = 300 << 10
"""Octets of the first moment: queues of the kernel, and packets of 64 KiB."""
PORT = 9999

pytestmark = pytest.mark.usefixtures("installed")


@contextmanager
def tc_of_libvirt() -> Iterator[None]:
    """A tc(8) that does what the kernel can: some kernels have no SFQ, and cannot police."""
    program = shutil.which("tc")
    assert program is not None
    real, other = Path("/run/tmp/tc-real"), Path("/run/tmp/tc")
    shutil.copy(program, real)
    other.write_text(f'#!/bin/sh\n{real} "$@"\nexit 0\n')
    other.chmod(0o755)
    run("mount", "--bind", other, program)
    try:
        yield
    finally:
        run("umount", program)


def carried(sender: Node, receiver: Node, address: str, *, connects: Node) -> float:
    """Octets a second that a TCP connection carries, less what a burst may be."""
    other = sender if connects is receiver else receiver
    with ExitStack() as stack:
        with entered(other.name):
            listener = stack.enter_context(socket.create_server(("", PORT)))
        caller = stack.enter_context(connects.connect(address, PORT))
        called = stack.enter_context(closing(listener.accept()[0]))
        source, sink = (caller, called) if connects is sender else (called, caller)
        source.setblocking(False)
        sink.setblocking(False)
        begin, count = time.monotonic(), 0
        while time.monotonic() < begin + WINDOW:
            with suppress(BlockingIOError):
                source.send(bytes(1 << 16))
            with suppress(BlockingIOError):
                count += len(sink.recv(1 << 20))
        passed = time.monotonic() - begin
    assert count, "nothing came"
    return (count - (BURST << 10) - ON_THE_WAY) / passed


def both_ways(guest: Node, outside: Node, address: str) -> tuple[float, float]:
    return (
        carried(outside, guest, address, connects=guest),
        carried(guest, outside, address, connects=guest),
    )


def kept(rates: tuple[float, float]) -> bool:
    to_guest, from_guest = rates
    return to_guest < PEAK * 1000 and from_guest < AVERAGE * 1000


@pytest.mark.parametrize("served", [True, False], ids=["service", "hooks"])
def test_limits_of_a_network(served: bool, provider: Provider) -> None:
    control = nat_network("control", "virbr52", "192.168.152")
    control = control.replace("<ip ", f"{BANDWIDTH}<ip ", 1)
    write_config(provider.config(more="probe = 0"))
    with ExitStack() as stack:
        # libvirt switches it on for a network with NAT, and leaves it.
        stack.callback(FORWARDING.write_text, FORWARDING.read_text())
        if served:
            stack.enter_context(Service())
        stack.enter_context(tc_of_libvirt())
        stack.enter_context(networks(isolated("a", "virbr10", more=BANDWIDTH), control))
        ours = guest_on(stack, "ours", "virbr10", "10.0.0.5")
        theirs = guest_on(stack, "theirs", "virbr52", "192.168.152.5")
        outside = provider.router
        assert carried(outside, theirs, provider.gateway, connects=theirs) < PEAK * 1000, "control"
        assert kept(both_ways(ours, outside, provider.gateway))
        assert natns("check").stdout == ""
        if served:
            return
        run("tc", "qdisc", "del", "dev", "virbr10", "root", namespace="nat-a")
        told = natns("check", check=False).stdout
        assert "virbr10 in nat-a is not limited to 128000 octets/s, at most 256000" in told
        natns("sync")
        # The first streams have left octets in the queue, which pass ahead of others.
        wait_for(lambda: ours.ping(provider.gateway))
        assert kept(both_ways(ours, outside, provider.gateway))


def test_a_network_without_limits(provider: Provider) -> None:
    write_config(provider.config(more="probe = 0"))
    with ExitStack() as stack:
        stack.enter_context(networks(isolated("a", "virbr10")))
        guest = guest_on(stack, "ours", "virbr10", "10.0.0.5")
        assert not kept(both_ways(guest, provider.router, provider.gateway))
