# SPDX-License-Identifier: LGPL-2.1-or-later
"""The picture in the language of graphviz (dot(1)), in ASCII alone."""

from collections.abc import Iterable, Iterator

from libvirt_natns.cli.diagram.picture import NONE, OK, DrawnNetwork, Picture

HEAD = """\
digraph networks {
  graph [rankdir=LR, ranksep=0.6, nodesep=0.15];
  node [shape=box, style=rounded, fontname="monospace", fontsize=11];
  edge [dir=none];"""
FAULT = ', color="#cf222e"'
BRIDGE = 'style="rounded,filled", fillcolor="#ece6f7"'
ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "&": "&amp;", "<": "&lt;", ">": "&gt;"})


def draw(picture: Picture) -> str:
    """Return a directed graph: from upstreams by namespaces and bridges to guests."""
    lines = [HEAD]
    if not picture.networks:
        lines.append(f"  none [{_label([NONE])}, shape=plaintext];")
    number = 0
    for place, (upstream, networks) in enumerate(picture.by_upstream):
        said = [f"upstream {upstream.name}", upstream.bridge, *upstream.how, *upstream.details]
        lines.append(f"  u{place} [{_label(said)}, style=filled, fillcolor=lightgrey];")
        for network in networks:
            lines += _network(network, f"u{place}", str(number))
            number += 1
    return "\n".join([*lines, "}\n"])


def _network(network: DrawnNetwork, upstream: str, number: str) -> Iterator[str]:
    head = f"{network.namespace}: {network.health}"
    inside = [head, *network.gateways, *network.outside, *network.forward_texts]
    fault = "" if network.health == OK else FAULT
    yield f"  n{number} [{_label(inside)}{fault}];"
    yield f"  b{number} [{_label([network.name, network.bridge])}, {BRIDGE}];"
    yield f"  {upstream} -> n{number} -> b{number};"
    for place, guest in enumerate(network.guests):
        yield f"  g{number}_{place} [{_label([guest.name, *guest.addresses])}];"
        yield f"  b{number} -> g{number}_{place};"


def _label(texts: Iterable[str]) -> str:
    r"""Return the attribute label, with its lines at the left; graphviz reads entities, and \l."""
    lines = (text.translate(ESCAPES) + r"\l" for text in texts)
    return f'label="{"".join(lines)}"'.encode("ascii", "xmlcharrefreplace").decode()
