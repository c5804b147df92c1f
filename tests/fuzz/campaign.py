# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cases of all targets, in worker processes; failures are made small."""

import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

from targets import TARGETS, Target

CHUNK = 2000
"""Cases of one target that a worker does in a row."""

MINIMIZING = 20.0
"""Seconds spent on making one failure small."""

SLOW = 5.0
"""Seconds of CPU that no case may take."""


@dataclass(frozen=True)
class Failure:
    """A case for which a check fails: the error, its place, and the least input found."""

    target: str
    case: str
    error: str
    place: str
    data: bytes


@dataclass
class Outcome:
    """All that a run has done."""

    cases: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0
    """Largest resident memory of a worker, in MiB."""

    def add(self, other: "Outcome") -> None:
        """Take in what another part of the run has done."""
        self.cases += other.cases
        known = {(each.target, each.place) for each in self.failures}
        self.failures += [e for e in other.failures if (e.target, e.place) not in known]
        self.memory = max(self.memory, other.memory)


def case(target: Target, seed: int, number: int) -> bytes:
    """The case of that number."""
    return target.make(Random(f"{seed} {target.name} {number}"))


def problem(check: Callable[[bytes], None], data: bytes) -> tuple[str, str] | None:
    """How a check fails, as the error and its place; None where it holds."""
    start = time.process_time()
    try:
        check(data)
    except Exception as error:  # any at all is a finding
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "natns" in f.filename or "fuzz" in f.filename] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].name}:{type(error).__name__}"
        return f"{type(error).__name__}: {str(error)[:300]}", place
    if time.process_time() - start > SLOW:
        return f"takes {time.process_time() - start:.1f} s", "slow"
    return None


def least(check: Callable[[bytes], None], data: bytes, place: str) -> bytes:
    """Less of ``data`` that fails in the same place."""
    deadline = time.monotonic() + MINIMIZING
    size = max(1, len(data) // 2)
    while size and time.monotonic() < deadline:
        begin, shorter = 0, False
        while begin < len(data) and time.monotonic() < deadline:
            without = data[:begin] + data[begin + size :]
            found = problem(check, without)
            if found and found[1] == place:
                data, shorter = without, True
            else:
                begin += size
        size = size if shorter and size > 1 else size // 2
    return data


def run_chunk(seed: int, name: str, first: int, count: int) -> Outcome:
    """Do some cases of one target."""
    target = next(each for each in TARGETS if each.name == name)
    outcome = Outcome()
    for number in range(first, first + count):
        data = case(target, seed, number)
        found = problem(target.check, data)
        outcome.cases[name] += 1
        if found and all(found[1] != each.place for each in outcome.failures):
            small = least(target.check, data, found[1])
            error, _ = problem(target.check, small) or found
            outcome.failures.append(Failure(name, f"{seed}:{number}", error, found[1], small))
    outcome.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return outcome


def chunks(cases: int, targets: Sequence[Target]) -> Iterator[tuple[str, int, int]]:
    """The parts of a run, the targets in turn."""
    share = -(-cases // len(targets))
    for first in range(0, share, CHUNK):
        for target in targets:
            yield target.name, first, min(CHUNK, share - first)


def run(
    cases: int, seed: int, workers: int, targets: Sequence[Target] = TARGETS, *, told: bool = False
) -> Outcome:
    """Do that many cases, the targets in turn."""
    start = time.monotonic()
    outcome = Outcome()
    parts = list(chunks(cases, targets))
    with ProcessPoolExecutor(workers) as pool:
        columns = zip(*parts, strict=True)
        for done, part in enumerate(pool.map(partial(run_chunk, seed), *columns), 1):
            outcome.add(part)
            if told and (done % 50 == 0 or part.failures):
                print(f"{sum(outcome.cases.values())} cases, {len(outcome.failures)} failures",
                      file=sys.stderr, flush=True)  # fmt: skip
    outcome.seconds = time.monotonic() - start
    return outcome
