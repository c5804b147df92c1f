# SPDX-License-Identifier: LGPL-2.1-or-later
"""conntrack's time-outs as the administrator has set them hold in our namespaces, too."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab import Provider, Service, isolated, natns, run, write_config
from lab_domains import networks
from lab_hosts_packets import place

HOST = Path("/proc/sys/net/netfilter")
STREAM = "nf_conntrack_udp_timeout_stream"
ESTABLISHED = "nf_conntrack_tcp_timeout_established"
TUNED = {STREAM: "3600", ESTABLISHED: "86400"}

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture
def tuned(nothing_left: None) -> Iterator[None]:
    before = {key: (HOST / key).read_text() for key in TUNED}
    for key, value in TUNED.items():
        (HOST / key).write_text(value)
    yield
    for key, value in before.items():
        (HOST / key).write_text(value)


def values(namespace: str) -> dict[str, str]:
    keys = [f"net.netfilter.{key}" for key in TUNED]
    shown = run("sysctl", "-n", *keys, namespace=namespace).stdout.split()
    return dict(zip(TUNED, shown, strict=True))


@pytest.mark.parametrize("served", [True, False], ids=["service", "hooks"])
def test_time_outs_of_the_host(served: bool, tuned: None, provider: Provider) -> None:
    write_config(provider.config(more="probe = 0"))
    with ExitStack() as stack:
        if served:
            stack.enter_context(Service())
        stack.enter_context(networks(isolated("a", "virbr10")))
        assert values("nat-a") == TUNED
        assert natns("check").stdout == ""
        (HOST / STREAM).write_text("1800")
        told = natns("check", check=False).stdout
        assert f"{STREAM} is 3600 in nat-a, and 1800 in the host" in told
        natns("sync")
        assert values("nat-a")[STREAM] == "1800"


def test_time_outs_of_a_router(tuned: None) -> None:
    with place("router", "nftables"):
        assert values("natns-router-wan") == TUNED
        assert natns("check").stdout == ""
