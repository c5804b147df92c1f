# SPDX-License-Identifier: LGPL-2.1-or-later
"""The picture as SVG: upstreams at the left, namespaces in the middle, guests at the right.

The drawing is complete in itself: no script, no font and no other file.  graphviz is not used for
three reasons.  The columns give each box its place already.  The command must draw where graphviz
is not installed.  graphviz knows no colours for a dark page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from libvirt_natns.cli.diagram.picture import (
    NONE,
    DrawnGuest,
    DrawnNetwork,
    DrawnUpstream,
    Picture,
)
from libvirt_natns.cli.diagram.svg_card import LINE, PAD, Card, width_for
from libvirt_natns.cli.diagram.svg_parts import Area, Point, Sheet, between, text_width

MARGIN = 28.0
HEADING = 30.0
BETWEEN = 14.0
"""Space between networks; twice as much between upstreams."""

START = 24.0
"""The height, in a card, at which lines begin and end."""

END = 8.0
"""The length of a bridge's line beyond its first and its last port."""

UPSTREAM = (150.0, 320.0)
GUEST = (90.0, 420.0)
"""The least and the greatest width of an upstream and of a guest."""

BUS = 30.0
"""Space between an upstream, the line of its bridge, and the namespaces."""

CHIP = 23.0
GAP = 5.0
"""The height of a guest, and the space between two guests."""

GUESTS_ACROSS = 560.0
MOST_GUESTS = 36
"""The width of all guests of a network, and the guests of a network that are drawn at most."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The places of the columns: left edges, and the width of upstreams and namespaces."""

    upstream: float
    bus: float
    card: float
    card_width: float
    bar: float
    guests: float


def draw(picture: Picture) -> str:
    """Return the picture as an SVG document."""
    sheet = Sheet()
    if not picture.networks:
        width = ceil(2 * MARGIN + text_width(NONE, "value"))
        sheet.box(Area(0, 0, width, 76), "page", radius=8)
        sheet.text((MARGIN, 43), NONE, "value")
        return sheet.document(width, 76, "Networks", NONE)
    columns = _columns(picture)
    right, y = columns.guests, MARGIN + HEADING
    body = Sheet()
    for upstream, networks in picture.by_upstream:
        taken = _section(body, columns, upstream, networks, y)
        right, y = max(right, taken.right), taken.bottom + 2 * BETWEEN
    width, height = ceil(right + MARGIN), ceil(y - 2 * BETWEEN + MARGIN)
    sheet.box(Area(0, 0, width, height), "page", radius=8)
    for x, text in (
        (columns.upstream, "UPSTREAM"),
        (columns.card, "NETWORK AND ITS NAMESPACE"),
        (columns.guests, "GUESTS"),
    ):
        sheet.text((x, MARGIN + 8), text, "heading")
    sheet.add(body)
    number = len(picture.networks)
    names = ", ".join(sorted(network.name for network in picture.networks))
    return sheet.document(width, height, f"{number} networks of libvirt-natns", names)


def _columns(picture: Picture) -> Columns:
    wide = [
        text_width(text, "quiet")
        for upstream in picture.upstreams
        for text in (*_facts(upstream), f"{upstream.name}  ")
    ]
    upstream = between(max(wide, default=0) + 2 * PAD, UPSTREAM)
    card = width_for(picture.networks)
    bridge = max(text_width(network.bridge, "quiet") for network in picture.networks)
    bus = MARGIN + upstream + BUS
    bar = bus + BUS + card + bridge + 28
    return Columns(MARGIN, bus, bus + BUS, card, bar, bar + 24)


# -- an upstream with its networks -------------------------------------------


def _section(
    sheet: Sheet,
    columns: Columns,
    upstream: DrawnUpstream,
    networks: Sequence[DrawnNetwork],
    y: float,
) -> Area:
    """Draw an upstream with its networks from ``y`` on; return the place that they take."""
    facts = _facts(upstream)
    width = columns.bus - BUS - columns.upstream
    place = Area(columns.upstream, y, width, 2 * PAD + LINE * (1 + len(facts)) - 4)
    right, bottom, ends = 0.0, y, list[float]()
    for network in networks:
        ends.append(bottom + START)
        taken = _network(sheet, columns, network, bottom)
        right, bottom = max(right, taken.right), taken.bottom + BETWEEN
    sheet.line((place.right, ends[0]), (columns.card, ends[0]), "outer", 2)
    for end in ends[1:]:
        sheet.line((columns.bus, end), (columns.card, end), "outer", 2)
    sheet.line((columns.bus, ends[0] - END), (columns.bus, ends[-1] + END), "outer", 4)
    for end in ends:
        sheet.disk((columns.card, end), 4, "outer")
    _upstream(sheet, place, upstream, facts)
    bottom = max(bottom - BETWEEN, place.bottom)
    return Area(columns.upstream, y, right - columns.upstream, bottom - y)


def _facts(upstream: DrawnUpstream) -> list[str]:
    bridge = f"bridge {upstream.bridge}" if upstream.bridge != "?" else ""
    return [text for text in (bridge, *upstream.how, *upstream.details) if text]


def _upstream(sheet: Sheet, card: Area, upstream: DrawnUpstream, facts: Sequence[str]) -> None:
    sheet.box(card, "card", "outer")
    room = card.width - 2 * PAD
    y = card.y + PAD + 12
    sheet.text((card.x + PAD, y), upstream.name, "title", room)
    for fact in facts:
        y += LINE
        sheet.text((card.x + PAD, y), fact, "quiet", room)


# -- a network with its guests -----------------------------------------------


def _network(sheet: Sheet, columns: Columns, network: DrawnNetwork, y: float) -> Area:
    """Draw a network with its bridge and guests from ``y`` on; return the place that they take."""
    card = Card(network, columns.card_width)
    card.draw(sheet, (columns.card, y))
    left, start = columns.card + card.width, y + START
    sheet.line((left, start), (columns.bar, start), "inner", 2)
    sheet.disk((left, start), 4, "inner")
    sheet.text(((left + columns.bar) / 2, start - 7), network.bridge, "quiet", None, "middle")
    if network.guests:
        taken = _guests(sheet, columns, network.guests, Area(columns.card, y, 0, card.height))
    else:
        sheet.line((columns.bar, start - END), (columns.bar, start + END), "inner", 4)
        sheet.text((columns.guests, start + 4), "no guest", "label")
        taken = Area(columns.guests, y, 60, 0)
    height = max(card.height, taken.height)
    return Area(columns.card, y, taken.right - columns.card, height)


def _guests(sheet: Sheet, columns: Columns, guests: Sequence[DrawnGuest], beside: Area) -> Area:
    """Draw the guests at the right of their bridge; return the place that they take."""
    shown = guests[:MOST_GUESTS]
    # The first guest is at the height of the network's line, which may then be straight.
    top = beside.y + START - CHIP / 2
    places = _places(shown, beside.bottom - top, (columns.guests, top))
    low = beside.y + START
    for guest, place in zip(shown, places, strict=True):
        if place.x == columns.guests:
            middle = place.y + CHIP / 2
            sheet.line((columns.bar, middle), (place.x, middle), "inner", 1.5)
            low = max(low, middle)
        _guest(sheet, place, guest)
    sheet.line((columns.bar, beside.y + START - END), (columns.bar, low + END), "inner", 4)
    bottom = max(place.bottom for place in places)
    if len(guests) > len(shown):
        bottom += LINE
        sheet.text((columns.guests, bottom), f"and {len(guests) - len(shown)} more", "label")
    right = max(place.right for place in places)
    return Area(columns.guests, beside.y, right - columns.guests, bottom - beside.y)


def _places(guests: Sequence[DrawnGuest], height: float, corner: Point) -> list[Area]:
    """Return the places of guests, column by column, beside a card of that height."""
    width = between(max(map(_guest_width, guests)), GUEST)
    heights = [CHIP + LINE * max(0, len(guest.addresses) - 1) for guest in guests]
    fit = max(3, int((height + GAP) / (max(heights) + GAP)))
    most = max(1, int(GUESTS_ACROSS / (width + 2 * GAP)))
    across = min(most, -(-len(guests) // fit))
    rows = -(-len(guests) // across)
    places: list[Area] = []
    for number, tall in enumerate(heights):
        column, row = divmod(number, rows)
        top = places[-1].bottom + GAP if row else corner[1]
        places.append(Area(corner[0] + column * (width + 2 * GAP), top, width, tall))
    return places


def _guest_width(guest: DrawnGuest) -> float:
    addresses = max((text_width(text, "quiet") + 16 for text in guest.addresses), default=0)
    return text_width(guest.name, "name") + addresses + 20


def _guest(sheet: Sheet, place: Area, guest: DrawnGuest) -> None:
    sheet.box(place, "chip", "edge", 5)
    taken = max((text_width(text, "quiet") + 16 for text in guest.addresses), default=0)
    sheet.text((place.x + 10, place.y + 16), guest.name, "name", place.width - 20 - taken)
    for line, address in enumerate(guest.addresses):
        sheet.text((place.right - 10, place.y + 16 + line * LINE), address, "quiet", None, "end")
