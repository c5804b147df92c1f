# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the system tests, a file a sandbox, as many sandboxes at once as keep the cores busy.

    tests/in_sandboxes.py [FILE.py...] [PYTEST ARGUMENT...]

FILE.py runs these files alone.  Sandboxes share nothing, so neither do the files.  What a
file prints is shown when it is done; the last line sums all of them up.
"""

import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PYTEST = ("/usr/bin/python3", "-m", "pytest", "--durations=3")
POLL = 1.0
"""Seconds between two looks at what a sandbox has used of the processors."""
LOOK = 3.0
"""Seconds between two looks at whether the cores have room for one sandbox more."""
IDLE = 0.3
"""Share of the cores' time that is room for one sandbox more."""
CORES = os.cpu_count() or 1
FEWEST, MOST = CORES + 2, 4 * CORES
"""Sandboxes at once: where the cores are busy, and where tests wait for timers."""
NO_TESTS = 5
"""pytest's exit status where an argument such as -k leaves nothing of a file."""

# Those that take longest begin first, so that none is left to run alone.
FIRST = (
    "test_breakage",
    "test_hosts_guests",
    "test_howto",
    "test_router_boot",
    "test_hosts_firewalld",
    "test_package",
    "test_hosts_resolvers",
    "test_ansible",
    "test_packaging",
    "test_given_up",
    "test_hosts_firewalls",
    "test_service",
    "test_hosts",
    "test_report",
    "test_killed",
    "test_odd_documents",
    "test_parallel",
    "test_hosts_flows",
    "test_look",
    "test_healing",
    "test_firewall_packets",
    "test_boundary_forward",
    "test_boundary_libvirt",
    "test_boundary_legacy",
    "test_limits",
    "test_ipv6_kinds",
    "test_damaged_state",
    "test_guests",
    "test_full_disk",
    "test_dhcp_upstream",
    "test_dhcp_dns",
    "test_boundary_namespace",
    "test_failures",
    "test_guest_claims",
    "test_hostile_leases",
    "test_commands",
    "test_torture",
    "test_guest_life",
    "test_damaged_meanwhile",
    "test_forward_commands",
    "test_follower",
    "test_static_nat",
    "test_howto_tools",
    "test_watch",
    "test_hosts_ways",
    "test_install",
    "test_uninstall",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one file; ``seconds`` of wall clock, ``cpu`` seconds of processors."""

    file: Path
    status: int
    output: str
    seconds: float
    cpu: float

    @property
    def failed(self) -> bool:
        return self.status not in (0, NO_TESTS)

    def count(self, what: str) -> int:
        """How many tests ``passed``, ``failed``, ..., by pytest's closing line."""
        closing = self.output.rstrip().rpartition("\n")[2]
        found = re.search(rf"(\d+) {what}", closing)
        return int(found.group(1)) if found else 0


def run(file: Path, arguments: list[str]) -> Outcome:
    """Run one file in a sandbox of its own."""
    sandbox = os.fspath(TESTS.parent / "contrib" / "sandbox")
    # Hundreds of interpreters load the same modules.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.monotonic()
    process = subprocess.Popen(
        [sandbox, "--", *PYTEST, os.fspath(file), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    cpu = 0.0
    while True:
        try:
            output, _ = process.communicate(timeout=POLL)
            break
        except subprocess.TimeoutExpired:
            cpu = cpu_seconds(process.pid) or cpu
    return Outcome(file, process.returncode, output, time.monotonic() - start, cpu)


def cpu_seconds(sandbox: int) -> float:
    """Return the processor time of a sandbox, by its control group; 0 where there is none."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        statistics = Path(place, f"libvirt-natns-sandbox.{sandbox}", "cpu.stat")
        if kind == "cgroup2" and statistics.exists():
            used = dict(line.split() for line in statistics.read_text().splitlines())
            return int(used["usage_usec"]) / 1e6
    return 0.0


def rank(file: Path) -> tuple[int, str]:
    """The place of a file in the order in which they begin."""
    return (FIRST.index(file.stem) if file.stem in FIRST else len(FIRST), file.stem)


class Room:
    """Whether one sandbox more would find processor time."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._counters = processor_times()

    def beside(self, running: int) -> bool:
        """Say so for a number of sandboxes that run; two answers are ``LOOK`` apart."""
        if running < FEWEST:
            return True
        if running >= MOST or time.monotonic() < self._looked + LOOK:
            return False
        earlier, self._counters = self._counters, processor_times()
        self._looked = time.monotonic()
        idle, total = (now - then for now, then in zip(self._counters, earlier, strict=True))
        return idle > IDLE * total


def processor_times() -> tuple[int, int]:
    """Return the idle time and the whole time of all processors so far, in clock ticks."""
    times = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return times[3] + times[4], sum(times)


def outcomes(files: list[Path], arguments: list[str]) -> Iterator[Outcome]:
    """Run files in their order, and yield each outcome when it is there."""
    left = deque(files)
    running: set[Future[Outcome]] = set()
    room = Room()
    with ThreadPoolExecutor(MOST) as pool:
        while left or running:
            while left and room.beside(len(running)):
                running.add(pool.submit(run, left.popleft(), arguments))
            done, running = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)
            yield from (job.result() for job in done)


def report(outcome: Outcome) -> None:
    """Print what a file printed, unless an argument left nothing of it."""
    if outcome.status != NO_TESTS:
        took = f"{outcome.seconds:.0f} s, {outcome.cpu:.0f} s of CPU"
        print(f"\n== {outcome.file.name}: {took}", flush=True)
        print(outcome.output.strip(), flush=True)


def main() -> int:
    named = {Path(word).name for word in sys.argv[1:] if word.endswith(".py")}
    arguments = [word for word in sys.argv[1:] if not word.endswith(".py")]
    files = sorted((TESTS / "system").glob("test_*.py"), key=rank)
    if missing := named - {file.name for file in files}:
        sys.exit(f"in_sandboxes: no such files in tests/system: {', '.join(sorted(missing))}")
    ended = []
    for outcome in outcomes([f for f in files if not named or f.name in named], arguments):
        ended.append(outcome)
        report(outcome)
    passed = sum(outcome.count("passed") for outcome in ended)
    wrong = sum(outcome.count("failed") + outcome.count("error") for outcome in ended)
    broken = sorted(outcome.file.name for outcome in ended if outcome.failed)
    print(f"\n{sum(outcome.cpu for outcome in ended):.0f} s of CPU")
    print(f"files with failures: {', '.join(broken) or 'none'}")
    print(f"{passed} passed, {wrong} failed", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
