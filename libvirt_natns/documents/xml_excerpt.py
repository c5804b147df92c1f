# SPDX-License-Identifier: LGPL-2.1-or-later
"""Excerpts of libvirt's documents for a bug report: the parts that concern networks, and no others.

An excerpt is made from a list of elements and attributes to show.  So neither a password of a
display nor the metadata of another program can be in it, in a libvirt of the future as well.
"""

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from libvirt_natns.documents.xml_dictionary import bounded
from libvirt_natns.documents.xml_tree import parse
from libvirt_natns.documents.xml_values import NS, Element, text

DNSMASQ = "{http://libvirt.org/schemas/network/dnsmasq/1.0}"
PREFIXES = {NS: "natns:", DNSMASQ: "dnsmasq:"}

WORDS_OF_A_PERSON = ("title", "description")
"""Elements with prose, which may say anything."""

INTERFACE = (
    "alias", "backend", "bandwidth", "boot", "driver", "inbound", "ip", "link", "mac", "model",
    "mtu", "outbound", "portForward", "range", "route", "source", "target", "tag", "vlan",
)  # fmt: skip
"""Elements of a guest's NIC that are shown; a filter's parameters are not."""


@bounded
def of_network(xml: bytes) -> str:
    """Return a ``<network>`` without the metadata of others.  Raises DocumentError."""
    return "\n".join(_shown(parse(xml, ("network",)), 0))


@bounded
def of_domain(xml: bytes) -> str:
    """Return the name, our metadata and the NICs of a ``<domain>``; "" if no NIC is in a network.

    Raises DocumentError.
    """
    root = parse(xml, ("domain",))
    nat = root.find(f"metadata/{NS}nat")
    nics = root.findall("devices/interface")
    if nat is None and not any(nic.attrib.get("type") in ("network", "bridge") for nic in nics):
        return ""
    lines = [f"<domain type={quoteattr(root.attrib.get('type', ''))}>"]
    lines += [f"  <{tag}>{escape(text(root, tag))}</{tag}>" for tag in ("name", "uuid")]
    if nat is not None:
        lines += _shown(nat, 1)
    for nic in nics:
        lines += _shown(nic, 1, INTERFACE)
    return "\n".join([*lines, "</domain>"])


def _shown(element: Element, depth: int, listed: tuple[str, ...] | None = None) -> Iterator[str]:
    """Yield an element as lines, with the ``listed`` children; None for all that concern us."""
    tag = _tag(element)
    attributes = "".join(f" {name}={quoteattr(value)}" for name, value in element.attrib.items())
    head = f"{'  ' * depth}<{tag}{attributes}"
    children = [child for child in element if _concerns(element, child, listed)]
    said = (element.text or "").strip()
    if children:
        yield f"{head}>"
        for child in children:
            yield from _shown(child, depth + 1, listed)
        yield f"{'  ' * depth}</{tag}>"
    else:
        yield f"{head}>{escape(said)}</{tag}>" if said else f"{head}/>"


def _tag(element: Element) -> str:
    for namespace, prefix in PREFIXES.items():
        if element.tag.startswith(namespace):
            return prefix + element.tag.removeprefix(namespace)
    return element.tag


def _concerns(parent: Element, child: Element, listed: tuple[str, ...] | None) -> bool:
    # A processing instruction has a function as its tag.
    if not isinstance(child.tag, str):
        return False
    if parent.tag == "metadata":
        return child.tag.startswith(NS)
    if listed is not None:
        return child.tag in listed
    ours = child.tag.startswith(tuple(PREFIXES))
    return ours or not (child.tag.startswith("{") or child.tag in WORDS_OF_A_PERSON)
