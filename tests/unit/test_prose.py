# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guard of the language finds each kind of fault, and no fault in code and quotations."""

from collections.abc import Callable, Iterator
from pathlib import Path

import prose
import pytest
from test_language import broken_rules, is_imperative

LONG = "The bridge " + "and the bridge " * 10
LONG_RULE = "35 words, at most 30"

PAGE = f"""
# What a heading says is free

Whoever reads this finds `whatever` and ["nobody"](mend.md) in code and quotations only.

* {LONG} is too long.
* The lease is whole. One that is
  lost comes back.

```console
# nobody reads this
```

| whose | heads of columns |
|-------|------------------|
| `who` | somebody         |
"""

MANUAL = f"""
.Sh DESCRIPTION
The command
.Cm mend
repairs a link.
{LONG}
is too long.
Those are wrong.
.Bd -literal
nobody reads this
.Ed
"""

SCRIPT = f"""#!/bin/sh
# The script is short.
#
# {LONG}
# is too long.
echo "whoever"  # nobody sees this
"""

XML = f"""<x>
<!-- {LONG}
     is too long. Such a file is bad. -->
<whose/></x>
"""

MODULE = f'''"""The module has a link, and

    code below two colons::

        nobody nobody
"""

# {LONG}
# is too long.
MEND = "nobody"  # type: ignore
"""What a value says."""

class Link:
    """A link."""

    def find(self) -> None:
        """The link is found."""

    @property
    def name(self) -> str:
        """The link's name."""

    def delete(self) -> None:
        """Delete the link.  Nobody else does."""
'''


@pytest.mark.parametrize(
    ("read", "text", "faults"),
    [
        (
            prose.markdown,
            PAGE,
            {
                (4, 'begins with "Whoever"'),
                (4, '"Whoever"'),
                (6, LONG_RULE),
                (7, 'begins with "One"'),
                (16, '"somebody"'),
            },
        ),
        (prose.manual, MANUAL, {(6, LONG_RULE), (8, 'begins with "Those"')}),
        (
            prose.hash_comments,
            SCRIPT,
            {(4, LONG_RULE), (6, 'begins with "nobody"'), (6, '"nobody"')},
        ),
        (prose.xml_comments, XML, {(2, LONG_RULE), (3, 'begins with "Such"')}),
        (
            prose.module,
            MODULE,
            {
                (8, LONG_RULE),
                (11, 'begins with "What"'),
                (24, 'begins with "Nobody"'),
                (24, '"Nobody"'),
            },
        ),
    ],
    ids=["markdown", "manual", "script", "xml", "module"],
)
def test_faults_are_found(
    read: Callable[[Path], Iterator[prose.Sentence]],
    text: str,
    faults: set[tuple[int, str]],
    tmp_path: Path,
) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    assert faults == {
        (sentence.line, rule) for sentence in read(file) for rule in broken_rules(sentence)
    }


def test_a_function_begins_with_an_imperative(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(MODULE)
    faults = [
        docstring.line
        for docstring in prose.docstrings(file)
        if docstring.kind == "function" and not is_imperative(docstring)
    ]
    assert faults == [17]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("It takes 4 s. A guest waits.", 2),
        ("libvirt waits. libvirt is slow.", 2),
        ("Addresses, e.g. 10.0.0.1, and names, i.e. words.", 1),
        ("The file is /etc/x.d, ... of a package.", 1),
        ("Is it up? (It is.) Then go on.", 3),
    ],
)
def test_sentences_end_with_a_full_stop(text: str, count: int) -> None:
    assert len(list(prose.sentences(Path("x"), [(1, text)]))) == count
