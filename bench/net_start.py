# SPDX-License-Identifier: LGPL-2.1-or-later
"""Part 2: the whole of `virsh net-start`, as its user waits for it."""

import lab
from report import Goal, Line, Part
from world import (
    NO_SERVICE,
    Hooks,
    Mode,
    Options,
    defined,
    has_service,
    native,
    own,
    provider,
    service,
    settle,
    stock,
    timed,
)

ABOUT = """\
The configuration is the usual one, so an address is probed by ARP for 0.2 s before it is used,
unless a line says `probe = 0`. Native NAT and networks without hooks have libvirt's DHCP server."""

DOCUMENTS = {
    "nat": native("nat", "virbrN"),
    "plain": lab.isolated("plain", "virbrP", dhcp=None),
    "stock": stock("stock", "virbrS"),
    "own": own("own", "virbrO"),
}

VARIANTS: dict[str, tuple[str, str, Mode, tuple[Goal, ...]]] = {
    "nat": ("native `<forward mode='nat'/>`, no hooks", "nat", "none", ()),
    "plain": ("isolated without `<dhcp>`, no hooks", "plain", "none", ()),
    "stock": ("isolated with `<dhcp>`, no hooks", "stock", "none", ()),
    "empty": ("isolated with `<dhcp>`, an empty /bin/sh hook", "stock", "empty", ()),
    "hooks-stock": ("stock `<ip>`, our hooks alone", "stock", "ours", ()),
    "hooks-own": ("`<natns:ip>`, our hooks alone", "own", "ours", ()),
    "hooks-own-unprobed": ("`<natns:ip>`, our hooks alone, `probe = 0`", "own", "ours", ()),
}
"""By key: the label, the network, the hooks, the goals."""

SERVED: dict[str, tuple[str, str, Mode, tuple[Goal, ...]]] = {
    "served-nat": ("native NAT, our hooks and the service", "nat", "ours", ()),
    "served-stock": ("stock `<ip>`, hooks and service", "stock", "ours", (Goal(1.25, "nat"),)),
    "served-own": ("`<natns:ip>`, hooks and service", "own", "ours", (Goal(1.0, "nat"),)),
    "served-own-unprobed": (
        "`<natns:ip>`, hooks and service, `probe = 0`", "own", "ours", (Goal(1.0, "nat"),)
    ),
}  # fmt: skip
"""The same with the service running."""


def start(name: str) -> float:
    """Start and destroy a network; return the duration of the start."""
    taken = timed(lambda: lab.virsh("net-start", name))
    lab.virsh("net-destroy", name)
    settle()
    return taken


def measure(options: Options, hooks: Hooks) -> Part:
    part = Part("net-start", "virsh net-start", ABOUT)
    served = SERVED if has_service() else {}
    if not served:
        part.left_out.append(f"with the service: {NO_SERVICE}")
    for key, (label, _, _, goals) in (VARIANTS | served).items():
        part.add(Line(key, label, "ms", goals))
    with provider() as world, defined(*DOCUMENTS.values()):
        _round(part, world, hooks, list(VARIANTS), keep=False)
        for _ in options.turns(11, 100):
            _round(part, world, hooks, list(VARIANTS), keep=True)
            if served:
                with service():
                    _round(part, world, hooks, list(served), keep=True)
    return part


def _round(part: Part, world: lab.Provider, hooks: Hooks, keys: list[str], keep: bool) -> None:
    for key in keys:
        _, name, mode, _ = (VARIANTS | SERVED)[key]
        lab.write_config(world.config(more="probe = 0" if key.endswith("unprobed") else ""))
        hooks.use(mode)
        taken = start(name)
        hooks.use("none")
        if keep:
            part.note(key, taken)
