# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages of the documentation, typed as they stand: every command prints what the text says.

Blocks of ``console`` are commands as root, ``# ``, each followed by what it prints:
"..." is anything, on a line of its own any number of lines.  A block of ``toml``,
``xml``, ``xsl`` or ``nft`` is saved where the text ahead of it says: "Write `FILE`".
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

from lab_base import run

MARK = "=-=-= "

BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>console|toml|xml|xsl|nft)\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)
SAVED = re.compile(r"[Ww]rite `([^`]+)`[^`]*:\s*$")


@dataclass
class Step:
    """A command of a page and the lines that it is to print."""

    command: str
    lines: list[str] = field(default_factory=list)

    @property
    def pattern(self) -> str:
        """The output as a regular expression."""
        lines = squeezed("\n".join(self.lines)).splitlines()
        return "".join(r"(?:.*\n)*?" if line == "..." else _line(line) for line in lines)


def _line(text: str) -> str:
    return ".*".join(map(re.escape, text.split("..."))) + r"\n"


def squeezed(output: str) -> str:
    """Text without blank lines, in which blanks count as one."""
    return "".join(" ".join(line.split()) + "\n" for line in output.splitlines() if line.strip())


def steps(page: Path, section: str | None = None) -> list[Step]:
    """All that a page, or the section under a heading, has one do, in its order.

    The section "" is what stands ahead of the first heading.
    """
    text = page.read_text()
    if section is not None:
        parts = dict(part.split("\n", 1) for part in f"\n{text}".split("\n## ")[1:])
        text = parts[section] if section else text.partition("\n## ")[0]
    found: list[Step] = []
    for block in BLOCK.finditer(text):
        inside = dedent(block["text"])
        saved = SAVED.search(text[: block.start()])
        if block["language"] == "console":
            found += _commands(inside)
        elif saved:
            found.append(
                Step(f"mkdir -p $(dirname {saved[1]}); cat >{saved[1]} <<'END'\n{inside}END")
            )
    return found


def _commands(text: str) -> Iterator[Step]:
    step: Step | None = None
    for line in text.splitlines():
        if line.startswith("# "):
            if step:
                yield step
            step = Step(line[2:])
        elif step:
            step.lines.append(line)
    if step:
        yield step


def script(todo: Sequence[Step]) -> str:
    """All commands in one shell, a mark ahead of each one's output."""
    return "".join(f"echo '{MARK}{number}'\n{step.command}\n" for number, step in enumerate(todo))


def compare(todo: Sequence[Step], printed: str) -> None:
    """Each command's output is what the page says."""
    outputs = re.split(rf"(?m)^{MARK}\d+\n", printed)[1:]
    assert len(outputs) == len(todo), printed
    for step, output in zip(todo, outputs, strict=True):
        assert re.fullmatch(step.pattern, squeezed(output)), f"# {step.command}\n{output}"


def type_page(
    page: Path, directory: Path, section: str | None = None, timeout: float = 120
) -> None:
    """Type a page, or a section of it, in the calling sandbox, in one shell in that directory."""
    todo = steps(page, section)
    assert todo, page
    shell = f"cd {directory}\nexec 2>&1 </dev/null\n{script(todo)}"
    compare(todo, run("bash", "-c", shell, timeout=timeout).stdout)


def clone_of(checkout: Path, directory: Path, more: Mapping[str, str] | None = None) -> Path:
    """A directory in which a page's relative paths lead into the checkout."""
    directory.mkdir(parents=True)
    for name in ("contrib", "xml", "docs", "bench"):
        (directory / name).symlink_to(checkout / name)
    for name, text in (more or {}).items():
        (directory / name).write_text(text)
    return directory
