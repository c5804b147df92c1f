# SPDX-License-Identifier: LGPL-2.1-or-later
"""Part 4: many networks: the last set-up beside the first, sync, all again after a reboot.

libvirt runs the networks without hooks; their routers are set up in this
process.  A reboot is played: everything of ours that the kernel and /run held
is removed, and the boot has another id.
"""

import os
import re
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lab
from report import Goal, Line, Part
from set_up import engine_down, engine_up
from world import (
    NO_SERVICE,
    Hooks,
    Options,
    Service,
    engine,
    has_service,
    own,
    process_time,
    provider,
    service,
    settle,
    timed,
)

from libvirt_natns.names import (
    NETNS_DIRECTORY,
    PRIVATE_PREFIX,
    RUN_DIRECTORY,
    UPSTREAM_PREFIX,
)

FILES = Path("/run/tmp/scale")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
BATCH = 50
IDLE = 5.0
"""Seconds over which the service's idling is watched."""

QUIET_LIMIT = 60.0
"""Seconds to wait until the service idles."""

PING_INTERVAL = 0.01

WORLD = {
    "subnet": "172.20.0.0/16",
    "gateway": "172.20.0.1",
    "host_address": "172.20.0.2/16",
}
POOL = "172.20.1.0-172.20.16.255"

ABOUT = """\
Every network has the same subnet, a `<natns:ip>` with DHCP and no forward, and all are on one
upstream bridge. sync is the command, from its start to its end. The goals for 500 networks are
compared with the time per network."""


def lines(count: int, ends: int) -> Iterator[Line]:
    first = f"set-up, the first {ends} networks"
    yield Line("first", first, "ms")
    yield Line("last", f"set-up, the last {ends} of {count}", "ms", (Goal(1.2, "first"),))
    sync = (Goal(5000 / 500, how="value"),)
    yield Line("sync", f"`virt-natns sync` of {count} healthy networks, per network", "ms", sync)
    yield Line("loss", "packets lost meanwhile", "", (Goal(0, how="value"),))
    yield Line("sent", "of a stream of pings, packets sent", "")
    yield Line("queues", "dropped by full queues of CPUs, anybody's", "")
    rebuilt = (Goal(30000 / 500, how="value"),)
    yield Line("rebuild", "all from nothing by `virt-natns sync`, per network", "ms", rebuilt)
    yield Line("down", "tear-down, per network", "ms")


def served_lines() -> Iterator[Line]:
    yield Line("empty", "memory of the service, no network", "MB", (Goal(60, how="value"),))
    yield Line("full", "memory of the service, all networks", "MB", (Goal(60, how="value"),))
    yield Line("each", "memory of the service, per network", "kB", (Goal(30, how="value"),))
    yield Line("idle", "CPU of the idle service, all networks", "%", (Goal(0.1, how="value"),))


class Networks:
    """Networks that libvirt runs; ``documents`` is the XML that libvirt would give our hooks."""

    def __init__(self, numbers: range) -> None:
        self.names = [f"n{number}" for number in numbers]
        plain = [own(name, f"virbr-{name}", uuid=str(uuid.uuid4())) for name in self.names]
        self.documents = [f"<hookData>{xml}</hookData>".encode() for xml in plain]
        FILES.mkdir(parents=True, exist_ok=True)
        for name, xml in zip(self.names, plain, strict=True):
            (FILES / name).write_text(xml)
        self._each("net-create", [str(FILES / name) for name in self.names])

    @staticmethod
    def _each(verb: str, arguments: list[str]) -> None:
        """Run a command of virsh for each argument, many in one process."""
        for start in range(0, len(arguments), BATCH):
            batch = [f"{verb} {argument}" for argument in arguments[start : start + BATCH]]
            lab.virsh("; ".join(batch), timeout=600)

    def close(self) -> None:
        self._each("net-destroy", self.names)


@contextmanager
def networks(numbers: range) -> Iterator[Networks]:
    made = Networks(numbers)
    try:
        yield made
    finally:
        made.close()


def measure(options: Options, hooks: Hooks) -> Part:
    count = options.networks
    ends = max(1, min(20, count // 5))
    with_service = has_service()
    part = Part("scale", f"{count} networks", ABOUT, list(lines(count, ends)))
    if with_service:
        part.lines += served_lines()
    else:
        part.left_out.append(f"memory and idling of the service: {NO_SERVICE}")
    with ExitStack() as stack:
        world = stack.enter_context(provider(**WORLD))
        config = world.config(pool=POOL, more="probe = 0")
        lab.write_config(config)
        # Before there are networks, which the service would set up.
        memory = [_memory()] if with_service else []
        few = stack.enter_context(networks(range(max(1, count // 10))))
        taken = _set_up(few, warm_up=True)
        memory += [_memory()] if with_service else []
        rest = stack.enter_context(networks(range(len(few.names), count)))
        taken += _set_up(rest)
        part.line("first").values += taken[:ends]
        part.line("last").values += taken[-ends:]
        _sync(part, count, options)
        if with_service:
            _idle(part)
            memory.append(_memory())
            _note_memory(part, memory, len(rest.names))
        _reboot(part, count)
        _take_down(part, few.documents + rest.documents)
    return part


def _set_up(made: Networks, warm_up: bool = False) -> list[float]:
    """Set up the networks; return the milliseconds for each."""
    with engine() as verbs:
        for xml in made.documents[:1] * (3 if warm_up else 1):
            # Libraries and files warm up; not counted.
            engine_up(verbs, xml)
            engine_down(verbs, xml)
            settle()
        return [timed(lambda xml=xml: engine_up(verbs, xml)) for xml in made.documents]  # type: ignore[misc]


# -- sync ------------------------------------------------------------------------


def _sync_time() -> float:
    return process_time(["/usr/bin/env", f"PYTHONPATH={lab.CHECKOUT}", *SYNC])


SYNC = (lab.PYTHON, "-m", "libvirt_natns", "sync")


def _sync(part: Part, count: int, options: Options) -> None:
    _sync_time()  # libvirt's additions to the documents are recorded now
    with lab.FastGuest("virbr-n0", name="pinger") as guest:
        guest.static("10.0.0.5/24", "10.0.0.1")
        lab.wait_for(lambda: guest.ping(lab.INTERNET), what="a way out of the first network")
        for _ in options.turns(5, 40, least=1):
            dropped = queue_drops()
            with Pings(guest) as pings:
                taken = _sync_time()
            part.note("queues", queue_drops() - dropped)
            part.note("sync", taken / count)
            part.note("loss", pings.sent - pings.answered)
            part.note("sent", pings.sent)


def queue_drops() -> int:
    """Return the packets that did not fit into the CPUs' queues, which all namespaces share."""
    lines = Path("/proc/net/softnet_stat").read_text().splitlines()
    return sum(int(line.split()[1], 16) for line in lines)


class Pings:
    """A stream of echo requests from a guest to beyond the provider's router."""

    def __init__(self, guest: lab.Node) -> None:
        self.sent = self.answered = 0
        words = ("busybox", "ping", "-i", str(PING_INTERVAL), "-W", "1", lab.INTERNET)
        self._process = lab.spawn(*words, namespace=guest.name)

    def __enter__(self) -> "Pings":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGINT)
        output, _ = self._process.communicate(timeout=10)
        found = re.search(r"(\d+) packets transmitted, (\d+) packets received", output)
        if found is None:
            raise lab.LabError(f"ping said: {output[-500:]}")
        self.sent, self.answered = int(found[1]), int(found[2])
        # The last one may be on its way when the stream ends.
        self.sent -= self.sent - self.answered == 1


# -- the service -----------------------------------------------------------------


def _quiet(running: Service) -> None:
    """Wait until a service that has just started has looked at everything."""
    end = time.monotonic() + QUIET_LIMIT
    while time.monotonic() < end and _share(running, 1.0) > 0.5:
        pass


def _share(running: Service, seconds: float) -> float:
    """Return the per cent of one CPU that the service uses."""
    before = running.cpu
    settle(seconds)
    return 100 * (running.cpu - before) / seconds


def _memory() -> float:
    """Return the memory of a service that has looked at all networks, in kB."""
    with service() as running:
        _quiet(running)
        return running.memory


def _idle(part: Part) -> None:
    with service() as running:
        _quiet(running)
        part.note("idle", _share(running, IDLE))


def _note_memory(part: Part, memory: list[float], more: int) -> None:
    """Note the ``memory`` with no network, with some, and with ``more`` of them."""
    none, few, many = memory
    part.note("empty", none / 1000)
    part.note("full", many / 1000)
    part.note("each", (many - few) / more)


# -- after a reboot --------------------------------------------------------------


def _reboot(part: Part, count: int) -> None:
    with another_boot():
        forget_everything()
        part.note("rebuild", _sync_time() / count)


@contextmanager
def another_boot() -> Iterator[None]:
    """Have the kernel show another id of the boot inside the body."""
    file = Path("/run/tmp/boot_id")
    file.write_text(f"{uuid.uuid4()}\n")
    lab.run("mount", "--bind", file, BOOT_ID)
    try:
        yield
    finally:
        lab.run("umount", BOOT_ID)


def forget_everything() -> None:
    """Remove all of ours from the kernel and /run, as a reboot does."""
    for file in RUN_DIRECTORY.glob("networks/*/dnsmasq.pid"):
        os.kill(int(file.read_text()), signal.SIGKILL)
    prefixes = (PRIVATE_PREFIX, UPSTREAM_PREFIX)
    links = [link.name for link in Path("/sys/class/net").iterdir()]
    _batch("link del {}", [link for link in links if link.startswith(prefixes)])
    _batch("netns del {}", [file.name for file in NETNS_DIRECTORY.glob("nat-*")])
    shutil.rmtree(RUN_DIRECTORY)
    _namespaces_ended()


def _batch(command: str, names: list[str]) -> None:
    text = "".join(command.format(name) + "\n" for name in names)
    lab.run("ip", "-batch", "-", input=text, timeout=120)


def _namespaces_ended() -> None:
    """Wait until the kernel has ended the deleted namespaces, as new namespaces would."""
    settle(0.5)
    lab.wait_for(lambda: _namespace() < 50, timeout=60, what="the end of all namespaces")


def _namespace() -> float:
    """Return the milliseconds that making a namespace takes."""
    taken = timed(lambda: lab.run("ip", "netns", "add", "settled"))
    lab.run("ip", "netns", "del", "settled")
    settle()
    return taken


def _take_down(part: Part, documents: list[bytes]) -> None:
    with engine() as verbs:
        for xml in documents:
            part.note("down", timed(lambda xml=xml: engine_down(verbs, xml)))  # type: ignore[misc]
