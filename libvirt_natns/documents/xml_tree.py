# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees of elements from libvirt's XML, and back: the only module that knows lxml.

No document can make the parser read another file or grow in memory: document types,
and with them entities, are refused before libxml2 sees them.

``<natns:nat>`` in ``<metadata>`` is a user's own text: it must satisfy the RELAX NG
schema in xml/.  libvirt validated its own part of a document.
"""

from __future__ import annotations

import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import cast

from lxml import etree

from libvirt_natns import names
from libvirt_natns.documents import xml_combinations, xml_schema_errors
from libvirt_natns.documents.xml_values import NS, Element, error
from libvirt_natns.errors import DocumentError
from libvirt_natns.values import alternatives, shown

MAX_DOCUMENT = 8 * 1024 * 1024
"""Largest document that is read, in bytes; libvirt's own messages end at 4 MiB."""

MAX_METADATA = 256 * 1024
"""Largest ``<natns:nat>`` element, in bytes: room for some 3000 fixed addresses."""

# All that may stand before the root element.  Possessive, so that no text makes it
# backtrack.
PROLOGUE = re.compile(r"\ufeff?(?:\s|<\?.*?\?>|<!--.*?-->)*+", re.DOTALL)
ENCODING = re.compile(r"\ufeff?<\?xml\s[^>]*?encoding\s*=\s*[\"']([^\"'>]*)")


def parse(data: bytes, roots: tuple[str, ...], *, keep_comments: bool = False) -> Element:
    """Return the root element of a document, which must be one of ``roots``."""
    _check_text(data)
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        load_dtd=False,
        no_network=True,
        huge_tree=False,
        remove_comments=not keep_comments,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as failure:
        reason = failure.msg or "it is empty"
        raise DocumentError("the document is not well-formed XML", reason) from failure
    except etree.LxmlError as failure:
        raise DocumentError("the document is not XML", str(failure)) from failure
    if root.getroottree().docinfo.doctype:
        raise _doctype_error()
    if root.tag not in roots:
        wanted = alternatives([f"<{name}>" for name in roots])
        raise DocumentError(f"the document begins with {shown(root.tag)}", f"expected {wanted}")
    return cast("Element", root)


def _check_text(data: bytes) -> None:
    """Refuse a document that the parser must not even see."""
    if len(data) > MAX_DOCUMENT:
        raise DocumentError(
            f"the document has {len(data)} bytes", f"expected at most {MAX_DOCUMENT}"
        )
    try:
        content = data.decode()
    except UnicodeDecodeError as failure:
        fact = f"the document is not UTF-8 at byte {failure.start}"
        raise DocumentError(fact, "save it as UTF-8") from None
    encoding = ENCODING.match(content)
    if encoding and encoding[1].lower() not in ("utf-8", "us-ascii"):
        raise DocumentError(f"the document has encoding={shown(encoding[1])}", "save it as UTF-8")
    prologue = PROLOGUE.match(content)
    if prologue and content.startswith("<!DOCTYPE", prologue.end()):
        raise _doctype_error()


def _doctype_error() -> DocumentError:
    return DocumentError("the document has a <!DOCTYPE>", "remove it, and the entities it defines")


# Text of elements


def octets(root: Element) -> bytes:
    """Return a document in UTF-8, for names and comments have no other spelling."""
    return bytes(etree.tostring(root, encoding="utf-8", xml_declaration=False))


def add_child(parent: Element, tag: str, attributes: dict[str, str] | None = None) -> Element:
    """Add an element at the end of another one; returns the new element."""
    nsmap = {"natns": NS[1:-1]} if tag.startswith(NS) else None
    return cast("Element", etree.SubElement(parent, tag, attributes, nsmap=nsmap))


def bare_text(nat: Element) -> str:
    """Return an element's text without its namespace."""
    copy = cast("etree._Element", deepcopy(nat))
    for element in copy.iter():
        if isinstance(element.tag, str):
            element.tag = element.tag.removeprefix(NS)
    etree.cleanup_namespaces(copy)
    return cast("str", etree.tostring(copy, with_tail=False, encoding="unicode"))


# The schema of our metadata


def nat_element(element: Element, file: str) -> Element | None:
    """Return the ``<natns:nat>`` of a network or domain, valid by the schema ``file``.

    None without such an element; DocumentError for an element that is not valid.
    """
    elements = element.findall(f"metadata/{NS}nat")
    if not elements:
        return None
    if len(elements) > 1:
        raise error(elements[1], "appears twice", "at most one")
    nat = elements[0]
    size = len(etree.tostring(nat, with_tail=False))
    if size > MAX_METADATA:
        raise error(nat, f"has {size} bytes", f"at most {MAX_METADATA}")
    xml_combinations.check_characters(nat)
    _validate(nat, file)
    return nat


def _validate(nat: Element, file: str) -> None:
    validator = _validator(names.resource(f"xml/{file}"))
    if validator.validate(nat):
        return
    refusal = xml_schema_errors.explain(nat, _grammar(file))
    if refusal:
        raise error(refusal.element, refusal.fact, refusal.expected)
    xml_combinations.check(nat)
    reason = next((str(entry.message) for entry in validator.error_log), "")
    raise error(nat, "is not valid", f"metadata as {file} defines it; {reason}")


@lru_cache
def _validator(path: Path) -> etree.RelaxNG:
    """Return a schema, read once per process; a hook that meets no metadata reads none."""
    try:
        return etree.RelaxNG(file=str(path))
    except (etree.LxmlError, OSError) as failure:
        raise DocumentError(f"{path}: {failure}", "reinstall libvirt-natns") from failure


@lru_cache
def _grammar(file: str) -> xml_schema_errors.Grammar:
    return xml_schema_errors.load(names.resource(f"xml/{file}"), _read_schema)


def _read_schema(path: Path) -> Element:
    return cast("Element", etree.parse(str(path)).getroot())
