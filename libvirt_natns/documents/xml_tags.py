# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tags of a document that expat refuses, for ``xml_sniff``.

libxml2, and so libvirt, takes names that expat does not know and prefixes that are bound to no XML
namespace.  Only pairs are checked: each tag needs its end.  Time and memory grow with the
document's length alone, however deep it is.
"""

import re
from collections.abc import Callable

Start = Callable[[str, dict[str, str]], None]
"""Takes an element's name, "NAMESPACE NAME" where it has a namespace, and its attributes."""

End = Callable[[str], None]
Text = Callable[[str], None]

# Possessive, so that no text makes it backtrack.
TAG = re.compile(r"""<(/?)([^\s<>/='"]++)((?:[^<>'"]|"[^"<]*+"|'[^'<]*+')*+)>""")
ATTRIBUTE = re.compile(r"""([^\s<>/='"]++)\s*+=\s*+(?:"([^"]*+)"|'([^']*+)')""")
REFERENCE = re.compile(r"&(?:#([0-9]{1,7})|#x([0-9a-fA-F]{1,6})|(lt|gt|amp|quot|apos));")
NAMED = {"lt": "<", "gt": ">", "amp": "&", "quot": '"', "apos": "'"}

REPLACED = "\N{REPLACEMENT CHARACTER}"

CDATA = "<![CDATA["
PASSED_OVER = (("<!--", "-->"), ("<?", "?>"), (CDATA, "]]>"))


def read(data: bytes, start: Start, end: End, text: Text) -> bool:
    """Call ``start``, ``end`` and ``text`` for all tags and texts; False for a fault.

    The calls up to the place of the fault hold.
    """
    document = data.decode(errors="replace")
    is_text = REPLACED not in document or document.encode() == data
    scopes = _Scopes()
    position = 0
    while (tag_start := document.find("<", position)) >= 0:
        if tag_start > position:
            text(_resolved(document[position:tag_start]))
        skipped = _skip(document, tag_start, text)
        if skipped is not None:
            position = skipped
            continue
        tag = TAG.match(document, tag_start)
        # A document type could define entities, which are not resolved here.
        if tag is None or tag[2][0] in "!?":
            return False
        position = tag.end()
        closing, name, rest = tag.groups()
        if not closing:
            attributes = _attributes(rest)
            scopes.enter(name, attributes)
            start(scopes.full(name), attributes)
        if closing or rest.endswith("/"):
            if not scopes.leave(name):
                return False
            end(name)
    return scopes.over and is_text


def _skip(document: str, position: int, text: Text) -> int | None:
    """Return the end of a comment, CDATA section or instruction; None for a tag."""
    for begin, end in PASSED_OVER:
        if document.startswith(begin, position):
            after = document.find(end, position + len(begin))
            if after < 0:
                return None
            if begin == CDATA:
                text(document[position + len(begin) : after])
            return after + len(end)
    return None


def _attributes(text: str) -> dict[str, str]:
    return {name: _resolved(double or single) for name, double, single in ATTRIBUTE.findall(text)}


def _resolved(text: str) -> str:
    """Return the text with its references to characters replaced."""
    return REFERENCE.sub(_character, text) if "&" in text else text


def _character(found: re.Match[str]) -> str:
    decimal, hexadecimal, name = found.groups()
    if name:
        return NAMED[name]
    number = int(decimal) if decimal else int(hexadecimal, 16)
    return chr(number) if number < 0x110000 else ""


class _Scopes:
    """Open elements and the XML namespaces that they bind prefixes to."""

    def __init__(self) -> None:
        self._open: list[tuple[str, list[str]]] = []
        self._bound: dict[str, list[str]] = {}
        self._roots = 0

    @property
    def over(self) -> bool:
        """True if a document has begun and ended."""
        return self._roots == 1 and not self._open

    def enter(self, name: str, attributes: dict[str, str]) -> None:
        """Open an element and bind its prefixes."""
        self._roots += not self._open
        prefixes = []
        for attribute, value in attributes.items():
            if attribute == "xmlns" or attribute.startswith("xmlns:"):
                prefix = attribute[6:]
                self._bound.setdefault(prefix, []).append(value)
                prefixes.append(prefix)
        self._open.append((name, prefixes))

    def full(self, name: str) -> str:
        """Return the name with its XML namespace, if it has one."""
        prefix, _, local = name.rpartition(":")
        bound = self._bound.get(prefix)
        if bound and bound[-1]:
            return f"{bound[-1]} {local}"
        return name

    def leave(self, name: str) -> bool:
        """Close the innermost element; False if it has another name."""
        if not self._open:
            return False
        opened, prefixes = self._open.pop()
        for prefix in prefixes:
            self._bound[prefix].pop()
        return opened == name
