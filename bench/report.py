# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measured figures, their goals, and reports of both: text, Markdown, JSON.

A *line* is measured once a round.  A *goal* compares a line's median with a number, or with the
median of another line of the same run.  Ratios have an interval: it covers 95 % of other draws of
the same rounds (bootstrap).  If the goal lies within the interval, only more rounds make sure, and
the verdict bears a question mark.
"""

import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
"""Of the JSON document; counted up when a reader of the old one would err."""

DRAWS = 1000
WIDTH = 56

How = Literal["ratio", "difference", "value"]


@dataclass(frozen=True)
class Goal:
    """``limit`` for a line's median divided by, less, or without that of ``against``.

    At most, unless ``at_least``.  ``against`` is the other line's key.
    """

    limit: float
    against: str = ""
    how: How = "ratio"
    at_least: bool = False

    def __post_init__(self) -> None:
        if bool(self.against) == (self.how == "value"):
            raise ValueError(f"a {self.how} is held against {self.against or 'nothing'}")

    def met_by(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def distance(self, value: float) -> float:
        """Return a value's distance from the limit: 1 is just met, above 1 is missed."""
        above, below = (self.limit, value) if self.at_least else (value, self.limit)
        return above / below if below > 0 else (1.0 if above <= 0 else 99.0)


@dataclass(frozen=True)
class Verdict:
    """A goal, its result, and the interval of the result."""

    text: str
    goal: Goal
    value: float
    low: float
    high: float

    @property
    def met(self) -> bool:
        return self.goal.met_by(self.value)

    @property
    def sure(self) -> bool:
        return self.goal.met_by(self.low) == self.goal.met_by(self.high)

    @property
    def word(self) -> str:
        return ("met" if self.met else "MISSED") + ("" if self.sure else "?")


@dataclass
class Line:
    """A measured quantity; ``values`` has one figure a round, in ``unit``."""

    key: str
    label: str
    unit: str
    goals: tuple[Goal, ...] = ()
    note: str = ""
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third


@dataclass
class Part:
    """Lines that were measured in turn; ``left_out`` names the others, and says why."""

    name: str
    title: str
    about: str = ""
    lines: list[Line] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failed: str = ""

    def add(self, line: Line) -> Line:
        self.lines.append(line)
        return line

    def note(self, key: str, value: float) -> None:
        """Add a figure to a line.  Raises KeyError if there is no line of that key."""
        self.line(key).values.append(value)

    def line(self, key: str) -> Line:
        for line in self.lines:
            if line.key == key:
                return line
        raise KeyError(key)

    @property
    def measured(self) -> list[Line]:
        return [line for line in self.lines if line.values]

    def verdicts(self) -> Iterator[Verdict]:
        """Yield the verdicts of all goals with both sides measured."""
        measured = {line.key: line for line in self.measured}
        for line in self.measured:
            for goal in line.goals:
                if not goal.against or goal.against in measured:
                    yield judge(line, goal, measured.get(goal.against))


def compare(goal: Goal, mine: float, others: float) -> float:
    """Return the figure that the goal compares."""
    if goal.how == "ratio":
        return mine / others
    return mine - others if goal.how == "difference" else mine


def judge(line: Line, goal: Goal, other: Line | None) -> Verdict:
    """Hold a line against one of its goals."""
    against = other.values if other else [0.0]
    value = compare(goal, line.median, statistics.median(against))
    low, high = interval(goal, line.values, against)
    return Verdict(_wording(line, goal, other), goal, value, low, high)


def interval(goal: Goal, mine: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the interval of 95 % of the results when the rounds are drawn again.

    Rounds are drawn for both sides together where each has one figure a round:
    what slowed the machine down slowed both.
    """
    draw = random.Random(len(mine))  # the same data, the same interval
    paired = len(mine) == len(others)
    found = []
    for _ in range(DRAWS):
        rounds = draw.choices(range(len(mine)), k=len(mine))
        there = rounds if paired else draw.choices(range(len(others)), k=len(others))
        left = statistics.median(mine[index] for index in rounds)
        right = statistics.median(others[index] for index in there)
        found.append(compare(goal, left, right))
    found.sort()
    return found[DRAWS // 40], found[-DRAWS // 40 - 1]


def _wording(line: Line, goal: Goal, other: Line | None) -> str:
    bound = "at least" if goal.at_least else "at most"
    limit = f"{goal.limit:.2f}" if goal.how == "ratio" else f"{number(goal.limit)} {line.unit}"
    told = {"ratio": " / ", "difference": " - ", "value": ""}[goal.how]
    against = f"{told}{other.label}" if other else ""
    return f"{line.label}{against}: {bound} {limit}"


def number(value: float) -> str:
    """Return a figure with three significant digits."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


# -- the whole run ---------------------------------------------------------------


@dataclass
class Report:
    """A run: the machine, the options, the parts, and the commands of the peers."""

    machine: dict[str, str]
    options: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    peers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return everything measured, with the verdicts, for JSON."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "options": self.options,
            "seconds": round(self.seconds, 1),
            "parts": [_part_document(part) for part in self.parts],
            "peers": self.peers,
        }

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(self.document(), indent=1) + "\n")


def _part_document(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "title": part.title,
        "about": part.about,
        "seconds": round(part.seconds, 1),
        "left_out": part.left_out,
        "failed": part.failed,
        "lines": [_line_document(line) for line in part.measured],
        "goals": [_verdict_document(verdict) for verdict in part.verdicts()],
    }


def _line_document(line: Line) -> dict[str, Any]:
    first, third = line.quartiles
    return asdict(line) | {
        "median": line.median,
        "quartiles": [first, third],
        "min": min(line.values),
    }


def _verdict_document(verdict: Verdict) -> dict[str, Any]:
    return {
        "text": verdict.text,
        "limit": verdict.goal.limit,
        "value": verdict.value,
        "interval": [verdict.low, verdict.high],
        "distance": verdict.goal.distance(verdict.value),
        "met": verdict.met,
        "sure": verdict.sure,
    }


def read(file: Path) -> Report:
    """Return a report that was written.  Raises ValueError for a report of another schema."""
    found = json.loads(file.read_text())
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{file}: not of schema {SCHEMA}")
    parts = [_part_of(each) for each in found["parts"]]
    return Report(found["machine"], found["options"], parts, found["peers"], found["seconds"])


def _part_of(document: dict[str, Any]) -> Part:
    part = Part(document["name"], document["title"], document["about"])
    part.left_out, part.seconds = document["left_out"], document["seconds"]
    part.failed = document["failed"]
    for each in document["lines"]:
        goals = tuple(Goal(**goal) for goal in each["goals"])
        known = {key: each[key] for key in ("key", "label", "unit", "note", "values")}
        part.add(Line(**known, goals=goals))
    return part


# -- for people ------------------------------------------------------------------


def text_of(part: Part) -> str:
    """Return a part as a table for a terminal."""
    head = f"{part.title:{WIDTH}}{'':8}{'median':>9}{'quartiles':>18}{'min':>9}"
    rows = [_row(line) for line in part.measured]
    goals = [_goal_row(verdict) for verdict in part.verdicts()]
    missing = [f"  left out: {what}" for what in part.left_out]
    missing += [f"  FAILED: {part.failed}"] if part.failed else []
    return "\n".join([head, "-" * len(head), *rows, *goals, *missing]).replace("`", "")


def _row(line: Line) -> str:
    first, third = map(number, line.quartiles)
    least = number(min(line.values))
    middle = f"{number(line.median):>9}{first + ' .. ' + third:>18}{least:>9}"
    return f"  {line.label.replace('`', ''):{WIDTH - 2}}{line.unit:<8}{middle}"


def _goal_row(verdict: Verdict) -> str:
    between = f"({number(verdict.low)} .. {number(verdict.high)})"
    return f"  goal: {verdict.text}\n{'':8}{number(verdict.value)} {between} {verdict.word}"


def markdown_of(report: Report) -> str:
    """Return the whole report for the documentation."""
    machine = [f"* {key}: {value}" for key, value in report.machine.items()]
    taken = f"* the run took {report.seconds:.0f} s, with {_options(report)}"
    parts = [block for part in report.parts for block in _markdown_part(part)]
    peers = [f"{name}:\n\n```\n{ran}\n```\n" for name, ran in report.peers.items()]
    told = [f"\n{summary(report)}", *parts, "\n### What the peers run\n", *peers]
    return "\n".join([*machine, taken, *told])


def summary(report: Report) -> str:
    verdicts = [verdict for part in report.parts for verdict in part.verdicts()]
    return f"{sum(verdict.met for verdict in verdicts)} of {len(verdicts)} goals met."


def _options(report: Report) -> str:
    return ", ".join(f"{key} {value}" for key, value in report.options.items())


def _markdown_part(part: Part) -> Iterator[str]:
    yield f"\n### {part.title}\n"
    if part.about:
        yield f"{part.about}\n"
    yield "| | unit | median | quartiles | min |\n|---|---|--:|--:|--:|"
    for line in part.measured:
        first, third = map(number, line.quartiles)
        note = f" ({line.note})" if line.note else ""
        figures = f"{number(line.median)} | {first} .. {third} | {number(min(line.values))}"
        yield f"| {line.label}{note} | {line.unit} | {figures} |"
    verdicts = list(part.verdicts())
    if verdicts:
        yield "\n| goal | found | interval | |\n|---|--:|--:|---|"
    for found in verdicts:
        between = f"{number(found.low)} .. {number(found.high)}"
        word = found.word if found.met else f"**{found.word.lower()}**"
        yield f"| {found.text} | {number(found.value)} | {between} | {word} |"
    for what in part.left_out:
        yield f"\nLeft out: {what}"
    if part.failed:
        yield f"\n**Failed**: {part.failed}"
