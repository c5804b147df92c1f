# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long ``virsh net-start`` takes: without hooks, with ours, and beside the recipe.

    contrib/sandbox /usr/bin/python3 bench/net_start.py [RUNS]

All in one run and in turn, so that the machine's mood is everybody's.  Times
are milliseconds of wall clock for the whole command; ratios are to a plain
isolated network without hooks.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [os.fspath(CHECKOUT / "tests" / "system"), os.fspath(CHECKOUT)]

import lab  # noqa: E402 - needs the path above

NAME = "bench"
BRIDGE = "virbrB"
NATNS_IP = (
    '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:ip address="10.0.0.1" prefix="24">'
    '<natns:dhcp><natns:range start="10.0.0.100" end="10.0.0.200"/></natns:dhcp>'
    "</natns:ip></natns:nat>"
)


def timed(call: Callable[[], object]) -> float:
    """Milliseconds that a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def net_start() -> float:
    """Start and destroy the defined network once; returns the start's time."""
    taken = timed(lambda: lab.virsh("net-start", NAME))
    lab.virsh("net-destroy", NAME)
    return taken


def defined(xml: str) -> None:
    """Make ``xml`` the network that ``net_start`` starts."""
    lab.virsh("net-undefine", NAME, check=False)
    lab.define_network(xml)


def recipe() -> float:
    """Run the recipe by hand on a started network without hooks."""
    lab.virsh("net-start", NAME)
    taken = timed(lambda: lab.run(CHECKOUT / "bench" / "recipe-up", BRIDGE))
    lab.run("ip", "netns", "del", f"hand-{BRIDGE}")
    for end in ("i", "u"):
        lab.run("ip", "link", "del", f"{BRIDGE}-{end}", check=False)
    lab.virsh("net-destroy", NAME)
    return taken


def measure(runs: int) -> dict[str, list[float]]:
    """All variants, in turn, ``runs`` times."""
    stock = lab.isolated(NAME, BRIDGE)
    own = lab.isolated(NAME, BRIDGE, address=None, metadata=NATNS_IP)
    results: dict[str, list[float]] = {}

    def note(what: str, value: float) -> None:
        results.setdefault(what, []).append(value)

    for _ in range(runs):
        defined(stock)
        note("net-start, stock <ip>, no hooks", net_start())
        note("  the recipe by hand, after it", recipe())
        defined(own)
        note("net-start, no <ip>, no hooks", net_start())
        lab.install_natns()
        defined(stock)
        note("net-start, stock <ip>, with hooks", net_start())
        defined(own)
        note("net-start, <natns:ip>, with hooks", net_start())
        lab.virsh("net-undefine", NAME)
        lab.uninstall_natns()
    return results


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    daemon = lab.Libvirtd()
    daemon.start()
    daemon.prime()
    with lab.Provider() as provider:
        lab.write_config(provider.config())
        results = measure(runs)
    base = statistics.median(results["net-start, stock <ip>, no hooks"])
    print(f"{runs} runs each, in turn; milliseconds")
    print(f"{'':36}{'median':>8}{'min':>8}{'max':>8}{'ratio':>8}")
    for what, values in results.items():
        median = statistics.median(values)
        low, high = min(values), max(values)
        print(f"{what:36}{median:8.0f}{low:8.0f}{high:8.0f}{median / base:8.2f}")


if __name__ == "__main__":
    main()
