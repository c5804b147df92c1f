# SPDX-License-Identifier: LGPL-2.1-or-later
"""Part 6: the upstream ``host`` by the kernel, beside a namespace that pasta joins to the host.

docs/explanation/pasta.md tells what the figures decided.  Both guests are namespaces behind a
bridge and a namespace that translates; the far end is a neighbour of the host.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack

import lab
from data_path import (
    CLIENTS,
    CONNECT_PORT,
    FAR,
    GUEST_PORT,
    IPERF_PORT,
    ONE_CPU,
    SOCKPERF_PORT,
    STREAMS,
    Target,
    exchanges,
    far_servers,
    note_connections,
    serving,
    throughput,
)
from lab_hosts_pasta import NAMESPACE, Joined, Pasta
from report import Goal, Line, Part
from world import GUEST, STATE, Hooks, Options, defined, own

HOST = "192.168.0.2"
PUBLISHED = {"kernel": 8000, "pasta": 9000}
DATAGRAM, RATE = 1400, "2G"
UDP_PORT = SOCKPERF_PORT + 1
UDP = ("-p", str(UDP_PORT))

ABOUT = """\
Both guests leave by the host's one address. The one side is the built-in upstream `host`. The
other is a namespace whose way out is pasta, with the MTU of 1500 that guests have. Outwards is
from the guest. The goals ask whether pasta could be the default: no figure may be worse than
half as good. Bridged frames pass through iptables if the kernel has br_netfilter. pasta runs on
any CPU. Memory is what belongs to one process alone."""

RATES = {
    **{
        f"{way}{streams}": (
            f"{streams} TCP {'stream' if streams == 1 else 'streams'} {way}wards",
            "Gbit/s",
        )
        for streams in STREAMS
        for way in ("out", "in")
    },
    "datagrams": (f"datagrams of {DATAGRAM} octets outwards, of {RATE}bit/s sent", "Gbit/s"),
    "exchange": ("requests and responses, TCP", "1/s"),
    "udp-exchange": ("requests and responses, UDP", "1/s"),
    "rate": (f"new connections outwards, {CLIENTS} clients", "1/s"),
    "in-rate": (f"new connections to a published port, {CLIENTS} clients", "1/s"),
}
TIMES = {"latency": "one new connection outwards", "in-latency": "one to a published port"}


def lines() -> Iterator[Line]:
    """Yield a line of each way for each figure, and the memory of pasta."""
    for key, (label, unit) in RATES.items():
        yield Line(f"kernel-{key}", f"{label}, kernel", unit)
        goal = Goal(0.5, f"kernel-{key}", at_least=True)
        yield Line(f"pasta-{key}", f"{label}, pasta", unit, (goal,))
    for key, label in TIMES.items():
        yield Line(f"kernel-{key}", f"{label}, kernel", "us")
        yield Line(f"pasta-{key}", f"{label}, pasta", "us", (Goal(2.0, f"kernel-{key}"),))
    yield Line("idle", "memory of pasta, at its start", "kB")
    yield Line("used", "memory of pasta, after this load", "kB")


def measure(options: Options, hooks: Hooks) -> Part:
    """Measure both ways in turn, round after round."""
    part = Part("pasta", "The upstream `host` by the kernel, and by pasta", ABOUT, list(lines()))
    for file in STATE.glob("state.db*"):
        file.unlink()
    lab.remove_config()
    with ExitStack() as stack:
        provider = stack.enter_context(lab.Provider())
        stack.enter_context(hooks.ours())
        far = provider.neighbour("far", f"{FAR}/24")
        stack.enter_context(defined(own("kernel", "virbrO", 1)))
        lab.virsh("net-start", "kernel")
        kernel = stack.enter_context(lab.FastGuest("virbrO", name="g-kernel"))
        kernel.static(f"{GUEST}/24", "10.0.0.1")
        joined = stack.enter_context(Joined())
        port = f"{HOST}/{PUBLISHED['pasta']}:{GUEST_PORT}"
        pasta = stack.enter_context(Pasta(NAMESPACE, tcp=port))
        part.note("idle", pasta.memory())
        guests = {"kernel": kernel, "pasta": joined.guest}
        stack.enter_context(far_servers(far))
        stack.enter_context(serving(far, UDP_PORT, *ONE_CPU, "sockperf", "server", *UDP))
        published = [name for name in guests if hears(far, guests[name], PUBLISHED[name])]
        if "pasta" not in published:
            part.left_out.append(
                "ports published by this pasta: a server that speaks first is mute"
            )
        for number in options.turns(4, 120):
            _round(part, guests, far, options.seconds, number)
            for name in sorted(published, reverse=bool(number % 2)):
                inside = Target(guests[name], GUEST_PORT, HOST, PUBLISHED[name])
                note_connections(part, f"{name}-in-", far, inside, options.seconds)
            part.note("used", pasta.memory())
    return part


def _round(
    part: Part, guests: dict[str, lab.FastGuest], far: lab.Node, seconds: int, number: int
) -> None:
    """Measure everything once on both ways; the first way changes from round to round."""
    turn = sorted(guests, reverse=bool(number % 2))
    for streams in STREAMS:
        for way in ("out", "in"):
            for name in turn:
                found = throughput(guests[name], far, seconds, streams, way == "in")
                part.note(f"{name}-{way}{streams}", found)
    for name in turn:
        part.note(f"{name}-datagrams", datagrams(guests[name], far, seconds))
    for name in turn:
        part.note(f"{name}-exchange", exchanges(guests[name], seconds))
        part.note(f"{name}-udp-exchange", exchanges(guests[name], seconds, *UDP))
    outside = Target(far, CONNECT_PORT, FAR, CONNECT_PORT)
    for name in turn:
        note_connections(part, f"{name}-", guests[name], outside, seconds)


def hears(client: lab.Node, guest: lab.Node, port: int) -> bool:
    """True if a client of a published port gets what the guest says first.

    pasta of Debian 12 ends its handshake with the guest only when the client speaks.
    """
    with (
        serving(guest, GUEST_PORT, *Target(guest, GUEST_PORT, HOST, port).server),
        client.connect(HOST, port) as stream,
    ):
        try:
            return bool(stream.recv(1))
        except TimeoutError:
            return False


def datagrams(guest: lab.Node, far: lab.Node, seconds: int) -> float:
    """Return the Gbit/s of datagrams that arrive."""
    words = ("iperf3", "-c", FAR, "-J", "-u", "-l", str(DATAGRAM), "-b", RATE, "-t", str(seconds))
    with serving(far, IPERF_PORT, "iperf3", "-s", "-1"):
        done = json.loads(guest.run(*words, timeout=seconds + 20).stdout)
    total = done["end"]["sum"]
    share = 1 - float(total["lost_percent"]) / 100
    return float(total["bits_per_second"]) * share / 1e9
