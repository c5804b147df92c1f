# SPDX-License-Identifier: LGPL-2.1-or-later
"""A message is one line, and prints, whatever it quotes."""

import pytest

from libvirt_natns.documents import libvirt_xml
from libvirt_natns.errors import LONGEST, DocumentError, NatnsError, describe, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("as it is: \u00e9 \u4e2d", "as it is: \u00e9 \u4e2d"),
        (" one\n two\t\r\n three ", "one two three"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("C1 \x9b31m", "C1 \\x9b31m"),
        ("bidi \u202eabc\u2066", "bidi \\u202eabc\\u2066"),
        ("\u200bzero\ufeff", "\\u200bzero\\ufeff"),
        ("lone \ud800", "lone \\ud800"),
        ("private \U0010ffff", "private \\U0010ffff"),
        ("lines\u2028of\u2029text\x85", "lines of text"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected
    error = NatnsError(text, text)
    assert str(error) == f"{expected}: {expected}"
    assert str(error).isprintable()


def test_a_long_name_does_not_make_a_long_message() -> None:
    error = NatnsError(f"begin {'x' * 5000} end", f"do {chr(0x9B) * 5000} now")
    assert error.fact.startswith("begin x")
    assert error.fact.endswith("x end")
    assert len(str(error)) <= 2 * LONGEST + len(": ")


def test_an_internal_error_prints_as_well() -> None:
    line, _ = describe(ValueError("\x9b31m\nsecond"))
    assert "\\x9b31m second" in line
    assert line.isprintable()


@pytest.mark.parametrize("value", ["a\x9bb", "a\u202eb", "a\u2028b", "a\x7fb"])
def test_values_of_documents_are_escaped(value: str) -> None:
    xml = f"<network><name>a</name><bridge name='{value}'/></network>"
    with pytest.raises(DocumentError) as raised:
        libvirt_xml.parse_network(xml.encode())
    assert str(raised.value).isprintable()
    assert ascii(value)[1:-1] in str(raised.value)
