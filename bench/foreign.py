# SPDX-License-Identifier: LGPL-2.1-or-later
"""Part 3: our cost for others: events that are not ours, guests in other networks."""

from collections.abc import Callable
from contextlib import ExitStack

import lab
import lab_domains
from report import Goal, Line, Part
from world import (
    NO_SERVICE,
    Hooks,
    Mode,
    Options,
    defined,
    has_service,
    hook_data,
    native,
    own,
    process_time,
    provider,
    service,
    timed,
)

from libvirt_natns.cli.hook_files import HOOKS_DIRECTORY

ABOUT = """\
A network of ours is up, so that no hook ends early for want of a network. The guest is real,
emulated, paused and of 16 MiB. Its start runs four hooks, and more for the network's port."""

MAC = "52:54:00:00:00:07"
OUR_MAC = "52:54:00:00:00:05"
PLUS = Goal(3.0, "python", how="difference")
GUEST = Goal(1.10, "guest")

LINES = (
    Line("python", "`python3 -I -S -c pass`", "ms"),
    Line("sh", "`sh -c :`", "ms"),
    Line("network", "hook network, a network not ours", "ms", (Goal(40, how="value"),)),
    Line("qemu", "hook qemu, a guest not ours", "ms", (Goal(40, how="value"),)),
    Line("served-network", "hook network, not ours, with the service", "ms", (PLUS,)),
    Line("served-qemu", "hook qemu, not ours, with the service", "ms", (PLUS,)),
    Line("guest", "guest's start in native NAT, no hooks", "ms"),
    Line("hooked-guest", "guest's start in native NAT, our hooks alone", "ms"),
    Line("served-guest", "guest's start in native NAT, hooks and service", "ms", (GUEST,)),
    Line("our-guest", "guest's start in our network, no hooks", "ms"),
    Line("our-hooked-guest", "guest's start in our network, our hooks alone", "ms"),
    Line("our-served-guest", "guest's start in our network, hooks and service", "ms"),
)


def make_part(with_service: bool) -> Part:
    part = Part("foreign", "Events that are not ours", ABOUT)
    for line in LINES:
        if with_service or "served" not in line.key:
            part.add(Line(line.key, line.label, line.unit, line.goals))
    if not with_service:
        part.left_out.append(f"with the service: {NO_SERVICE}")
    return part


def processes() -> dict[str, Callable[[], float]]:
    """Return the programs to time, started as libvirt starts hooks."""
    network = hook_data("nat")
    guest = lab.virsh("dumpxml", "guest").stdout.encode()
    hooks = {name: str(HOOKS_DIRECTORY / name) for name in ("network", "qemu")}
    return {
        "python": lambda: process_time([lab.PYTHON, "-I", "-S", "-c", "pass"]),
        "sh": lambda: process_time(["/bin/sh", "-c", ":"]),
        "network": lambda: process_time(
            [hooks["network"], "nat", "started", "begin", "-"], network
        ),
        "qemu": lambda: process_time([hooks["qemu"], "guest", "prepare", "begin", "-"], guest),
    }


def start(name: str) -> float:
    """Start and destroy a guest; return the duration of the start."""
    taken = timed(lambda: lab_domains.start(name))
    lab.virsh("destroy", name)
    return taken


def measure(options: Options, hooks: Hooks) -> Part:
    with_service = has_service()
    part = make_part(with_service)
    with ExitStack() as stack:
        stack.enter_context(provider("probe = 0"))
        # First, so that the networks end under them, too.
        stack.enter_context(hooks.ours())
        stack.enter_context(defined(native("nat", "virbrN"), own("own", "virbrO")))
        for name in ("nat", "own"):
            lab.virsh("net-start", name)
        _define_guests(stack)
        # In turns of a few: a hook takes far less than the start of a service.
        for _ in options.turns(9, 80):
            _processes(part, "", 5)
            _guests(part, hooks, "guest", "none")
            _guests(part, hooks, "hooked-guest", "ours")
            if with_service:
                with service():
                    _processes(part, "served-", 5)
                    _guests(part, hooks, "served-guest", "ours")
    return part


def _processes(part: Part, prefix: str, times: int) -> None:
    for _ in range(times):
        for key, call in processes().items():
            if prefix + key in (line.key for line in part.lines):
                part.note(prefix + key, call())


def _guests(part: Part, hooks: Hooks, key: str, mode: Mode) -> None:
    hooks.use(mode)
    part.note(key, start("guest"))
    part.note(f"our-{key}", start("ours"))
    hooks.use("ours")


def _define_guests(stack: ExitStack) -> None:
    forward = lab_domains.ports('start="2222" to="22"')
    nat = lab_domains.domain("guest", lab_domains.nic("nat", MAC))
    ours = lab_domains.domain("ours", lab_domains.nic("own", OUR_MAC), publishes=forward)
    for name, xml in (("guest", nat), ("ours", ours)):
        lab_domains.define(xml)
        stack.callback(lab.virsh, "undefine", name, check=False)
        stack.callback(lab.virsh, "destroy", name, check=False)
    lab_domains.start("guest")
    lab.virsh("destroy", "guest")
