# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tutorial, typed in a sandbox of its own: every command prints what the text says."""

import re
from pathlib import Path

from lab import CHECKOUT, run
from lab_documents import compare, script, steps

TUTORIAL = CHECKOUT / "docs" / "tutorial.md"


def test_tutorial() -> None:
    todo = steps(TUTORIAL)
    assert len(todo) > 30
    sandbox = CHECKOUT / "contrib" / "sandbox"
    shell = ("bash", "-c", f"cd {CHECKOUT}\nexec 2>&1\n{script(todo)}")
    printed = run(sandbox, "--libvirt", "--", *shell, timeout=120).stdout
    compare(todo, printed)


def test_examples_of_the_tutorial_are_there() -> None:
    named = re.findall(r"(?:xml|docs|contrib)/[\w./-]+\w", TUTORIAL.read_text())
    assert named
    for name in named:
        assert Path(CHECKOUT, name).exists(), name
