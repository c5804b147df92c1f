# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reason why a RELAX NG schema refuses an element, in words a person can act on.

A validator's own message ("Element nat failed to validate content") seldom
names the culprit.  ``explain`` walks the element and the schema side by side and stops
at the first unknown, missing or wrong attribute or element.  The expected value comes
from the schema's own ``<a:documentation>``.

``explain`` runs only once a validator has refused the element, and is no validator
itself.  Limits: it knows the patterns that the schemas in xml/ use (no ``mixed``, ``list``
or name classes).  It finds nothing for a choice that no single attribute or element breaks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from libvirt_natns.documents.xml_values import Element, local_name
from libvirt_natns.values import alternatives, shown

RNG = "{http://relaxng.org/ns/structure/1.0}"
DOCUMENTATION = "{http://relaxng.org/ns/compatibility/annotations/1.0}documentation"

OPTIONAL = {"optional", "zeroOrMore", "choice"}
REPEATABLE = {"zeroOrMore", "oneOrMore"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason of a refusal: the ``fact`` in ``element``, and the ``expected`` form."""

    element: Element
    fact: str
    expected: str


@dataclass(frozen=True, slots=True)
class SchemaRule:
    """An attribute or child element that a schema allows in an element."""

    kind: str
    name: str
    pattern: Element
    required: bool
    repeatable: bool


@dataclass(frozen=True, slots=True)
class Grammar:
    """A schema, its includes merged in: the start pattern and named patterns."""

    start: Element
    defines: Mapping[str, Element]

    def rules(
        self, pattern: Element, required: bool = True, repeatable: bool = False
    ) -> Iterator[SchemaRule]:
        """Yield the rules for the content of ``pattern``, one level deep."""
        for child in pattern:
            kind = local_name(child.tag)
            if kind in ("element", "attribute"):
                yield SchemaRule(kind, child.attrib.get("name", ""), child, required, repeatable)
                continue
            inner = self.defines[child.attrib.get("name", "")] if kind == "ref" else child
            yield from self.rules(
                inner, required and kind not in OPTIONAL, repeatable or kind in REPEATABLE
            )

    def leaves(self, pattern: Element) -> Iterator[Element]:
        """Yield the ``<value>`` and ``<data>`` patterns that a value may match."""
        for child in pattern:
            kind = local_name(child.tag)
            if kind in ("value", "data"):
                yield child
            elif kind == "ref":
                yield from self.leaves(self.defines[child.attrib.get("name", "")])
            else:
                yield from self.leaves(child)

    def expectation(self, pattern: Element) -> str:
        """Return the form of a value of ``pattern``, in words for an error message."""
        for ref in pattern.iter(f"{RNG}ref"):
            text = self.defines[ref.attrib.get("name", "")].findtext(DOCUMENTATION)
            if text:
                return text
        return alternatives([leaf.text or "" for leaf in self.leaves(pattern)])


def load(path: Path, parse: Callable[[Path], Element]) -> Grammar:
    """Return the grammar in the file ``path``, read with ``parse``."""
    root = parse(path)
    defines: dict[str, Element] = {}
    for include in root.iter(f"{RNG}include"):
        defines |= load(path.with_name(include.attrib.get("href", "")), parse).defines
    defines |= {define.attrib.get("name", ""): define for define in root.iter(f"{RNG}define")}
    start = root.find(f"{RNG}start")
    return Grammar(root if start is None else start, defines)


def explain(element: Element, grammar: Grammar) -> Refusal | None:
    """Return the first fault in ``element``, as the grammar's start has it.

    None without a fault, or where only a combination is wrong.
    """
    for rule in grammar.rules(grammar.start):
        if rule.name == local_name(element.tag):
            return _explain(element, rule.pattern, grammar)
    return None


def _explain(element: Element, pattern: Element, grammar: Grammar) -> Refusal | None:
    rules = list(grammar.rules(pattern))
    attributes = [rule for rule in rules if rule.kind == "attribute"]
    elements = [rule for rule in rules if rule.kind == "element"]
    return (
        _explain_attributes(element, attributes, grammar)
        or _explain_text(element)
        or _explain_children(element, elements, pattern)
        or _explain_grandchildren(element, elements, grammar)
    )


def _explain_attributes(
    element: Element, rules: list[SchemaRule], grammar: Grammar
) -> Refusal | None:
    known = {rule.name for rule in rules}
    for name, value in element.attrib.items():
        if name not in known:
            fact = f"has an attribute {shown(name)}"
            return Refusal(element, fact, _only(known, "attributes"))
        patterns = [rule.pattern for rule in rules if rule.name == name]
        if not any(_accepts(leaf, value) for each in patterns for leaf in grammar.leaves(each)):
            wanted = alternatives([grammar.expectation(each) for each in patterns])
            return Refusal(element, f"has {name}={shown(value)}", wanted)
    for rule in rules:
        if rule.required and rule.name not in element.attrib:
            wanted = grammar.expectation(rule.pattern)
            return Refusal(element, f"has no attribute {rule.name!r}", wanted)
    return None


def _explain_text(element: Element) -> Refusal | None:
    texts = [element.text, *(child.tail for child in element)]
    for text in texts:
        if text and text.strip():
            return Refusal(element, f"has text {shown(text.strip())}", "none")
    return None


def _explain_children(
    element: Element, rules: list[SchemaRule], pattern: Element
) -> Refusal | None:
    known = {rule.name: rule for rule in rules}
    namespace = element.tag.removesuffix(local_name(element.tag))
    count: Counter[str] = Counter()
    for child in element:
        name = local_name(child.tag)
        if name not in known or child.tag != namespace + name:
            fact = f"is not known in <natns:{pattern.attrib.get('name')}>"
            return Refusal(child, fact, _only(set(known), "elements"))
        count[name] += 1
        if count[name] > 1 and not known[name].repeatable:
            return Refusal(child, "appears twice", "at most one")
    for rule in rules:
        if rule.required and not count[rule.name]:
            return Refusal(element, f"has no <natns:{rule.name}>", "at least one")
    return None


def _explain_grandchildren(
    element: Element, rules: list[SchemaRule], grammar: Grammar
) -> Refusal | None:
    patterns = {rule.name: rule.pattern for rule in rules}
    for child in element:
        refusal = _explain(child, patterns[local_name(child.tag)], grammar)
        if refusal:
            return refusal
    return None


def _accepts(leaf: Element, value: str) -> bool:
    """True if a ``<value>`` or a ``<data>`` with facets accepts ``value``."""
    if local_name(leaf.tag) == "value":
        return value == leaf.text
    facets = {facet.attrib.get("name", ""): facet.text or "" for facet in leaf.iter(f"{RNG}param")}
    return len(value) <= int(facets.get("maxLength", len(value))) and bool(
        re.fullmatch(facets.get("pattern", "(?s:.*)"), value)
    )


def _only(names: set[str], kind: str) -> str:
    return f"only {alternatives(sorted(names))}" if names else f"no {kind} at all"
