# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documentation says what the code does: keys, commands, words of the XML, links.

Code blocks in Markdown say in their first line what they are: ``toml`` is a whole
configuration, ``xml`` a whole document, ``xml network`` and ``xml domain`` what
stands inside such a one, ``xsl`` a style sheet for domains, ``console`` commands as
root (``# ``) with their output.
"""

import argparse
import ast
import dataclasses
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from libvirt_natns import __version__, hook, names
from libvirt_natns.cli import commands, forward_list, forward_spec, router_status
from libvirt_natns.documents import config, config_upstream, libvirt_xml, xml_schema_errors
from libvirt_natns.engine import events
from libvirt_natns.engine.engine import Engine
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import DhcpUpstream, RouterUpstream
from libvirt_natns.service import client, log, metrics
from libvirt_natns.state.store import Store

CHECKOUT = Path(__file__).resolve().parents[2]
DOCS = CHECKOUT / "docs"
REFERENCE = DOCS / "reference"
MAN = CHECKOUT / "man"

PAGES = [CHECKOUT / "README.md", CHECKOUT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
MANUAL = sorted(MAN.iterdir())
LANGUAGES = {
    "", "toml", "xml", "xml network", "xml domain", "xsl", "console", "console outside", "nft",
}  # fmt: skip

FORBIDDEN = (
    r"simply", r"easily", r"seamless\w*", r"powerful", r"blazing\w*", r"effortless\w*", r"robust",
    r"state[- ]of[- ]the[- ]art", r"cutting[- ]edge", r"next[- ]generation", r"leverage\w*",
    r"TODO", r"FIXME", r"XXX", r"TBD", r"lorem",
)  # fmt: skip
"""What has no place in a text that is to be plain and finished."""


@dataclass(frozen=True)
class Block:
    """A code block: its page, the line where it begins, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(CHECKOUT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    found = re.finditer(
        r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
        page.read_text(),
        re.M | re.S,
    )
    for match in found:
        indent = match["indent"]
        text = re.sub(f"(?m)^{indent}", "", match["text"])
        line = page.read_text()[: match.start()].count("\n") + 1
        yield Block(page, line, match["language"], text)


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text())


def sections(page: Path) -> dict[str, str]:
    """The text below each heading, by the heading."""
    parts = re.split(r"(?m)^#+ (.*)$", prose(page))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> dict[str, list[str]]:
    """Rows of the tables in a text by their first cell's code, without it."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and re.fullmatch(r"`[^`]+`", cells[0]):
            found[cells[0].strip("`")] = cells[1:]
    return found


# The configuration


TOP_LEVEL = rows(sections(REFERENCE / "configuration.md")["Top level"])
OF_UPSTREAMS = rows(sections(REFERENCE / "configuration.md")["An upstream"])
UPSTREAM_KEYS = {key for keys in config_upstream.KEYS_OF_KIND.values() for key in keys}


def test_reference_has_the_configurations_keys() -> None:
    assert set(TOP_LEVEL) == set(config.KEYS)
    assert set(OF_UPSTREAMS) == UPSTREAM_KEYS


def test_reference_has_the_kinds_of_each_key() -> None:
    for key, (_, _, kinds, _) in OF_UPSTREAMS.items():
        found = {kind for kind, keys in config_upstream.KEYS_OF_KIND.items() if key in keys}
        assert kinds == (
            "all" if found == set(config_upstream.KEYS_OF_KIND) else ", ".join(sorted(found))
        )


def test_reference_has_the_defaults() -> None:
    top = Config()
    upstreams = (DhcpUpstream(name="x", bridge=""), RouterUpstream(name="x", nic=""))
    for key in ("scope", "firewall", "upstream"):
        assert TOP_LEVEL[key][1] == f'`"{getattr(top, key)}"`'
    assert TOP_LEVEL["auto_ports"][1] == '`"{}-{}"`'.format(*top.auto_ports)
    for key, (_, default, _, _) in OF_UPSTREAMS.items():
        value = next(getattr(each, key) for each in upstreams if hasattr(each, key))
        if key in ("probe", "dhcp_timeout"):
            assert default == f"`{value:g}`"
        elif key == "max_flows":
            assert default == f"`{value}`"
        elif key in ("dhcp", "attach", "link_local") or key == "host_subnet":
            assert default == f'`"{value}"`'
        elif key == "host_ports":
            listed = ", ".join(f'"{each.proto}/{each.first}"' for each in value)
            assert default == f"`[{listed}]`"
        elif key != "kind":
            assert not value
            assert default in ("", "`[]`")


def test_reference_has_the_transit_subnets() -> None:
    from libvirt_natns.upstream import transit

    text = (REFERENCE / "configuration.md").read_text()
    for subnet in transit.CANDIDATES:
        assert str(subnet) in text


def test_manual_page_has_the_configurations_keys() -> None:
    text = (MAN / "libvirt-natns-config.5").read_text()
    items = re.findall(r"(?m)^\.It Ic (.*)$", text)
    keys = [key for item in items for key in item.split(" , ")]
    assert sorted(keys) == sorted({*config.KEYS, *UPSTREAM_KEYS})


# The commands


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    found: list[Any] = [
        action.choices for action in commands.make_parser()._actions if action.choices
    ]
    return dict(found[0])


def below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands below a command."""
    found = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return dict(found[0]) if found else {}


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a command and of those below it, those that all have apart."""
    own = {option for action in parser._actions for option in action.option_strings}
    return own.union(*map(options, below(parser).values())) - {"-h", "--help"}


def test_reference_has_the_commands() -> None:
    commands = sections(REFERENCE / "commands.md")
    assert set(commands) == {"Commands", *parsers()}
    for name, parser in parsers().items():
        described = {row for row in rows(commands[name]) if row.startswith("-")}
        assert described == options(parser)
    assert set(rows(commands["Commands"])) == {"--help", "--version"}


def test_reference_shows_the_usage() -> None:
    commands = sections(REFERENCE / "commands.md")
    for name, parser in parsers().items():
        usages = re.findall(r"^`virt-natns (.*)`$", commands[name], re.M)
        wanted = [[name, inner] for inner in below(parser)] or [[name]]
        assert [usage.split()[: len(wanted[0])] for usage in usages] == wanted
        for option in options(parser):
            assert any(option in usage for usage in usages), option


def test_manual_page_has_the_commands() -> None:
    text = (MAN / "virt-natns.8").read_text()
    synopsis, _, description = text.partition(".Sh DESCRIPTION")
    assert set(re.findall(r"(?m)^\.It Cm (\w+)", description)) == set(parsers())
    known = set(parsers()).union(*map(below, parsers().values()))
    assert set(re.findall(r"(?m)^\.Cm (\w+)$", synopsis)) | {"install"} == known
    wanted = set().union(*map(options, parsers().values()), {"--help", "--version"})
    listed = re.findall(r"(?m)^\.It Fl (.*)$", description)
    assert {f"-{word}" for item in listed for word in re.findall(r"(?<!\w)-[\w-]+", item)} == wanted


def test_status_columns_and_fields() -> None:
    from libvirt_natns.cli import status_report

    text = sections(REFERENCE / "commands.md")["status"]
    assert re.findall(r"(?m)^\| ([A-Z]+) ", text) == list(status_report.HEADINGS)
    for field in (field.name for field in dataclasses.fields(status_report.Status)):
        assert f"`{field}`" in text


def test_fields_of_a_router() -> None:
    text = sections(REFERENCE / "commands.md")["router"]
    source = Path(router_status.__file__).read_text()
    fields = set(re.findall(r'(?m)^ +"(\w+)": [^"]*$', source)) - set(router_status.MEANING)
    assert len(fields) > 15
    assert not {field for field in fields if f"`{field}`" not in text}


def test_forwards_as_they_are_typed() -> None:
    text = sections(REFERENCE / "commands.md")["forward"]
    typed = [row for row in rows(text) if not row.startswith("-")]
    assert len(typed) > 5
    for spec in typed:
        assert forward_spec.parse_new(spec)
    with pytest.raises(ValueError, match="is not "):
        forward_spec.parse_new("2222/icmp")


def test_forward_columns_and_fields() -> None:
    text = sections(REFERENCE / "commands.md")["forward"]
    assert re.findall(r"(?m)^\| ([A-Z]+) ", text)[1:] == list(forward_list.HEADINGS)
    for field in (field.name for field in dataclasses.fields(forward_list.ForwardRow)):
        assert f"`{field}`" in text


# The service


SERVICE = REFERENCE / "service.md"


def test_reference_has_the_metrics(tmp_path: Path) -> None:
    counted = metrics.Metrics()
    counted.failed("heal")
    store = Store(tmp_path)
    told = counted.text(Engine(Config(), store, Kernel()))
    store.close()
    listed = rows(sections(SERVICE)["Metrics"])
    assert set(listed) == set(re.findall(r"(?m)^# TYPE (\S+) ", told))


def literals(pattern: str) -> set[str]:
    """What a pattern's group is in any module."""
    texts = [module.read_text() for module in (CHECKOUT / "libvirt_natns").rglob("*.py")]
    return {match for text in texts for match in re.findall(pattern, text)}


def test_reference_has_the_values_of_labels() -> None:
    listed = rows(sections(SERVICE)["Metrics"])
    for name, pattern in (
        ("libvirt_natns_change_duration_seconds", r'context\.changing\("([^"]+)"'),
        ("libvirt_natns_failures_total", r'(?:metrics\.failed|_on_failure)\("([^"]+)"'),
    ):
        found = literals(pattern)
        assert len(found) > 2
        assert set(re.findall(r"`([^`]+)`", listed[name][1])) == found


def logged_events() -> set[str]:
    """The events that any module writes into the log, those named by a variable apart."""
    found = set()
    for module in (CHECKOUT / "libvirt_natns").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("say", "say_error", "_line")
                and isinstance(node.args[1], ast.Constant)
            ):
                found.add(str(node.args[1].value))
    return found


def changing_verbs() -> set[str]:
    """The verbs of which those who look on are told."""
    texts = [module.read_text() for module in (CHECKOUT / "libvirt_natns").rglob("*.py")]
    told = r'(?:context\.changing\(|note\(self\.observer, )"([^"]+)"'
    return {verb for text in texts for verb in re.findall(told, text)}


def test_reference_has_the_log() -> None:
    listed = rows(sections(SERVICE)["Log"])
    assert set(listed) == logged_events() | changing_verbs()
    for event, (level, _) in listed.items():
        assert level in log.PRIORITIES, event
    text = " ".join(map(str, listed.values()))
    examples = re.findall(r"`(level=[^`]*)`", text)
    for example in examples:
        assert re.fullmatch(
            r'level=\w+ event=(\w[\w-]*|"[\w ]+")( \w+=([^" =]+|"[^"]*"))*', example
        )
    told = {match[1].strip('"') for each in examples if (match := re.search(LOGGED, each))}
    assert told == set(listed)


LOGGED = r'event=("[^"]*"|\S+)'


def test_reference_has_the_services_limits() -> None:
    text = sections(SERVICE)
    assert f"`{client.SOCKET}`" in text["The socket"]
    for seconds in (client.GREETING_LIMIT, client.LIMIT, *client.LIMITS.values()):
        assert re.search(rf"\| +{seconds:.0f} +\|", text["The socket"])
    for event, seconds in client.LIMITS.items():
        assert re.search(rf"`{event}`.*\| +{seconds:.0f} +\|", text["The socket"]), event
    assert client.GREETING.decode().strip() in SERVICE.read_text()


def test_reference_has_the_kinds_of_requests() -> None:
    text = sections(SERVICE)
    metric = rows(text["Metrics"])["libvirt_natns_hook_duration_seconds"]
    for kind in (*events.TABLES, "question"):
        assert f"`{kind}`" in text["The socket"]
        assert f"`{kind}`" in str(metric)


def commands_of(block: Block) -> list[str]:
    return [line[2:] for line in block.text.splitlines() if line.startswith("# ")]


@pytest.mark.parametrize("block", [*of("console"), *of("console outside")], ids=str)
def test_console_commands_are_right(block: Block) -> None:
    for line in commands_of(block):
        words = shlex.split(line, comments=True)
        if words[0] == "virt-natns" and words[1] != "COMMAND" and words[1] != "--version":
            commands.make_parser().parse_args(words[1:])
        if "/" in words[0]:
            assert (CHECKOUT / words[0]).exists(), line


# The XML


def declared(
    grammar: xml_schema_errors.Grammar, pattern: etree._Element
) -> Iterator[tuple[str, str]]:
    """Each element that a pattern allows with each of its attributes; "" for itself."""
    for rule in grammar.rules(pattern):
        if rule.kind == "element":
            yield rule.name, ""
            for inner in grammar.rules(rule.pattern):
                if inner.kind == "attribute":
                    yield rule.name, inner.name
            yield from declared(grammar, rule.pattern)


def words_of_the_xml() -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for kind in ("network", "domain"):
        path = names.resource(f"xml/natns-{kind}.rng")
        grammar = xml_schema_errors.load(path, lambda file: etree.parse(str(file)).getroot())
        found |= set(declared(grammar, grammar.start))
    return found


def test_reference_has_the_words_of_the_xml() -> None:
    page = (REFERENCE / "metadata.md").read_text()
    text = sections(REFERENCE / "metadata.md")
    for element, attribute in words_of_the_xml():
        assert f"`{element}`" in page or element in text, element
        # A range of DHCP and one of ports have tables of their own.
        places = ("range", "portForward") if element == "range" else (element,)
        tables = [rows(text[place]) for place in places if place in text]
        assert not attribute or any(attribute in table for table in tables), (element, attribute)


def test_manual_page_has_the_words_of_the_xml() -> None:
    text = (MAN / "libvirt-natns-xml.7").read_text()
    described = text.partition(".Sh DESCRIPTION")[2].partition(".Sh EXAMPLES")[0]
    attributes = set(re.findall(r"(?m)^\.(?:It )?Ic (\w+)", described))
    attributes |= {
        word for line in re.findall(r"(?m)^\.It Ic (.*)$", described) for word in line.split(" , ")
    }
    for element, attribute in words_of_the_xml():
        assert f"<natns:{element}>" in described, element
        assert not attribute or attribute in attributes, (element, attribute)


# Names and events


@pytest.mark.parametrize(
    ("heading", "events"),
    [
        ("The hook network", hook.NETWORK_EVENTS),
        ("The hooks qemu and lxc", hook.GUEST_EVENTS),
    ],
)
def test_reference_has_the_events(heading: str, events: dict[tuple[str, str], bool]) -> None:
    table = rows(sections(REFERENCE / "hooks.md")[heading])
    assert {tuple(event.split()) for event in table} == set(events)
    for event, (_, _, refuses) in table.items():
        known = events[event.split()[0], event.split()[1]]
        assert refuses == ("yes" if known else "no")


def test_reference_has_the_names() -> None:
    text = (REFERENCE / "names.md").read_text()
    for name in (
        names.PRIVATE_PREFIX, names.UPSTREAM_PREFIX, names.UPSTREAM_LINK,
        names.namespace("NAME"), names.altname("private", "NAME"), names.namespace("job 1"),
        names.altname("upstream", "NAME"), names.transit_bridge("host"),
        names.CONFIG_FILE, names.STATE_DIRECTORY / "state.db", names.RUN_DIRECTORY / "host.json",
    ):  # fmt: skip
        assert f"`{name}`" in text, name
    assert f"{names.network_directory('UUID')}/" in text
    assert f"`{names.guest_directory('UUID')}`" in text


# Code blocks


def test_every_block_has_a_language_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} == LANGUAGES


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_toml(block: Block) -> None:
    config.parse(block.text, str(block))


@pytest.mark.parametrize("block", of("xml"), ids=str)
def test_xml(block: Block) -> None:
    if block.text.startswith("<domain"):
        assert libvirt_xml.parse_domain(block.text.encode(), str(block)).nat
    else:
        libvirt_xml.parse_any_network(block.text.encode(), str(block))


@pytest.mark.parametrize("block", of("xml network"), ids=str)
def test_xml_fragment_of_a_network(block: Block) -> None:
    ip = "" if "<natns:ip" in block.text else '<ip address="10.0.0.1" prefix="24"/>'
    whole = f"<network><name>x</name>{block.text}{ip}</network>"
    assert libvirt_xml.parse_any_network(whole.encode(), str(block)).nat


def whole_domain(text: str) -> bytes:
    """A guest with this in it."""
    nics = "".join(
        f"<interface type='network'><mac address='52:54:00:00:00:0{number}'/>"
        f"<source network='{network}'/></interface>"
        for number, network in ((5, "a"), (6, "b"))
    )
    return f"<domain><name>x</name>{text}<devices>{nics}</devices></domain>".encode()


@pytest.mark.parametrize("block", of("xml domain"), ids=str)
def test_xml_fragment_of_a_domain(block: Block) -> None:
    assert libvirt_xml.parse_domain(whole_domain(block.text), str(block)).nat


@pytest.mark.parametrize("block", of("xsl"), ids=str)
def test_style_sheet_gives_a_domain_its_metadata(block: Block) -> None:
    domain = etree.fromstring(whole_domain(""))
    changed = etree.XSLT(etree.fromstring(block.text))(domain)
    assert libvirt_xml.parse_domain(etree.tostring(changed), str(block)).nat


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_examples_of_the_manual(page: Path) -> None:
    examples = page.read_text().partition(".Sh EXAMPLES")[2]
    for text in re.findall(r"(?ms)^\.Bd.*?\n(.*?)^\.Ed$", examples):
        if text.startswith("<natns:nat"):
            text = f"<metadata>{text}</metadata>"
        if text.startswith("<domain"):
            assert libvirt_xml.parse_domain(text.encode(), page.name).nat
        elif text.startswith("<metadata"):
            ip = "" if "<natns:ip" in text else '<ip address="10.0.0.1" prefix="24"/>'
            libvirt_xml.parse_any_network(f"<network><name>x</name>{text}{ip}</network>".encode())
        elif page.name.endswith(".5"):
            config.parse(text, page.name)
        else:
            for line in text.splitlines():
                words = line.split()
                if words[0] == "virt-natns":
                    commands.make_parser().parse_args(words[1:])


# The comparison with others


COMPARISON = DOCS / "explanation" / "what-others-get-wrong.md"
TESTS = CHECKOUT / "tests" / "system"


def defined_tests(file: Path) -> set[str]:
    """The names of the tests in a file."""
    return {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_comparison_names_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", COMPARISON.read_text())
    assert len(named) > 20
    for file, test in named:
        assert test in defined_tests(TESTS / file), f"{file}::{test}"


def test_comparison_proves_each_claim() -> None:
    for heading, text in sections(COMPARISON).items():
        table = [line for line in text.splitlines() if line.startswith("| ")][1:]
        if heading.startswith("What "):
            continue
        assert table, heading
        for row in table:
            assert "](https://" in row, row
            assert "::test_" in row, row


# Text


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(CHECKOUT), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked() -> None:
    for start in (CHECKOUT / "README.md", DOCS / "README.md"):
        targets = re.findall(r"\]\(([^)\s#]+)\)", prose(start))
        linked = {(start.parent / target).resolve() for target in targets}
        assert {page for page in DOCS.rglob("*.md") if page.name != "README.md"} <= linked


@pytest.mark.parametrize("page", [*PAGES, *MANUAL], ids=lambda page: page.name)
def test_words(page: Path) -> None:
    text = page.read_text()
    found = re.findall(rf"\b(?:{'|'.join(FORBIDDEN)})\b", text, re.I)
    assert not found
    # Nobody else has these.
    assert not re.findall(r"(?<![\w/])/(?:home|tmp|work|root)/\w+", text)


@pytest.mark.parametrize("page", [*PAGES, *MANUAL], ids=lambda page: page.name)
def test_license_is_named(page: Path) -> None:
    if page.name != "README.md" or page.parent == DOCS:
        assert "SPDX-License-Identifier: LGPL-2.1-or-later" in page.read_text()[:120]
    else:
        assert "LGPL-2.1-or-later" in page.read_text()


def test_changelog_has_the_version() -> None:
    assert re.search(rf"(?m)^## .*\b{re.escape(__version__)}\b", PAGES[1].read_text())


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_manual_page_renders(page: Path) -> None:
    command = ["groff", "-ww", "-mandoc", "-Tutf8", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    assert "EXAMPLES" in re.sub(".\b", "", done.stdout)


def test_manual_page_bears_its_name() -> None:
    for page in MANUAL:
        title = re.search(r"(?m)^\.Dt (\S+) (\d)$", page.read_text())
        assert title
        assert page.name == f"{title[1].lower()}.{title[2]}"
