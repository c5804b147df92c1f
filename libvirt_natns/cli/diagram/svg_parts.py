# SPDX-License-Identifier: LGPL-2.1-or-later
"""Elements of an SVG drawing: texts that are cut to a width, boxes, lines, and the style.

No viewer tells the width of a text, so all names are in a monospaced font: a character is
``EM`` of the font's size wide.  The style has colours for a light and for a dark surrounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from libvirt_natns.cli.diagram.picture import cells

SVG = "http://www.w3.org/2000/svg"
EM = 0.61
"""Width of a character, as a part of the font's size: DejaVu Sans Mono's, with some room."""

MONO = "ui-monospace, 'SFMono-Regular', 'DejaVu Sans Mono', Menlo, Consolas, monospace"
SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"

LIGHT = {
    "page": "#ffffff",
    "card": "#f6f8fa",
    "chip": "#ffffff",
    "edge": "#d0d7de",
    "ink": "#1f2328",
    "quiet": "#59636e",
    "outer": "#0969da",
    "inner": "#8250df",
    "good": "#1a7f37",
    "bad": "#cf222e",
}
DARK = {
    "page": "#0d1117",
    "card": "#161b22",
    "chip": "#0d1117",
    "edge": "#3d444d",
    "ink": "#f0f6fc",
    "quiet": "#9198a1",
    "outer": "#4493f8",
    "inner": "#ab7df8",
    "good": "#3fb950",
    "bad": "#f85149",
}
"""Colours by their meaning.  ``outer`` is the upstream's side, ``inner`` the guests'."""


FONTS = {
    "title": (MONO, 14, 700, "ink"),
    "name": (MONO, 12, 600, "ink"),
    "value": (MONO, 12, 400, "ink"),
    "quiet": (MONO, 12, 400, "quiet"),
    "label": (SANS, 11, 400, "quiet"),
    "heading": (SANS, 11, 600, "quiet"),
    "good": (SANS, 11, 600, "good"),
    "bad": (SANS, 11, 600, "bad"),
}
"""Kinds of texts: the font, its size in pixels, its weight, and its colour."""


def style() -> str:
    """Return the style sheet."""
    fonts = "".join(
        f".t-{kind}{{font:{weight} {size}px {font};fill:{LIGHT[colour]}}}"
        for kind, (font, size, weight, colour) in FONTS.items()
    )
    dark = "".join(f".t-{kind}{{fill:{DARK[colour]}}}" for kind, (_, _, _, colour) in FONTS.items())
    return f"{fonts}{_paints(LIGHT)}@media(prefers-color-scheme:dark){{{dark}{_paints(DARK)}}}"


def _paints(colours: Mapping[str, str]) -> str:
    return "".join(
        f".f-{name}{{fill:{colour}}}.s-{name}{{stroke:{colour}}}"
        for name, colour in colours.items()
    )


def text_width(text: str, kind: str) -> float:
    """Return the width of a text in a monospaced font, in pixels."""
    return cells(text) * FONTS[kind][1] * EM


def between(width: float, limits: tuple[float, float]) -> float:
    """Return a width that is at least the first, and at most the second limit."""
    return min(max(width, limits[0]), limits[1])


def fitted(text: str, width: float, kind: str) -> str:
    """Return a text that is at most ``width`` wide: without its middle if it is wider."""
    room = int(width / (FONTS[kind][1] * EM) + 0.01)
    if cells(text) <= room:
        return text
    head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    while cells(head) + cells(tail) >= room and len(head) + len(tail) > 2:
        head, tail = (head[:-1], tail) if cells(head) >= cells(tail) else (head, tail[1:])
    return f"{head}\u2026{tail}"


@dataclass(frozen=True, slots=True)
class Area:
    """A rectangle: its left upper corner, and its size, in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height


Point = tuple[float, float]


class Sheet:
    """A drawing; its methods add elements on top."""

    def __init__(self) -> None:
        self._elements: list[ET.Element] = []

    def box(self, area: Area, fill: str, stroke: str = "", radius: float = 6) -> None:
        """Add a rectangle with round corners, with a border of colour ``stroke``."""
        element = self._add("rect", f"f-{fill} s-{stroke}" if stroke else f"f-{fill}")
        _place(element, x=area.x, y=area.y, width=area.width, height=area.height, rx=radius)

    def disk(self, middle: Point, radius: float, fill: str) -> None:
        """Add a disk."""
        _place(self._add("circle", f"f-{fill}"), cx=middle[0], cy=middle[1], r=radius)

    def line(self, start: Point, end: Point, stroke: str, width: float) -> None:
        """Add a line with round ends."""
        element = self._add("line", f"s-{stroke}")
        _place(element, x1=start[0], y1=start[1], x2=end[0], y2=end[1])
        _place(element, **{"stroke-width": width})
        element.set("stroke-linecap", "round")

    def text(
        self, at: Point, text: str, kind: str, width: float | None = None, anchor: str = "start"
    ) -> None:
        """Add a text on the base line ``at``; a tool tip shows the whole of a text that is cut."""
        shown = text if width is None else fitted(text, width, kind)
        element = self._add("text", f"t-{kind}")
        _place(element, x=at[0], y=at[1])
        if anchor != "start":
            element.set("text-anchor", anchor)
        element.text = shown
        if shown != text:
            # The tool tip is a child, so the text itself may have no line breaks around the child.
            ET.SubElement(element, "title").text = text

    def add(self, other: "Sheet") -> None:
        """Add another drawing on top."""
        self._elements += other._elements

    def document(self, width: float, height: float, title: str, description: str) -> str:
        """Return the drawing as an XML document, in ASCII alone."""
        root = ET.Element("svg", xmlns=SVG, role="img", viewBox=f"0 0 {width:g} {height:g}")
        _place(root, width=width, height=height)
        ET.SubElement(root, "title").text = title
        ET.SubElement(root, "desc").text = description
        ET.SubElement(root, "style").text = style()
        root.extend(self._elements)
        lines = [ET.tostring(element, "us-ascii").decode() for element in root]
        head = ET.tostring(ET.Element("svg", root.attrib), "us-ascii").decode()
        return "\n".join([head.replace(" />", ">"), *lines, "</svg>\n"])

    def _add(self, tag: str, kinds: str) -> ET.Element:
        element = ET.Element(tag, {"class": kinds})
        self._elements.append(element)
        return element


def _place(element: ET.Element, **lengths: float) -> None:
    for name, length in lengths.items():
        element.set(name, f"{length:g}")
