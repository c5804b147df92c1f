# SPDX-License-Identifier: LGPL-2.1-or-later
"""Part 5: packets through the namespace, beside libvirt's native NAT; many forwards.

Guests are namespaces on libvirt's bridges, of one kind on both networks; the
far end is one more, on the provider's bridge.  All load stays between these.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import lab
from report import Goal, Line, Part
from views import upstream_address
from world import (
    GUEST,
    Hooks,
    Options,
    defined,
    native,
    own,
    provider,
    timed,
    wide_forwards,
)

FAR = "192.168.0.50"
IPERF_PORT, SOCKPERF_PORT, CONNECT_PORT = 5201, 11111, 9000
STREAMS = (1, 8)
CLIENTS = 4
TRIES = 3
BRIDGE_NF = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
SETTINGS = {"": "", "nf-": ", bridge-nf"}
"""Lines' prefixes and labels without and with br_netfilter, which Docker loads and Debian
does not.  With it, bridged frames pass through the host's rules and connection tracking:
twice through the host's and once through the namespace's, where native NAT pays once."""

ONE_CPU = ("taskset", "-c", "0")
TCP = ("--tcp", "-p", str(SOCKPERF_PORT))
TOOL = Path(__file__).resolve().parent / "connections.py"
GUEST_PORT = 80
"""Where the guests behind forwards serve; see ``world.forwards``."""

ABOUT = """\
Guests are namespaces, so the figures are those of the paths, not of emulated machines. Outwards
is from the guest. Both ends and the paths between share the CPUs. If one end waits for the other
(requests and responses, one new connection), both ends are held on one CPU: waking another CPU
costs more than any path, and happens by chance."""


def pair(key: str, label: str, unit: str, goal: Goal) -> Iterator[Line]:
    """Yield a line for native NAT and a line for the namespace."""
    yield Line(f"nat-{key}", f"{label}, native NAT", unit)
    yield Line(f"own-{key}", f"{label}, namespace", unit, (goal,))


def lines(options: Options) -> Iterator[Line]:
    for prefix, what in SETTINGS.items():
        yield from path_lines(prefix, what)
    count = f"{options.forwards:,}"
    yield Line("one-rate", f"new connections, {CLIENTS} clients, 1 forward", "1/s")
    rate = Goal(0.95, "one-rate", at_least=True)
    yield Line("many-rate", f"new connections, {CLIENTS} clients, {count} forwards", "1/s", (rate,))
    yield Line("one-latency", "one new connection, 1 forward", "us")
    latency = Goal(1 / 0.95, "one-latency")
    yield Line("many-latency", f"one new connection, {count} forwards", "us", (latency,))
    yield Line("many-start", f"net-start with {count} forwards (once)", "ms")


def path_lines(prefix: str, what: str) -> Iterator[Line]:
    """Yield the lines of both paths, with one setting of bridge-nf."""
    for streams in STREAMS:
        for way in ("out", "in"):
            key = f"{prefix}{way}{streams}"
            goal = Goal(1.0, f"nat-{key}", at_least=True)
            name = f"{streams} {'stream' if streams == 1 else 'streams'} {way}wards"
            yield from pair(key, f"{name}{what}", "Gbit/s", goal)
    more = {"exchange": "requests and responses", "rate": f"new connections, {CLIENTS} clients"}
    for key, label in more.items():
        goal = Goal(1.0, f"nat-{prefix}{key}", at_least=True)
        yield from pair(f"{prefix}{key}", f"{label}{what}", "1/s", goal)
    key = f"{prefix}latency"
    yield from pair(key, f"one new connection{what}", "us", Goal(1.0, f"nat-{key}"))


def measure(options: Options, hooks: Hooks) -> Part:
    part = Part("data-path", "The data path", ABOUT, list(lines(options)))
    with ExitStack() as stack:
        world = stack.enter_context(provider("probe = 0"))
        stack.enter_context(hooks.ours())
        stack.callback(bridge_nf, on=BRIDGE_NF.exists() and BRIDGE_NF.read_text() == "1\n")
        far = world.neighbour("far", f"{FAR}/24")
        if not BRIDGE_NF.exists():
            part.left_out.append("with bridge-nf: br_netfilter is not loaded here")
        _paths(part, far, options)
        _forwards(part, far, options)
    return part


# -- tools -----------------------------------------------------------------------


@contextmanager
def serving(node: lab.Node, port: int, *command: str) -> Iterator[None]:
    """Run a server in a node; the body starts when the server listens."""
    process = lab.spawn(*command, namespace=node.name)
    try:
        words = ("ss", "-Hltun", f"sport = :{port}")
        lab.wait_for(lambda: node.run(*words).stdout.strip(), what=" ".join(command))
        yield
    finally:
        # The server's own children end with its namespace's processes.
        for pid in lab.run("ip", "netns", "pids", node.name).stdout.split():
            found = _command(pid)
            if found and found == list(command[-len(found) :]):  # without taskset
                lab.run("kill", pid, check=False)
        lab.end_process(process)


def _command(pid: str) -> list[str]:
    file = Path(f"/proc/{pid}/cmdline")
    return file.read_text().split("\0")[:-1] if file.exists() else []


def throughput(guest: lab.Node, far: lab.Node, seconds: int, streams: int, inwards: bool) -> float:
    """Return the Gbit/s that arrive. iperf3 hangs now and then on a busy machine: then try
    again."""
    way = ("-R",) if inwards else ()
    words = ("iperf3", "-c", FAR, "-J", "-t", str(seconds), "-P", str(streams), *way)
    for _ in range(TRIES):
        with serving(far, IPERF_PORT, "iperf3", "-s", "-1"):
            done = guest.run(
                "timeout", str(seconds + 10), *words, check=False, timeout=seconds + 20
            )
        if done.returncode == 0:
            found = json.loads(done.stdout)["end"]["sum_received"]
            return float(found["bits_per_second"]) / 1e9
    raise lab.LabError(f"{' '.join(words)}: {done.stdout[-500:]}")


def exchanges(guest: lab.Node, seconds: int, *kind: str) -> float:
    """Return the answered requests a second, one at a time on one connection.

    ``kind`` are options of sockperf that say to which server, by default ``TCP``.
    """
    words = ("sockperf", "ping-pong", "-i", FAR, *(kind or TCP))
    output = guest.run(*ONE_CPU, *words, "-t", str(seconds), timeout=seconds + 30).stdout
    found = re.search(r"Summary: Latency is ([\d.]+) usec", output)
    if found is None:
        raise lab.LabError(f"sockperf said: {output[-1000:]}")
    return 1e6 / (2 * float(found[1]))  # it tells half a round trip


def connections(client: lab.Node, to: "Target", seconds: float, clients: int) -> dict[str, float]:
    words = ("connect", to.address, str(to.port), str(seconds), str(clients))
    placed = ONE_CPU if clients == 1 else ()
    done = client.run(*placed, lab.PYTHON, str(TOOL), *words, timeout=seconds + 30)
    return dict(json.loads(done.stdout))


# -- out and in, beside native NAT -----------------------------------------------


@contextmanager
def far_servers(far: lab.Node) -> Iterator[None]:
    sockperf = ("sockperf", "server", "--tcp", "-p", str(SOCKPERF_PORT))
    with ExitStack() as stack:
        stack.enter_context(serving(far, SOCKPERF_PORT, *ONE_CPU, *sockperf))
        yield


def _paths(part: Part, far: lab.Node, options: Options) -> None:
    with defined(native("nat", "virbrN"), own("own", "virbrO")):
        for name in ("nat", "own"):
            lab.virsh("net-start", name)
        with (
            lab.FastGuest("virbrN", name="g-nat") as nat,
            lab.FastGuest("virbrO", name="g-own") as ours,
        ):
            nat.static("192.168.77.5/24", "192.168.77.1")
            ours.static(f"{GUEST}/24", "10.0.0.1")
            guests = {"nat": nat, "own": ours}
            for guest in guests.values():
                lab.wait_for(lambda guest=guest: guest.ping(FAR), what="a way to the far end")  # type: ignore[misc]
            with far_servers(far):
                target = Target(far, CONNECT_PORT, FAR, CONNECT_PORT)
                for number in options.turns(5, 200):
                    for prefix in SETTINGS if BRIDGE_NF.exists() else [""]:
                        bridge_nf(on=bool(prefix))
                        _round(part, guests, target, options.seconds, number, prefix)
        bridge_nf(on=False)


def bridge_nf(on: bool) -> None:
    """Have bridged frames pass through the host's rules, or not."""
    if BRIDGE_NF.exists():
        BRIDGE_NF.write_text(f"{on:d}\n")


def _round(
    part: Part,
    guests: dict[str, lab.FastGuest],
    far: "Target",
    seconds: int,
    number: int,
    prefix: str,
) -> None:
    """Measure everything once on both paths; the first path changes from round to round."""
    turn = sorted(guests, reverse=bool(number % 2))
    for streams in STREAMS:
        for way in ("out", "in"):
            for name in turn:
                found = throughput(guests[name], far.node, seconds, streams, way == "in")
                part.note(f"{name}-{prefix}{way}{streams}", found)
    for name in turn:
        part.note(f"{name}-{prefix}exchange", exchanges(guests[name], seconds))
    for name in turn:
        note_connections(part, f"{name}-{prefix}", guests[name], far, seconds)


@dataclass(frozen=True)
class Target:
    """A server's node and port, and where its clients find it."""

    node: lab.Node
    listens: int
    address: str
    port: int

    @property
    def server(self) -> tuple[str, ...]:
        return (lab.PYTHON, str(TOOL), "serve", str(self.listens))


def note_connections(part: Part, name: str, client: lab.Node, to: Target, seconds: float) -> None:
    """Note the connections a second of many clients, and the duration of a connection."""
    with serving(to.node, to.listens, *to.server):
        many = connections(client, to, seconds, CLIENTS)
    with serving(to.node, to.listens, *ONE_CPU, *to.server):
        one = connections(client, to, seconds / 2, 1)
    part.note(f"{name}rate", many["rate"])
    part.note(f"{name}latency", one["microseconds"])


# -- many forwards ---------------------------------------------------------------


def _forwards(part: Part, far: lab.Node, options: Options) -> None:
    one, many = own("one", "virbrO", 1), own("many", "virbrM", more=wide_forwards(options.forwards))
    with ExitStack() as stack:
        stack.enter_context(defined(one, many))
        lab.virsh("net-start", "one")
        part.note("many-start", timed(lambda: lab.virsh("net-start", "many", timeout=300)))
        middle = 8000 + 5 * (options.forwards // 8)
        targets = {}
        for name, bridge, port in (("one", "virbrO", 8000), ("many", "virbrM", middle)):
            guest = stack.enter_context(lab.FastGuest(bridge, name=f"g-{name}"))
            guest.static(f"{GUEST}/24", "10.0.0.1")
            targets[name] = Target(guest, GUEST_PORT, upstream_address(name), port)
        for number in options.turns(5, 40):
            for name in sorted(targets, reverse=bool(number % 2)):
                note_connections(part, f"{name}-", far, targets[name], options.seconds)
