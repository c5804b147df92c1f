# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sentences of the project's prose, each with its place.

Headings, code blocks and quoted text are no prose. Inline code and a quotation count as one word.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CODE = "CODE"
"""The word that inline code and a quoted message become."""

Lines = list[tuple[int, str]]
"""The lines of one paragraph by their numbers."""


@dataclass(frozen=True)
class Sentence:
    """A sentence, with the file and line where its paragraph has it."""

    file: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        """Words with a letter or digit in them; a name with punctuation inside is one."""
        return [word for word in self.text.split() if re.search(r"\w", word)]


END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!\.\.\.)(?<=[.!?])[\"')*]*\s+(?=[\"'(*]*[\w`<-])")
"""Where a sentence ends: a full stop and space. A name may begin a sentence in lower case."""


def without_markup(text: str) -> str:
    """Return a paragraph with code and quotations as one word, and links as their text."""

    def code(match: re.Match[str]) -> str:
        # The line breaks stay, for the numbers of the lines.
        return CODE + "\n" * match[0].count("\n")

    text = re.sub(r"``.+?``|`[^`]+`", code, text, flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text, flags=re.S)
    text = re.sub(r"<https?://[^>]*>|https?://\S+", CODE, text)
    text = re.sub(r"(?<!\w)\"[^\"]*\"", code, text, flags=re.S)
    return re.sub(r"(?<!\w)\*{1,2}|\*{1,2}(?!\w)", "", text)


def sentences(file: Path, paragraph: Lines) -> Iterator[Sentence]:
    """Cut a paragraph into sentences, without its markup."""
    if not paragraph:
        return
    text = without_markup("\n".join(line for _, line in paragraph))
    numbers = [number for number, _ in paragraph]
    begin = 0
    for end in [*(match.end() for match in END.finditer(text)), len(text)]:
        sentence = " ".join(text[begin:end].split())
        leading = len(text[begin:end]) - len(text[begin:end].lstrip())
        line = text.count("\n", 0, begin + leading)
        if sentence:
            yield Sentence(file, numbers[min(line, len(numbers) - 1)], sentence)
        begin = end


def paragraphs(lines: Iterator[tuple[int, str]] | Lines) -> Iterator[Lines]:
    """Group lines into paragraphs and list items, without code blocks after ``::`` and tables."""
    paragraph: Lines = []
    code_below: int | None = None
    for number, line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if code_below is not None:
            if not text or indent > code_below:
                continue
            code_below = None
        # An item of a list, or a word and its definition in a column of its own.
        item = re.match(r"(?:[-*]|\d+\.)\s+|[\w-]+ {2,}(?=\S)", text)
        if not text or item:
            yield paragraph
            paragraph = []
        if text:
            paragraph.append((number, text[item.end() :] if item else text))
        if text.endswith("::"):
            code_below = indent
    yield paragraph


def cells(row: str) -> list[str]:
    """The cells of a row of a table in Markdown."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]


def markdown(file: Path) -> Iterator[Sentence]:
    """Sentences of paragraphs, list items and tables; a cell is a paragraph, a heading is none.

    Text between ``<!-- begin: COMMAND -->`` and ``<!-- end -->`` is output of a command.
    """
    hidden = r"(?ms)<!-- begin: .*?<!-- end -->|^ *```.*?^ *```$|<!--.*?-->"
    text = re.sub(hidden, lambda block: "\n" * block[0].count("\n"), file.read_text())
    lines = text.splitlines()
    prose: Lines = []
    for number, (line, below) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1):
        indented_block = line.startswith("    ") and prose and not prose[-1][1]
        if line.lstrip().startswith("|") and not re.match(r"\s*\|[-: |]+$", below):
            for cell in cells(line):
                prose += [(number, ""), (number, cell), (number, "")]
        elif re.match(r"#+ |\s*\|", line) or indented_block:
            prose.append((number, ""))
        else:
            prose.append((number, line))
    for paragraph in paragraphs(prose):
        yield from sentences(file, paragraph)


BREAKS = {"Sh", "Ss", "Pp", "Bl", "El", "It", "Bd", "Ed", "Dd", "Dt", "Os", "Nd"}
PUNCTUATION = ".,;:)?!"


def macro(words: list[str]) -> str:
    """Return what a line of macros says: its arguments as one word, with the punctuation behind."""
    end = ""
    while len(words) > 1 and all(letter in PUNCTUATION for letter in words[-1]):
        end = words.pop() + end
    if words[0] in ("Em", "Sy", "No", "Dq", "Pq", "Po", "Pc", "Ns"):
        return " ".join(words[1:]) + end
    return CODE + end


def manual(file: Path) -> Iterator[Sentence]:
    """Sentences of a manual page in mdoc, without its displays and the items' heads."""
    prose: Lines = []
    shown, synopsis = False, False
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line[1:].split() if line.startswith(".") else []
        if words[:1] == ["Bd"] or words[:1] == ["Ed"]:
            shown = words[0] == "Bd"
        if words[:1] == ["Sh"]:
            synopsis = words[1] in ("SYNOPSIS", "NAME", "EXAMPLES", "FILES") or words[1:] == [
                "SEE",
                "ALSO",
            ]
        if shown or synopsis or line.startswith('.\\"') or (words and words[0] in BREAKS):
            prose.append((number, ""))
        elif words:
            prose.append((number, macro(words)))
        else:
            prose.append((number, line))
    for paragraph in paragraphs(prose):
        yield from sentences(file, paragraph)


NO_PROSE = re.compile(
    r"noqa|type: ignore|fmt: |shellcheck |SPDX-|!|mypy: "
    r"|[\w.\[\]\"-]+ *=(?: |$)|\[[\w.]+\]$|[-=]+$"
)
"""Comments for programs, and settings that are commented out."""


def hash_comments(file: Path) -> Iterator[Sentence]:
    """Sentences of comments of shell, YAML, TOML and unit files."""
    prose: Lines = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        own = re.match(r"\s*#+ ?(.*)", line)
        behind = re.search(r"\s# (.*)", line)
        if own:
            prose.append((number, "" if NO_PROSE.match(own[1]) else own[1]))
        elif behind:
            prose += [(number, ""), (number, behind[1]), (number, "")]
        else:
            prose.append((number, ""))
    for paragraph in paragraphs(prose):
        yield from sentences(file, paragraph)


def xml_comments(file: Path) -> Iterator[Sentence]:
    """Sentences of the comments and the documentation of XML files."""
    text = file.read_text()
    for match in re.finditer(r"(?s)<!--(.*?)-->|<a:documentation>(.*?)</a:documentation>", text):
        content = match[1] if match[1] is not None else match[2]
        begin = text.count("\n", 0, match.start()) + 1
        if "SPDX" not in content and not re.search(r"^\s*<", content):
            for paragraph in paragraphs(list(enumerate(content.splitlines(), begin))):
                yield from sentences(file, paragraph)


@dataclass(frozen=True)
class Docstring:
    """A docstring with the kind of its owner: ``module``, ``class``, ``function``, ``value``."""

    file: Path
    line: int
    kind: str
    text: str

    @property
    def sentences(self) -> Iterator[Sentence]:
        lines = self.text.expandtabs().splitlines()
        for paragraph in paragraphs([(self.line + at, line) for at, line in enumerate(lines)]):
            yield from sentences(self.file, paragraph)


def docstrings(file: Path) -> Iterator[Docstring]:
    """Docstrings of a module, its classes and functions, and the strings below assignments."""
    for node in ast.walk(ast.parse(file.read_text())):
        body = getattr(node, "body", None)
        for place, statement in enumerate(body if isinstance(body, list) else []):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str):
                    yield Docstring(file, statement.lineno, kind(node, place), text)


def kind(owner: ast.AST, place: int) -> str:
    """The kind of a string that stands at this place of its owner's body."""
    if place or isinstance(owner, ast.If):
        return "value"
    if isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef):
        names = [ast.unparse(decorator) for decorator in owner.decorator_list]
        return "property" if any("property" in name for name in names) else "function"
    return "class" if isinstance(owner, ast.ClassDef) else "module"


def comments(file: Path) -> Iterator[Sentence]:
    """Sentences of a module's comments; lines of comment below each other are a paragraph."""
    prose: Lines = []
    last = (0, 0)
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text()).readline)
    for token in tokens:
        if token.type == tokenize.COMMENT:
            number, column = token.start
            if (number - 1, column) != last:
                prose.append((number, ""))
            last = (number, column)
            text = token.string.lstrip("#").strip()
            prose.append((number, "" if NO_PROSE.match(text) else text.partition("# noqa")[0]))
    for paragraph in paragraphs(prose):
        yield from sentences(file, paragraph)


def module(file: Path) -> Iterator[Sentence]:
    """All sentences of a module of Python."""
    yield from comments(file)
    for docstring in docstrings(file):
        yield from docstring.sentences
