# SPDX-License-Identifier: LGPL-2.1-or-later
"""The attributes that the code declares are those of the schemas, with values of their forms."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from lxml import etree

from libvirt_natns import names
from libvirt_natns.documents import xml_attributes, xml_schema_errors
from libvirt_natns.documents.xml_attributes import XmlAttribute
from libvirt_natns.documents.xml_schema_errors import Grammar
from libvirt_natns.documents.xml_values import Element

ELEMENTS = {
    "nat": xml_attributes.NatXml,
    "nat/upstream": xml_attributes.UpstreamXml,
    "nat/interface": xml_attributes.InterfaceXml,
    "nat/portForward": xml_attributes.ForwardXml,
    "nat/portForward/range": xml_attributes.RangeXml,
    "nat/address": xml_attributes.AddressXml,
    "nat/address/allow": xml_attributes.AllowXml,
}
LIBVIRTS = "nat/ip"
"""The element that has the shape of libvirt's own, with all in it."""

IMPLIED = {("enabled", "yes"), ("proto", "tcp"), ("exclude", "no"), ("address", "auto")}
"""Values that mean the same as no attribute at all."""


def declared(kind: type) -> dict[str, XmlAttribute[Any, Any]]:
    """Return the attributes that a class declares, by their names in XML."""
    values = [getattr(kind, name) for name in dir(kind)]
    return {value.name: value for value in values if isinstance(value, XmlAttribute)}


def grammar(kind: str) -> Grammar:
    path = names.resource(f"xml/natns-{kind}.rng")
    return xml_schema_errors.load(path, lambda file: etree.parse(str(file)).getroot())


def attributes(grammar: Grammar, pattern: Element, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield each attribute of a schema: the path of its element, its name, a value of its form."""
    for rule in grammar.rules(pattern):
        if rule.kind == "element":
            yield from attributes(grammar, rule.pattern, f"{path}/{rule.name}".lstrip("/"))
        for leaf in grammar.leaves(rule.pattern) if rule.kind == "attribute" else ():
            fixed = leaf.text if leaf.tag == f"{xml_schema_errors.RNG}value" else None
            words = grammar.expectation(rule.pattern)
            for value in [fixed] if fixed else examples(words):
                yield path, rule.name, value


def examples(words: str) -> list[str]:
    """Return the values that the words of a refusal have as examples."""
    found = re.search(r"such as ([^,]+)|from ([0-9]+)", words)
    return re.split(" or ", found[1] or found[2]) if found else ["x"]


SCHEMA = sorted({
    row
    for kind in ("network", "domain")
    for row in attributes(grammar(kind), grammar(kind).start, "")
    if not row[0].startswith(LIBVIRTS)
})  # fmt: skip


def test_schemas_and_declarations_have_the_same_attributes() -> None:
    schema: dict[str, set[str]] = {}
    for path, name, _ in SCHEMA:
        schema.setdefault(path, set()).add(name)
    assert schema == {path: set(declared(kind)) for path, kind in ELEMENTS.items()}


@pytest.mark.parametrize(("path", "name", "value"), SCHEMA)
def test_a_value_of_the_schemas_form_is_read(path: str, name: str, value: str) -> None:
    element = etree.Element(path.rpartition("/")[2], {name: value})
    attribute = declared(ELEMENTS[path])[name]
    assert attribute.required(element) == attribute.of(element)
    assert (attribute.of(element) == attribute.of(etree.Element("x"))) == ((name, value) in IMPLIED)
