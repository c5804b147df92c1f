# SPDX-License-Identifier: LGPL-2.1-or-later
"""Part 1: our own work for a whole set-up, beside the work of others.

All start on an existing bridge, and end with a complete set-up; tear-down is not timed.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import lab
from peers import Cni, Netavark, Recipe
from report import Goal, Line, Part
from world import (
    NO_SERVICE,
    Hooks,
    Options,
    client,
    defined,
    engine,
    has_service,
    hook_data,
    own,
    process_time,
    provider,
    service,
    settle,
    stock,
    timed,
)

from libvirt_natns.cli.hook_files import HOOKS_DIRECTORY
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.engine import Engine

FORWARDS = 10
BRIDGE = "virbrO"
STOCK, STOCK_BRIDGE = "stock", "virbrS"
NO_PROBE = "probe = 0"

Variant = tuple[Callable[[], object], Callable[[], object]]
"""A timed call, and the call that undoes it."""

ABOUT = """\
Ours is a namespace, two patches, routing, a loaded firewall, DHCP and DNS, ten forwards, checks
and the lease in the state database. The address is not probed by ARP (`probe = 0`), unless a line
says so: a probe is waiting only. The recipe has neither DHCP nor DNS nor forwards. CNI has ten
forwards and an address from a file, but no DHCP server and no DNS. netavark has ten forwards and
a given address, but no DHCP and no DNS."""


def make_part(with_service: bool) -> Part:
    part = Part("set-up", "Set-up of one network", ABOUT)
    least = (Goal(1 / 3, "recipe"), Goal(1.0, "cni"), Goal(1.0, "netavark"))
    lines = {
        "recipe": ("the recipe by hand", ()),
        "cni": ("CNI, bridge and portmap", ()),
        "netavark": ("netavark", ()),
        "engine": ("ours, `<natns:ip>`, in a warm process", least),
        "engine-stock": ("ours, stock `<ip>`, in a warm process", ()),
        "service": ("ours, `<natns:ip>`, asked of the service", least),
        "hooks-service": ("ours, two hooks, with the service", ()),
        "hooks": ("ours, two hooks, without the service", (Goal(250, how="value"),)),
        "probe": ("ours, in a warm process, with the usual probe", ()),
    }
    for key, (label, goals) in lines.items():
        if with_service or "service" not in key:
            part.add(Line(key, label, "ms", goals))
    if not with_service:
        part.left_out.append(f"the service: {NO_SERVICE}")
    return part


def engine_up(verbs: Engine, xml: bytes) -> None:
    """Do all the work from libvirt's `start` to the end of its `started`."""
    network = libvirt_xml.parse_network(xml)
    verbs.prepare(network, xml)
    build = getattr(verbs, "build", None)
    if build is not None:
        build(network, xml)
    verbs.up(network, xml)


def engine_down(verbs: Engine, xml: bytes) -> None:
    verbs.hand_back(libvirt_xml.parse_hook_data(xml).network)


def of_engine(verbs: Engine, xml: bytes) -> Variant:
    return (lambda: engine_up(verbs, xml), lambda: engine_down(verbs, xml))


def of_service(xml: bytes) -> Variant:
    asked = client()

    def ask(*event: str) -> None:
        answer = asked.ask("network", event, xml)
        if answer is None or not answer.done:
            raise lab.LabError(f"the service does not do {event}: {answer and answer.text}")

    def up() -> None:
        ask("start", "begin")
        ask("started", "begin")

    return up, lambda: ask("stopped", "end")


def of_hooks(name: str, xml: bytes) -> Variant:
    def hook(*event: str) -> None:
        process_time([str(HOOKS_DIRECTORY / "network"), name, *event, "-"], xml)

    def up() -> None:
        hook("start", "begin")
        hook("started", "begin")

    return up, lambda: hook("stopped", "end")


@contextmanager
def bridge(name: str) -> Iterator[None]:
    """Make a bridge that libvirt does not know, so that the service has no other work."""
    lab.run("ip", "link", "add", name, "type", "bridge")
    lab.run("ip", "link", "set", name, "up")
    try:
        yield
    finally:
        lab.run("ip", "link", "del", name)


@contextmanager
def peers() -> Iterator[dict[str, Variant]]:
    """Yield the variants that need no bridge of libvirt's."""
    cni, netavark = Cni(), Netavark()
    try:
        yield {"cni": (cni.up, cni.down), "netavark": (netavark.up, netavark.down)}
    finally:
        netavark.close()


@contextmanager
def libvirts() -> Iterator[bytes]:
    """Yield the XML of a stock network without hooks: its address is on its bridge."""
    lab.virsh("net-start", STOCK)
    try:
        yield hook_data(STOCK)
    finally:
        lab.virsh("net-destroy", STOCK)


def once(part: Part, variants: dict[str, Variant], keep: bool) -> None:
    """Measure each variant once; the first round only warms up."""
    for key, (up, down) in variants.items():
        taken = timed(up)
        down()
        settle()
        if keep:
            part.note(key, taken)


def measure(options: Options, hooks: Hooks) -> Part:
    part = make_part(has_service())
    with ExitStack() as stack:
        world = stack.enter_context(provider(NO_PROBE))
        stack.enter_context(bridge(BRIDGE))
        stack.enter_context(defined(stock(STOCK, STOCK_BRIDGE, FORWARDS)))
        others = stack.enter_context(peers())
        own_xml = own("own", BRIDGE, FORWARDS, uuid=str(uuid.uuid4()))
        xml = f"<hookData>{own_xml}</hookData>".encode()
        _round(part, hooks, others, xml, keep=False)
        for _ in options.turns(11, 90):
            _round(part, hooks, others, xml)
            lab.write_config(world.config())
            with engine() as verbs:
                once(part, {"probe": of_engine(verbs, xml)}, keep=True)
            lab.write_config(world.config(more=NO_PROBE))
    return part


def _round(
    part: Part, hooks: Hooks, others: dict[str, Variant], xml: bytes, keep: bool = True
) -> None:
    once(part, others, keep)
    _warm(part, xml, keep)
    with hooks.ours():
        _through_hooks(part, xml, keep)


def _warm(part: Part, xml: bytes, keep: bool) -> None:
    """Measure the variants in this process, and the recipe."""
    with engine() as verbs, libvirts() as taken_over:
        warm = of_engine(verbs, xml)
        recipe = Recipe(STOCK_BRIDGE)
        once(part, {"engine": warm}, keep=False)
        once(part, {"engine": warm, "engine-stock": of_engine(verbs, taken_over)}, keep)
        once(part, {"recipe": (recipe.up, recipe.down)}, keep)


def _through_hooks(part: Part, xml: bytes, keep: bool) -> None:
    once(part, {"hooks": of_hooks("own", xml)}, keep)
    if any(line.key == "service" for line in part.lines):
        with service():
            asked = {"service": of_service(xml)}
            once(part, asked, keep=False)
            once(part, asked | {"hooks-service": of_hooks("own", xml)}, keep)
