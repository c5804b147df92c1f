# SPDX-License-Identifier: LGPL-2.1-or-later
"""The campaign: one random operation after the other, and the invariants after each."""

import argparse
import io
import os
import sys
import time
import traceback
from collections import Counter, deque
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [os.fspath(TESTS / "system"), os.fspath(TESTS.parent)]

import invariants  # noqa: E402 - needs the paths
from faults import FAULTS  # noqa: E402
from lab import LabError, natns, require_sandbox  # noqa: E402
from lab_service import services_log  # noqa: E402
from model import Choice  # noqa: E402
from operations import OPERATIONS, Operation, WrongError  # noqa: E402
from world import LIMIT, RefusedError, World, say  # noqa: E402

from libvirt_natns.cli import commands  # noqa: E402

ALL: dict[str, tuple[Operation, int]] = {**OPERATIONS, **FAULTS}
KEPT = 12
"""Steps that a failure shows."""

CHECK_EACH = {"nftables": 5, "iptables": 15}
"""Steps between two whole checks where there was no fault: iptables takes processes."""

POLL = 0.1
"""Seconds between two looks."""

REPORT_EACH = 250


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/torture/run")
    parser.add_argument("--operations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", choices=("nftables", "iptables"), default="nftables")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--service", action="store_true", default=True)
    mode.add_argument("--hooks", dest="service", action="store_false")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ALL))
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args(arguments)


class Campaign:
    """One run over one world."""

    def __init__(self, world: World, options: argparse.Namespace) -> None:
        self.world = world
        self.options = options
        self.latest: deque[str] = deque(maxlen=KEPT)
        self.done: Counter[str] = Counter()
        self.rules = invariants.foreign_rules()

    def run(self) -> list[str]:
        """Carry out all steps; returns what is wrong, at the first step that is."""
        weights = {kind: weight for kind, (_, weight) in ALL.items() if kind in self.options.only}
        began = time.monotonic()
        for step in range(1, self.options.operations + 1):
            choice = Choice.of(self.options.seed, step, weights)
            wrong = self._step(choice)
            if wrong:
                return wrong
            if step % REPORT_EACH == 0:
                rate = step / (time.monotonic() - began)
                say(f"{step} operations, {rate:.1f} a second: {dict(self.done)}")
        return self._end()

    def _end(self) -> list[str]:
        """End everything: nothing may be left."""
        self.world.end_all()
        self.latest.append("the end of all")
        return self._converge(whole=True)

    def _step(self, choice: Choice) -> list[str]:
        began = time.monotonic()
        self.world.excused.clear()
        operation, _ = ALL[choice.kind]
        try:
            fault = operation(self.world, choice)
            if fault and not self.world.resident:
                self._sync()
            due = choice.step % CHECK_EACH[self.options.backend] == 0
            wrong = self._converge(whole=fault or due)
        except (RefusedError, WrongError, LabError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        except Exception:  # a fault of the campaign's own is to be seen with its step
            wrong = [traceback.format_exc()]
        self.done[choice.kind] += 1
        self.latest.append(f"{choice} ({time.monotonic() - began:.2f} s)")
        if self.options.verbose:
            say(self.latest[-1])
        return wrong

    def _sync(self) -> None:
        """Run `virt-natns sync` without starting an interpreter."""
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            status = commands.main(["sync"])
        if status:
            raise WrongError(f"sync: exit status {status}: {said.getvalue()}")

    def _converge(self, *, whole: bool) -> list[str]:
        """Wait until all is well, and return what is not; ``whole``: as `check` says, too.

        Where that takes several looks, what was well in an earlier one is not looked at again.
        """
        deadline = time.monotonic() + LIMIT
        concerned: frozenset[str] | None = None
        while True:
            wrong = invariants.problems(self.world)
            if not wrong and whole:
                found = invariants.check(concerned)
                concerned = frozenset(name for name, _ in found)
                wrong = [f"check: {name}: {what}" for name, what in found]
            if not wrong and whole and invariants.foreign_rules() != self.rules:
                # libvirt takes its own out and in again when it is reloaded.
                wrong = ["the rules of others have changed"]
            if not wrong or time.monotonic() > deadline:
                break
            time.sleep(POLL)
        return wrong + invariants.broken_streams(self.world)


def report(campaign: Campaign, wrong: list[str]) -> None:
    """Print all that is needed to replay and to understand a failure."""
    options = campaign.options
    say("-- the service's log\n" + services_log()[-6000:])
    say("-- libvirt's networks")
    say("\n".join(f"{net.name} {net.bridge} {net.kind}" for net in campaign.world.active()))
    say("-- status\n" + natns("status", check=False).stdout)
    say("-- the latest steps\n" + "\n".join(campaign.latest))
    say("-- wrong\n" + "\n".join(wrong))
    mode = "--service" if options.service else "--hooks"
    say(
        f"tests/torture/run --seed {options.seed} --operations {options.operations}"
        f" --backend {options.backend} {mode}"
    )


def main() -> int:
    require_sandbox()
    options = parse(sys.argv[1:])
    with World(options.backend, options.service) as world:
        campaign = Campaign(world, options)
        began = time.monotonic()
        wrong = campaign.run()
        if wrong:
            report(campaign, wrong)
            return 1
        taken = time.monotonic() - began
        say(
            f"{options.operations} operations without a fault in {taken:.0f} s,"
            f" seed {options.seed}: {dict(sorted(campaign.done.items()))}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
