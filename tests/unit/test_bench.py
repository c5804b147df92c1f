# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the benchmarks tell what they have measured; none is run here."""

import json
import os
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.append(os.fspath(CHECKOUT / "bench"))

import plot  # noqa: E402 - needs the path above
from report import (  # noqa: E402
    Goal,
    Line,
    Part,
    Report,
    markdown_of,
    number,
    read,
    text_of,
)

PEERS = CHECKOUT / "bench" / "peers"
FORWARDS = 10


def part(mine: list[float], others: list[float], goal: Goal) -> Part:
    lines = [
        Line("theirs", "what `they` do", "ms", values=others),
        Line("mine", "what we do", "ms", (goal,), values=mine),
    ]
    return Part("one", "Part one", "What it is.", lines)


def report(*parts: Part) -> Report:
    return Report({"CPU": "a fast one"}, {"rounds": 3}, list(parts), {"they": "do that"}, 12.3)


@pytest.mark.parametrize(
    ("goal", "value", "word", "distance"),
    [
        (Goal(0.5, "theirs"), 0.4, "met", 0.8),
        (Goal(0.3, "theirs"), 0.4, "MISSED", 4 / 3),
        (Goal(0.4, "theirs", at_least=True), 0.4, "met", 1.0),
        (Goal(0.8, "theirs", at_least=True), 0.4, "MISSED", 2.0),
        (Goal(-5, "theirs", how="difference"), -6.0, "met", None),
        (Goal(-7, "theirs", how="difference"), -6.0, "MISSED", None),
        (Goal(4, how="value"), 4.0, "met", 1.0),
        (Goal(3, how="value"), 4.0, "MISSED", 4 / 3),
    ],
    ids=str,
)
def test_goals(goal: Goal, value: float, word: str, distance: float | None) -> None:
    # The medians are 4 and 10, whatever the outliers are.
    (found,) = part([4, 4, 4, 4, 99], [10, 10, 10, 10, 1], goal).verdicts()
    assert found.value == pytest.approx(value)
    assert found.word.rstrip("?") == word
    assert found.low <= found.value <= found.high
    if distance is not None:
        assert goal.distance(found.value) == pytest.approx(distance)


def test_steady_figures_are_sure_and_erratic_ones_are_not() -> None:
    goal = Goal(1.0, "theirs")
    (steady,) = part([8, 9, 8, 9, 8], [10, 11, 10, 11, 10], goal).verdicts()
    (erratic,) = part([2, 30, 8, 15, 9], [10, 11, 10, 11, 10], goal).verdicts()
    assert (steady.word, erratic.word) == ("met", "met?")


def test_rounds_that_were_slow_for_both_cancel_out() -> None:
    slow = [1.0, 3.0, 2.0, 9.0, 5.0]
    mine, theirs = ([factor * mood for mood in slow] for factor in (9, 10))
    (found,) = part(mine, theirs, Goal(1.0, "theirs")).verdicts()
    assert [found.low, found.high] == pytest.approx([0.9, 0.9])
    assert found.sure


def test_a_goal_without_another_line_is_about_the_figure_itself() -> None:
    with pytest.raises(ValueError, match="against"):
        Goal(1.0)
    with pytest.raises(ValueError, match="against"):
        Goal(1.0, "theirs", how="value")


def test_what_was_not_measured_has_no_verdict() -> None:
    made = part([1.0], [], Goal(1.0, "theirs"))
    made.left_out.append("theirs: not there")
    assert list(made.verdicts()) == []
    assert "left out: theirs: not there" in text_of(made)
    assert "they" not in text_of(made)
    assert "Left out: theirs: not there" in markdown_of(report(made))
    with pytest.raises(KeyError):
        made.note("nobody", 1.0)


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report(part([4, 5, 6], [10, 10, 10], Goal(0.3, "theirs")))
    file = tmp_path / "report.json"
    written.write(file)
    assert read(file).document() == written.document()
    found = json.loads(file.read_text())
    assert found["parts"][0]["lines"][1]["median"] == 5
    assert found["parts"][0]["lines"][1]["quartiles"] == [4.5, 5.5]
    goal = found["parts"][0]["goals"][0]
    assert (goal["value"], goal["limit"], goal["met"]) == (0.5, 0.3, False)
    file.write_text(json.dumps(found | {"schema": 0}))
    with pytest.raises(ValueError, match="schema"):
        read(file)


def test_tables() -> None:
    made = part([4, 5, 6], [10, 10, 10], Goal(0.3, "theirs"))
    text = text_of(made)
    assert re.search(r"what they do +ms +10\.0 +10\.0 \.\. 10\.0 +10\.0", text)
    assert "goal: what we do / what they do: at most 0.30" in text
    assert "0.50 (0.40 .. 0.60) MISSED" in text
    markdown = markdown_of(report(made))
    assert "| what `they` do | ms | 10.0 | 10.0 .. 10.0 | 10.0 |" in markdown
    assert "| 0.50 | 0.40 .. 0.60 | **missed** |" in markdown
    assert "0 of 1 goals met" in markdown
    assert "do that" in markdown


@pytest.mark.parametrize(
    ("value", "text"), [(0.333, "0.33"), (-1.5, "-1.50"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_picture(tmp_path: Path) -> None:
    file = tmp_path / "report.svg"
    met = part([4, 5, 6], [10, 10, 10], Goal(0.9, "theirs"))
    missed = part([4, 5, 6], [10, 10, 10], Goal(0.3, "theirs"))
    plot.draw(report(met, missed), file)
    space = "{http://www.w3.org/2000/svg}"
    bars = ElementTree.parse(file).getroot().findall(f"{space}rect[@class]")
    assert [bar.get("class") for bar in bars] == ["met", "missed"]
    good, bad = (float(bar.get("x", "")) for bar in bars)
    assert good < bad == pytest.approx(plot.x_of(1), abs=0.1)


# What the peers run


def test_recipe_is_as_long_as_it_is_said_to_be() -> None:
    lines = (PEERS / "recipe-up").read_text().splitlines()
    commands = [line for line in lines if re.match(r"ip(tables)? ", line)]
    assert len(commands) == 17 + 1  # and the sysctl


def test_peers_publish_the_same_ports() -> None:
    cni = json.loads((PEERS / "cni-portmap.json").read_text())["runtimeConfig"]["portMappings"]
    netavark = json.loads((PEERS / "netavark.json").read_text())["port_mappings"]
    assert len(cni) == FORWARDS
    assert [(each["hostPort"], each["containerPort"]) for each in cni] == [
        (each["host_port"], each["container_port"]) for each in netavark
    ]


def test_page_has_a_place_for_the_figures() -> None:
    page = (CHECKOUT / "docs" / "reference" / "benchmarks.md").read_text()
    begin, end = "<!-- begin: bench/run --docs -->", "<!-- end -->"
    assert page.count(begin) == page.count(end) == 1
    figures = page.partition(begin)[2].partition(end)[0]
    assert re.search(r"(?m)^\d+ of \d+ goals met", figures)
    assert figures.count("\n### ") >= 5
