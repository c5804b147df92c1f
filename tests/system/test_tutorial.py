# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tutorial, typed in a sandbox of its own: every command prints what the text says."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from lab import CHECKOUT, run

TUTORIAL = CHECKOUT / "docs" / "tutorial.md"
MARK = "=-=-= "


@dataclass
class Step:
    """A command of the tutorial and the lines that it is to print; "..." is anything."""

    command: str
    lines: list[str] = field(default_factory=list)

    @property
    def pattern(self) -> str:
        """The output as a regular expression; a line of "..." is any number of lines."""
        lines = squeezed("\n".join(self.lines)).splitlines()
        return "".join(r"(?:.*\n)*?" if line == "..." else _line(line) for line in lines)


def _line(text: str) -> str:
    return ".*".join(map(re.escape, text.split("..."))) + r"\n"


def squeezed(output: str) -> str:
    """Text without blank lines, in which blanks count as one."""
    return "".join(" ".join(line.split()) + "\n" for line in output.splitlines() if line.strip())


def steps() -> list[Step]:
    found: list[Step] = []
    for block in re.findall(r"(?ms)^```console\n(.*?)^```$", TUTORIAL.read_text()):
        for line in block.splitlines():
            if line.startswith("# "):
                found.append(Step(line[2:]))
            else:
                found[-1].lines.append(line)
    return found


def script(todo: list[Step]) -> str:
    """All commands in one shell, a mark ahead of each one's output."""
    return "".join(f"echo '{MARK}{number}'\n{step.command}\n" for number, step in enumerate(todo))


def test_tutorial() -> None:
    todo = steps()
    assert len(todo) > 30
    sandbox = CHECKOUT / "contrib" / "sandbox"
    shell = ("bash", "-c", f"cd {CHECKOUT}\nexec 2>&1\n{script(todo)}")
    printed = run(sandbox, "--libvirt", "--", *shell, timeout=120).stdout
    outputs = re.split(rf"(?m)^{MARK}\d+\n", printed)[1:]
    assert len(outputs) == len(todo)
    for step, output in zip(todo, outputs, strict=True):
        assert re.fullmatch(step.pattern, squeezed(output)), f"# {step.command}\n{output}"


def test_examples_of_the_tutorial_are_there() -> None:
    named = re.findall(r"(?:xml|docs|contrib)/[\w./-]+\w", TUTORIAL.read_text())
    assert named
    for name in named:
        assert Path(CHECKOUT, name).exists(), name
