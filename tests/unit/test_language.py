# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prose is plain: the rules of CONTRIBUTING.md, "Language", as far as a program can tell.

The rules hold for documentation, manual pages, docstrings and comments. A message of the program
is no prose, and neither is the comment of a test.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import prose
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]

LONGEST = 30
"""The most words of a sentence. CONTRIBUTING.md asks for 20."""

FIRST_WORDS = {
    "what", "whatever", "which", "who", "whom", "whose", "whoever", "whichever",
    "nobody", "somebody", "nothing", "one", "those", "such",
}  # fmt: skip
"""Words that no sentence begins with: a sentence begins with the thing that it is about."""

BANNED = re.compile(
    r"\b(?:(?:no|some|any)body|whoever|whom|whose|whatever|that one|meanwhile|mend(?:s|ed|ing)?"
    r"|stand-ins?|cut flows|guests' own|behind its back|in vain|all the same|be it)\b",
    re.IGNORECASE,
)
"""Filler, and invented words for things that have a name in the field."""

IMPERATIVE = re.compile(
    r"True (?:if|for)\b|(?:"
    r"accept|add|adopt|allow|announce|answer|append|apply|ask|assign|attach|"
    r"attend|begin|bring|build|call|carry|check|choose|claim|clear|close|collect|"
    r"compare|compute|configure|confirm|connect|convert|copy|count|create|cut|"
    r"decide|declare|define|delete|describe|detach|do|draw|drop|empty|end|ensure|"
    r"examine|exit|fail|fill|find|finish|fix|flush|follow|forget|format|free|"
    r"give|group|handle|have|hear|hold|ignore|insert|install|keep|kill|lead|"
    r"lease|leave|let|limit|list|listen|load|lock|log|look|make|map|mark|"
    r"measure|move|name|note|open|order|parse|pass|poll|postpone|prepare|print|"
    r"probe|prove|publish|put|raise|read|rebuild|receive|recompute|reconcile|"
    r"record|refresh|refuse|release|reload|relocate|remember|remove|rename|renew|"
    r"repair|replace|replay|report|request|reserve|resolve|restart|restore|retry|"
    r"return|run|salvage|save|say|see|select|send|serve|set|show|shut|skip|"
    r"sort|split|start|stop|store|suppress|suspect|switch|take|tell|try|turn|"
    r"undo|unlock|update|use|wait|wake|warn|watch|withdraw|wrap|write|yield"
    r")\b",
    re.IGNORECASE,
)
"""How the docstring of a function begins."""


def broken_rules(sentence: prose.Sentence) -> Iterator[str]:
    """The rules that a sentence breaks."""
    words = sentence.words
    if len(words) > LONGEST:
        yield f"{len(words)} words, at most {LONGEST}"
    if len(words) > 1 and words[0].strip("\"'(*,.:;").lower() in FIRST_WORDS:
        yield f'begins with "{words[0]}"'
    for word in BANNED.findall(sentence.text):
        yield f'"{word}"'


def findings(sentences: Iterable[prose.Sentence]) -> list[str]:
    return [
        f"{name(sentence.file)}:{sentence.line}: {rule}: {sentence.text}"
        for sentence in sentences
        for rule in broken_rules(sentence)
    ]


def is_imperative(docstring: prose.Docstring) -> bool:
    return bool(IMPERATIVE.match(docstring.text.strip()))


def missing_imperatives(file: Path) -> list[str]:
    return [
        f"{name(file)}:{docstring.line}: begins with no imperative: "
        + docstring.text.strip().splitlines()[0]
        for docstring in prose.docstrings(file)
        if docstring.kind == "function" and not is_imperative(docstring)
    ]


def files(*places: str) -> list[Path]:
    """Files of the checkout by patterns, without what Python compiled."""
    found = {file for place in places for file in CHECKOUT.glob(place) if file.is_file()}
    return sorted(file for file in found if file.suffix != ".pyc")


def name(file: Path) -> str:
    return str(file.relative_to(CHECKOUT))


PAGES = files("*.md", "docs/**/*.md")
MANUAL = files("man/*")
SCHEMAS = files("xml/*.xml", "xml/*.rng")
PROGRAMS = files("contrib/**/*.py", "bench/*.py")
SCRIPTS = files("hooks/*", "contrib/**/*", "xml/*.toml", "Makefile", "bench/run", "tests/**/run")
OTHERS = [file for file in SCRIPTS if file not in PROGRAMS]
MODULES = [*PROGRAMS, *files("libvirt_natns/**/*.py")]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_documentation(page: Path) -> None:
    broken = findings(prose.markdown(page))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("page", MANUAL, ids=name)
def test_manual_pages(page: Path) -> None:
    broken = findings(prose.manual(page))
    assert not broken, "\n".join(broken)


def test_comments_of_scripts_units_and_settings() -> None:
    broken = [finding for file in OTHERS for finding in findings(prose.hash_comments(file))]
    assert not broken, "\n".join(broken)


def test_comments_of_schemas_and_examples() -> None:
    broken = [finding for file in SCHEMAS for finding in findings(prose.xml_comments(file))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_docstrings_and_comments(module: Path) -> None:
    broken = [*findings(prose.module(module)), *missing_imperatives(module)]
    assert not broken, "\n".join(broken)
