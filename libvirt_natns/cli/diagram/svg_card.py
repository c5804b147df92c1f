# SPDX-License-Identifier: LGPL-2.1-or-later
"""The card of a network in the SVG: its name and health, its addresses, and its forwards.

The upstream is at the card's left, so the addresses outside are there as well.  The gateways are
at the right, where the bridge is.
"""

from dataclasses import dataclass
from itertools import zip_longest

from libvirt_natns.cli.diagram.picture import OK, DrawnNetwork
from libvirt_natns.cli.diagram.svg_parts import Area, Point, Sheet, between, text_width

LINE = 18.0
PAD = 11.0
LIMITS = (300.0, 470.0)
"""The least and the greatest width."""

LABEL = 52.0
"""The width of the words "outside" and "gateway"."""

MARK = 16.0
"""The width of the disk ahead of the health."""

ARROW = 20.0
APART = 20.0
"""The least space between two columns."""

MOST_FORWARDS = 24


@dataclass(frozen=True, slots=True)
class Card:
    """A network's card of a given width; all of its heights follow from its content."""

    network: DrawnNetwork
    width: float

    @property
    def room(self) -> float:
        """The width inside."""
        return self.width - 2 * PAD

    @property
    def health_below(self) -> bool:
        """True if the health needs a line of its own."""
        return _head_width(self.network) > self.room

    @property
    def gateways_below(self) -> bool:
        """True if the gateways do not fit beside the addresses outside."""
        return _addresses_width(self.network) > self.room

    @property
    def columns(self) -> int:
        """The columns of forwards."""
        wide = max(_forward_widths(self.network)) + ARROW + APART
        return max(1, min(3, len(self.network.forwards), int((self.room + APART) / wide)))

    @property
    def forward_lines(self) -> int:
        """The lines of forwards, without the line of those that are left out."""
        shown = self.network.forwards[:MOST_FORWARDS]
        return -(-len(shown) // self.columns) if shown else 0

    @property
    def height(self) -> float:
        """The height of the card."""
        network = self.network
        sides = (len(network.outside), len(network.gateways))
        lines = 2 + self.health_below + (sum(sides) if self.gateways_below else max(sides))
        below = 0.0
        if network.forwards:
            more = len(network.forwards) > MOST_FORWARDS
            below = 12 + LINE * (self.forward_lines + more)
        return 2 * PAD + LINE * lines - 4 + below

    def draw(self, sheet: Sheet, corner: Point) -> None:
        """Draw the card with its left upper corner there."""
        area = Area(*corner, self.width, self.height)
        sheet.box(area, "card", "edge" if self.network.health == OK else "bad")
        y = self._head(sheet, area)
        y = self._addresses(sheet, area, y)
        if self.network.forwards:
            self._forwards(sheet, area, y)

    def _head(self, sheet: Sheet, area: Area) -> float:
        network = self.network
        kind = "good" if network.health == OK else "bad"
        x, y = area.x + PAD, area.y + PAD + 12
        sheet.text((x, y), network.name, "title", self.room)
        if self.health_below:
            y += LINE
            sheet.disk((x + 4, y - 4), 4, kind)
            sheet.text((x + MARK, y), network.health, kind, self.room - MARK)
        else:
            mark = _health_width(network)
            sheet.disk((area.right - PAD - mark - 8, y - 5), 4, kind)
            sheet.text((area.right - PAD, y - 1), network.health, kind, None, "end")
        sheet.text((x, y + LINE), network.namespace, "quiet", self.room)
        return y + LINE

    def _addresses(self, sheet: Sheet, area: Area, y: float) -> float:
        """Draw the addresses of both sides, and return the base line of the last."""
        outside, gateways = list(self.network.outside), list(self.network.gateways)
        if self.gateways_below:
            outside, gateways = (
                [*outside, *("" for _ in gateways)],
                ["" for _ in outside] + gateways,
            )
        labels = {"outside", "gateway"}
        for outer, inner in zip_longest(outside, gateways, fillvalue=""):
            y += LINE
            if outer:
                sheet.text((area.x + PAD, y), _once(labels, "outside"), "label")
                sheet.text((area.x + PAD + LABEL, y), outer, "value", self.room - LABEL)
            if inner:
                left = area.right - PAD - text_width(inner, "value") - LABEL
                sheet.text((max(area.x + PAD, left), y), _once(labels, "gateway"), "label")
                sheet.text((area.right - PAD, y), inner, "value", self.room - LABEL, "end")
        return y

    def _forwards(self, sheet: Sheet, area: Area, y: float) -> None:
        y += 9
        sheet.line((area.x + PAD, y), (area.right - PAD, y), "edge", 1)
        y += 3
        lines, across = self.forward_lines, self.columns
        wide = (self.room + APART) / across
        place_width, target_width = _forward_widths(self.network)[1:]
        room = wide - APART - ARROW
        left = min(place_width, max(room / 2, room - target_width))
        for number, forward in enumerate(self.network.forwards[:MOST_FORWARDS]):
            column, line = divmod(number, lines)
            x, base = area.x + PAD + column * wide, y + (line + 1) * LINE
            kind = "quiet" if forward.waiting else "value"
            sheet.text((x, base), self.network.place(forward), kind, left)
            sheet.text((x + left + 6, base), "\u2192", "quiet")
            sheet.text((x + left + ARROW, base), forward.where, kind, room - left)
        more = len(self.network.forwards) - MOST_FORWARDS
        if more > 0:
            sheet.text((area.x + PAD, y + (lines + 1) * LINE), f"and {more} more", "label")


def width_for(networks: tuple[DrawnNetwork, ...]) -> float:
    """Return a width for the cards of all networks."""
    return between(max(map(_wish, networks)) + 2 * PAD, LIMITS)


def _wish(network: DrawnNetwork) -> float:
    """Return the width in which nothing of a network is cut, nor below something else."""
    forwards = _forward_widths(network)[0] + ARROW if network.forwards else 0
    return max(
        _head_width(network),
        text_width(network.namespace, "quiet"),
        _addresses_width(network),
        forwards,
    )


def _head_width(network: DrawnNetwork) -> float:
    return text_width(network.name, "title") + APART + MARK + _health_width(network)


def _health_width(network: DrawnNetwork) -> float:
    """Return the width of the health at most: its font is bold and not monospaced."""
    return 1.2 * text_width(network.health, "good")


def _addresses_width(network: DrawnNetwork) -> float:
    sides = (network.outside, network.gateways)
    return APART + sum(
        LABEL + max((text_width(text, "value") for text in texts), default=0) for texts in sides
    )


def _forward_widths(network: DrawnNetwork) -> tuple[float, float, float]:
    """Return the greatest widths of forwards: as a whole, of places and of targets."""
    places = max(text_width(network.place(each), "value") for each in network.forwards)
    targets = max(text_width(each.where, "value") for each in network.forwards)
    return places + targets, places, targets


def _once(labels: set[str], label: str) -> str:
    """Return a label the first time, and "" from then on."""
    if label not in labels:
        return ""
    labels.remove(label)
    return label
