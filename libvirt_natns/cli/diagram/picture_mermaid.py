# SPDX-License-Identifier: LGPL-2.1-or-later
"""The picture as a flowchart of Mermaid, which GitHub and GitLab draw in a page, in ASCII alone.

Mermaid draws at most 500 lines between boxes, and refuses a text of more than 50000 characters.
So the guests of a network share a box.
"""

import re
from collections.abc import Iterable, Iterator

from libvirt_natns.cli.diagram.picture import NONE, OK, DrawnNetwork, Picture, first_of

MOST_GUESTS = 12
MOST_FORWARDS = 12
FAULT = "classDef fault stroke:#cf222e,stroke-width:2px"

SAFE = re.compile(r"[^A-Za-z0-9 .,:/()-]")
"""Characters that are escaped: quotes end a label, and "#", "%", "<", "`" and others act in it."""

NO_SPACE = "\u200b"

WORDS = re.compile(r"(?i)s(?=tyle)|c(?=lassdef)|e(?=nd\b)|h(?=ttps?:)|w(?=ww\.)")
"""First letters of words that Mermaid's own text replacements look for, within labels as well."""


def draw(picture: Picture) -> str:
    """Return a flowchart: from upstreams by namespaces and bridges to guests."""
    lines = ["flowchart LR"]
    if not picture.networks:
        lines.append(f"  none[{_label([NONE])}]")
    number = 0
    for place, (upstream, networks) in enumerate(picture.by_upstream):
        said = [f"upstream {upstream.name}", upstream.bridge, *upstream.how, *upstream.details]
        lines.append(f"  u{place}([{_label(said)}])")
        for network in networks:
            lines += _network(network, f"u{place}", number)
            number += 1
    if any(network.health != OK for network in picture.networks):
        lines.append(f"  {FAULT}")
    return "\n".join(lines) + "\n"


def _network(network: DrawnNetwork, upstream: str, number: int) -> Iterator[str]:
    head = f"{network.namespace}: {network.health}"
    forwards = first_of(network.forward_texts, MOST_FORWARDS)
    fault = "" if network.health == OK else ":::fault"
    inside = _label([head, *network.gateways, *network.outside, *forwards])
    yield f"  {upstream} --- n{number}[{inside}]{fault}"
    yield f"  n{number} --- b{number}{{{{{_label([network.name, network.bridge])}}}}}"
    guests = first_of([guest.text for guest in network.guests], MOST_GUESTS)
    if guests:
        yield f"  b{number} --- g{number}[{_label(guests)}]"


def _label(texts: Iterable[str]) -> str:
    return f'"{"<br/>".join(map(escaped, texts))}"'


def escaped(text: str) -> str:
    """Return a text for a label: Mermaid's entities begin with "#"."""
    # Mermaid reads "\\n" as a line break, and formulas between "$$", once entities are replaced.
    apart = text.replace("\\", f"\\{NO_SPACE}").replace("$", f"${NO_SPACE}")
    return WORDS.sub(_entity, SAFE.sub(_entity, apart))


def _entity(found: re.Match[str]) -> str:
    return f"#{ord(found[0])};"
