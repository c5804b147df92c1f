# SPDX-License-Identifier: LGPL-2.1-or-later
"""Colours on a terminal, and plain text everywhere else."""

import io
import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO, cast

import pytest

from libvirt_natns.cli import colour, commands, doctor, forward_list
from libvirt_natns.cli import status as status_command
from libvirt_natns.cli.doctor import Diagnosis
from libvirt_natns.cli.forward_list import ForwardRow
from libvirt_natns.cli.status_report import Status, StatusReport, text

CHECKOUT = Path(__file__).resolve().parents[3]
GREEN, YELLOW, RED, END = "\033[32m", "\033[33m", "\033[31m", "\033[0m"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(command: str, *printed: str) -> str:
    """What a terminal gets of a command that prints these texts."""
    brush = colour.brush_of(command)
    assert brush
    terminal = Terminal()
    for each in printed:
        print(each, file=cast("TextIO", colour.Painted(terminal, brush)), flush=True)
    return terminal.getvalue()


def plain(painted: str) -> str:
    for code in (GREEN, YELLOW, RED, END):
        painted = painted.replace(code, "")
    return painted


def status(name: str, health: str, **more: object) -> Status:
    known = {
        "uuid": "", "state": "up", "namespace": f"nat-{name}", "bridge": "virbr10",
        "subnets": ("10.0.0.0/24",), "upstream": "host", "address": "198.19.252.2", "leases": 1,
        "differences": (),
    }  # fmt: skip
    return Status(network=name, health=health, **{**known, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("health", "painted"),
    [
        ("ok", f"{GREEN}ok{END}"),
        ("damaged (1)", f"{RED}damaged (1){END}"),
        ("no way out", f"{RED}no way out{END}"),
        ("stopped by FORWARD (nft)", f"{RED}stopped by FORWARD (nft){END}"),
        ("may be stopped by FORWARD", f"{YELLOW}may be stopped by FORWARD{END}"),
        ("isolated (enabled=no)", f"{YELLOW}isolated (enabled=no){END}"),
        ("down", "down"),
    ],
)
def test_health(health: str, painted: str) -> None:
    # A name that is a health word is a name.
    report = StatusReport([status("ok", health), status("damaged", "down")], [], [], [])
    lines = shown("status", text(report)).splitlines()
    assert lines[1] == text(report).splitlines()[1].removesuffix(health) + painted
    assert "\033" not in lines[0] + lines[2]


def test_marks_below_a_table() -> None:
    report = StatusReport(
        [status("a", "damaged (1)", differences=("namespace nat-a is missing",))],
        [], [], [("web", "is published still")], notes=("a chain of others  drops all",),
    )  # fmt: skip
    written = shown("status", text(report))
    assert f"\n  {RED}!{END} namespace nat-a is missing\n" in written
    assert f"\n  {RED}!{END} web: is published still\n" in written
    assert f"\n  {YELLOW}#{END} a chain of others  drops all\n" in written
    assert plain(written) == text(report) + "\n"


def test_forwards() -> None:
    row = ForwardRow(
        "ok", "", "published", "tcp", None, 80, 80, "10.0.0.5", 80, 80, (), (), "published"
    )
    listed = forward_list.text([row])
    heading, line = shown("forward", listed).splitlines()
    assert heading == listed.splitlines()[0]
    assert line == listed.splitlines()[1].removesuffix("published") + f"{GREEN}published{END}"
    assert shown("forward", forward_list.NONE) == f"{forward_list.NONE}\n"


def test_verdicts_of_doctor() -> None:
    said = [Diagnosis("hooks", "ok", "broken"), Diagnosis("code", "warn", "ok"),
            Diagnosis("libvirt", "broken", "no answer")]  # fmt: skip
    assert shown("doctor", doctor.text(said)).splitlines() == [
        f"{GREEN}ok{END}      hooks: broken",
        f"{YELLOW}warn{END}    code: ok",
        f"{RED}broken{END}  libvirt: no answer",
    ]


@pytest.mark.parametrize(
    ("command", "printed", "painted"),
    [
        ("check", "a: namespace nat-a is missing", f"{RED}a{END}: namespace nat-a is missing"),
        ("check", "note: a chain: drops", f"{YELLOW}note{END}: a chain: drops"),
        ("plan", "network a is not touched: has no address",
         f"network a {YELLOW}is not touched{END}: has no address"),
        ("plan", "namespace nat-a", "namespace nat-a"),
        ("validate", "x.xml: network a: valid, and gets a router",
         f"x.xml: network a: {GREEN}valid{END}, and gets a router"),
        ("validate", "x.xml: wrong network: line 9", f"x.xml: {RED}wrong{END} network: line 9"),
        ("validate", "x.xml: cannot be read: it is a directory",
         "x.xml: cannot be read: it is a directory"),
    ],
)  # fmt: skip
def test_verdicts(command: str, printed: str, painted: str) -> None:
    assert shown(command, printed) == f"{painted}\n"


def test_a_line_in_pieces() -> None:
    brush = colour.brush_of("doctor")
    assert brush
    terminal = Terminal()
    stream = colour.Painted(terminal, brush)
    for piece in ("bro", "ken  a: b\nok      c", ": d"):
        stream.write(piece)
    assert terminal.getvalue() == f"{RED}broken{END}  a: b\n"
    stream.flush()
    assert terminal.getvalue() == f"{RED}broken{END}  a: b\n{GREEN}ok{END}      c: d"


@pytest.mark.parametrize("command", ["router", "metrics", "exec", "serve", "diagram"])
def test_commands_without_colours(command: str) -> None:
    assert colour.brush_of(command) is None


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "linux", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_terminals(environment: Mapping[str, str], wanted: bool) -> None:
    assert colour.is_wanted(Terminal(), environment) == wanted
    assert not colour.is_wanted(io.StringIO(), environment)


@pytest.mark.parametrize(("option", "painted"), [([], True), (["--json"], False)])
def test_text_for_programs_has_no_colours(
    option: list[str], painted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    report = StatusReport([status("a", "ok")], [], [], [])
    monkeypatch.setattr(status_command, "run", lambda _: print(text(report)) or 0)
    assert commands.main(["status", *option]) == 0
    assert (GREEN in terminal.getvalue()) == painted


COMMAND = [sys.executable, "-m", "libvirt_natns", "validate", "xml/twin-a.xml"]


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False),
     ({"TERM": "dumb"}, False)],
)  # fmt: skip
def test_a_real_terminal(environment: Mapping[str, str], coloured: bool) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(COMMAND, stdout=theirs, cwd=CHECKOUT, env=dict(environment), check=True)
    written = os.read(ours, 1000).decode()
    os.close(theirs)
    os.close(ours)
    assert (GREEN in written) == coloured
    assert "\033" not in plain(written)
    assert "network twin-a: valid, and" in plain(written)


def test_a_pipe() -> None:
    done = subprocess.run(
        COMMAND, capture_output=True, cwd=CHECKOUT, env={"TERM": "xterm"}, check=True
    )
    assert b"\033" not in done.stdout
    assert b"valid" in done.stdout
