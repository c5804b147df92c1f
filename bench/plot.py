# SPDX-License-Identifier: LGPL-2.1-or-later
"""The goals of a run as one picture: how far each is from its limit.

Each bar is a figure divided by its goal (turned over where more is better), on
a logarithmic scale: left of the line is met.  Plain SVG, no library.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from report import Part, Report, Verdict, number

ROW, HEAD, LEFT, SPAN, MARGIN = 18, 24, 560, 300, 70
NARROWEST, WIDEST = 1 / 8, 8.0
"""Of the distances that are drawn to scale; others end at the edge."""

STYLE = """text { font: 12px sans-serif; fill: #222 } .part { font-weight: bold }
.met { fill: #4a9d5b } .missed { fill: #c8553d }
.between { stroke: #222 } .limit { stroke: #555 }"""


def x_of(distance: float) -> float:
    """Return the place of a distance in the picture."""
    held = min(max(distance, NARROWEST), WIDEST)
    return LEFT + SPAN * math.log(held / NARROWEST) / math.log(WIDEST / NARROWEST)


def draw(report: Report, file: Path) -> None:
    """Write the picture of a report."""
    parts = [(part, list(part.verdicts())) for part in report.parts]
    height = MARGIN + sum(HEAD + ROW * len(verdicts) for _, verdicts in parts if verdicts)
    size = {"width": str(LEFT + SPAN + MARGIN), "height": str(height)}
    root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size})
    root.append(ElementTree.Comment(" SPDX-License-Identifier: LGPL-2.1-or-later "))
    ElementTree.SubElement(root, "style").text = STYLE
    ElementTree.SubElement(root, "rect", width="100%", height="100%", fill="#fff")
    y = 20.0
    for part, verdicts in parts:
        if verdicts:
            root.extend(_part(part, verdicts, y))
            y += HEAD + ROW * len(verdicts)
    root.extend(_scale(y))
    ElementTree.indent(root)
    file.write_text(ElementTree.tostring(root, encoding="unicode") + "\n")


def _part(part: Part, verdicts: list[Verdict], y: float) -> Iterator[ElementTree.Element]:
    yield _text(8, y, part.title, "part")
    for verdict in verdicts:
        y += ROW
        yield from _bar(verdict, y)


def _bar(verdict: Verdict, y: float) -> Iterator[ElementTree.Element]:
    goal = verdict.goal
    start, end = sorted((x_of(1), x_of(goal.distance(verdict.value))))
    shape = {"x": f"{start:.1f}", "y": f"{y - 10:.1f}", "width": f"{max(end - start, 1):.1f}"}
    kind = "met" if verdict.met else "missed"
    yield _text(16, y, verdict.text, "")
    yield ElementTree.Element("rect", {"class": kind, "height": "10", **shape})
    low, high = (f"{x_of(goal.distance(value)):.1f}" for value in (verdict.low, verdict.high))
    middle = f"{y - 5:.1f}"
    yield ElementTree.Element("line", {"class": "between"}, x1=low, x2=high, y1=middle, y2=middle)
    yield _text(LEFT + SPAN + 8, y, number(verdict.value), "")


def _scale(y: float) -> Iterator[ElementTree.Element]:
    middle = f"{x_of(1):.1f}"
    end = f"{y - 8:.1f}"
    yield ElementTree.Element("line", {"class": "limit"}, x1=middle, x2=middle, y1="10", y2=end)
    for distance, text in ((1 / 4, "4 times better"), (1, "goal"), (4, "4 times worse")):
        yield _text(x_of(distance) - 4 * len(text) * 0.8, y + 10, text, "")


def _text(x: float, y: float, text: str, kind: str) -> ElementTree.Element:
    element = ElementTree.Element(
        "text", {"class": kind} if kind else {}, x=f"{x:.0f}", y=f"{y:.0f}"
    )
    element.text = text.replace("`", "")
    return element
