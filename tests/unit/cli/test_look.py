# SPDX-License-Identifier: LGPL-2.1-or-later
"""The look server's parts: who may run which command, slow readers, and changes of states."""

import argparse
import json
import os
import random
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from libvirt_natns.cli import (
    commands,
    look_jobs,
    look_link,
    look_rules,
    state_changes,
    status_details,
    status_report,
    watch_lines,
)
from libvirt_natns.cli.forward_list import ForwardRow
from libvirt_natns.cli.look_jobs import JobOutcome
from libvirt_natns.cli.look_link import LookLink
from libvirt_natns.cli.look_rules import Peer
from libvirt_natns.cli.look_stream import Stream
from libvirt_natns.cli.state_changes import StateChange
from libvirt_natns.cli.status_report import StatusReport
from libvirt_natns.daemons.lease_file import GuestLease
from libvirt_natns.engine.reconcile.obstacles import Obstacle

SCHEMA = json.loads(
    (Path(__file__).resolve().parents[3] / "xml/natns-json.schema.json").read_text()
)["$defs"]

# -- commands for members ------------------------------------------------------


def every_command(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Each command with its parser."""
    below = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    if not below:
        yield words, parser
    for choices in below:
        for name, inner in choices.items():
            yield from every_command(inner, (*words, name))


def test_no_other_command_is_listed() -> None:
    known = dict(every_command(commands.make_parser()))
    assert set(look_rules.LOOKS) <= set(known)
    for words in known.keys() - set(look_rules.LOOKS):
        assert look_rules.command_of(words) is None


REQUIRED: dict[tuple[str, ...], tuple[str, ...]] = {("plan",): ("a",)}


@pytest.mark.parametrize("command", look_rules.LOOKS, ids=" ".join)
def test_every_option_is_listed_or_refused(command: tuple[str, ...]) -> None:
    """An option that a command gets some day is closed to members until it is listed."""
    parser = commands.make_parser()
    own = dict(every_command(parser))[command]
    words = (*command, *REQUIRED.get(command, ()))
    assert not look_rules.refused(words, parser.parse_args(words), parser)
    for action in own._actions:
        if not action.option_strings or action.dest == "help":
            continue
        given = (*words, action.option_strings[0], *(["x"] if action.nargs is None else []))
        try:
            options = parser.parse_args(given)
        except SystemExit:
            continue
        listed = action.dest in look_rules.LOOKS[command]
        assert look_rules.refused(given, options, parser) != listed


def test_a_new_option_is_refused() -> None:
    parser = commands.make_parser()
    options = parser.parse_args(["diagram"])
    options.output = "/etc/passwd"
    assert look_rules.refused(["diagram"], options, parser)


@pytest.mark.skipif(os.geteuid() != 0, reason="the other end is to be root, or a member")
def test_the_peer_is_who_has_connected() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert look_rules.peer(one, None) == Peer(0)


# -- slow readers --------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[LookLink, socket.socket]]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    ours.setblocking(False)
    with ours, theirs:
        yield LookLink(ours, Peer(1000)), theirs


def everything(link: LookLink, reader: socket.socket) -> bytes:
    """Read what waits, as a reader that has woken up."""
    reader.settimeout(0.2)
    octets = b""
    while True:
        assert link.flush()
        try:
            octets += reader.recv(1 << 20)
        except TimeoutError:
            return octets


def test_a_reader_that_lags_gets_the_whole_state(pair: tuple[LookLink, socket.socket]) -> None:
    link, reader = pair
    line = b"x" * 10_000 + b"\n"
    for _ in range(1000):
        link.stream(line)
        link.flush()
    assert link.lags
    octets = everything(link, reader)
    # Whole lines, and no more of them than wait at most.
    assert octets.startswith(look_link.GREETING)
    lines = octets.removeprefix(look_link.GREETING).splitlines(keepends=True)
    assert set(lines) == {line}
    assert len(octets) < look_link.QUEUE + (1 << 19)
    link.catch_up(b"state\n")
    link.stream(b"change\n")
    assert not link.lags
    assert everything(link, reader) == b"state\nchange\n"


def test_a_line_longer_than_the_queue_is_sent(pair: tuple[LookLink, socket.socket]) -> None:
    link, reader = pair
    assert everything(link, reader) == look_link.GREETING
    state = b"x" * (2 * look_link.QUEUE) + b"\n"
    link.stream(state)
    assert everything(link, reader) == state


# -- the stream ----------------------------------------------------------------


class Shown:
    """A watcher that keeps its lines."""

    def __init__(self) -> None:
        ours, self.reader = socket.socketpair()
        ours.setblocking(False)
        self.link = LookLink(ours, Peer(0))

    def lines(self) -> list[dict[str, Any]]:
        octets = everything(self.link, self.reader)
        return [json.loads(line) for line in octets.splitlines() if line.startswith(b"{")]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoJob:
        descriptor = -1

        def kill(self) -> None:
            pass

    monkeypatch.setattr("libvirt_natns.cli.look_stream.start", lambda _: NoJob())


def looked(stream: Stream, outcome: JobOutcome) -> None:
    stream.look()
    stream.looked(outcome)


def good(**state: object) -> JobOutcome:
    return JobOutcome(0, json.dumps({"version": 1, **state}), "")


def test_no_look_without_watchers(job: None) -> None:
    stream, shown = Stream(), Shown()
    stream.note()
    assert stream.due is None
    stream.add(shown.link)
    assert stream.due is not None
    stream.remove(shown.link)
    assert stream.due is None


def test_states_changes_and_errors(job: None) -> None:
    stream, first, second = Stream(), Shown(), Shown()
    stream.add(first.link)
    looked(stream, good(host=[]))
    looked(stream, good(host=[]))
    stream.add(second.link)
    looked(stream, good(host=["x"]))
    for _ in range(2):
        looked(stream, JobOutcome(1, "", "virt-natns: broken\n"))
    looked(stream, good(host=["x"]))
    events = [(line["event"], line["serial"]) for line in first.lines()]
    assert events == [("state", 1), ("change", 2), ("error", 3), ("state", 4)]
    assert [line["event"] for line in second.lines()] == ["state", "change", "error", "state"]


def test_a_look_for_a_watcher_that_has_gone_tells_nothing(job: None) -> None:
    stream, first, second = Stream(), Shown(), Shown()
    stream.add(first.link)
    stream.look()
    stream.remove(first.link)
    stream.add(second.link)
    stream.looked(JobOutcome(-9, "", ""))
    assert second.lines() == []
    looked(stream, good(host=[]))
    assert [line["event"] for line in second.lines()] == ["state"]


# -- changes -------------------------------------------------------------------


def some_state(chance: random.Random) -> dict[str, Any]:
    """A state with any entries."""
    state: dict[str, Any] = {"host": chance.sample("abc", chance.randrange(3))}
    for part, key in state_changes.KEYS.items():
        order = state_changes.ORDER[part]
        state[part] = [
            {key: name, order: name, "value": chance.randrange(2)}
            for name in sorted(chance.sample("abcdef", chance.randrange(6)))
        ]
    if chance.randrange(4) == 0:
        state["domains"] = None
    return state


@pytest.mark.parametrize("seed", range(200))
def test_a_change_leads_from_one_state_to_the_other(seed: int) -> None:
    chance = random.Random(seed)
    old, new = some_state(chance), some_state(chance)
    change = state_changes.between(old, new)
    assert (change is None) == (old == new)
    if change is not None:
        told = StateChange(*json.loads(json.dumps([change.set, change.removed])))
        assert state_changes.applied(old, told) == new


def test_time_alone_is_no_change() -> None:
    old = {"networks": [{"uuid": "1", "network": "a", "lease_seconds": 10}]}
    new = {"networks": [{"uuid": "1", "network": "a", "lease_seconds": 9}]}
    assert state_changes.between(old, new) is None


# -- forms ---------------------------------------------------------------------

FORMS = {
    "network": status_report.Status,
    "forward": ForwardRow,
    "lease": GuestLease,
    "obstacle": Obstacle,
    "domain": status_details.GuestEntry,
    "upstream": status_details.UpstreamEntry,
    "libvirt_network": status_details.NetworkEntry,
}


@pytest.mark.parametrize("name", FORMS)
def test_the_schema_has_all_keys(name: str) -> None:
    known = [field.name for field in fields(FORMS[name])]
    assert sorted(SCHEMA[name]["properties"]) == sorted(known)
    assert sorted(SCHEMA[name]["required"]) == sorted(known)


def test_a_report_comes_back_from_its_object() -> None:
    row = ForwardRow(
        "web", "1", "a", "tcp", None, 1, 1, "10.0.0.5", 2, 2, ("10.0.0.0/8",), (), "published"
    )
    status = status_report.Status(
        "a", "1", "up", "nat-a", "virbr10", ("10.0.0.0/24",), "host", None, 1, "no way out", ("x",),
        (row,), obstacles=(Obstacle("no way out", "why"),),
        dhcp_leases=(GuestLease("52:54:00:00:00:05", "10.0.0.5", None, None, "web"),),
    )  # fmt: skip
    report = StatusReport(
        [status], ["h"], [("b", "m")], [("web", "g")], None, (("c", "w"),), ("s",), ("n",)
    )
    told = json.loads(status_report.as_json(report))
    assert status_report.report_of(told) == report
    assert status_report.report_of(told, "b").statuses == []
    assert status_report.text(status_report.report_of(told)) == status_report.text(report)


def test_lines_for_people_name_what_came_and_went() -> None:
    network: dict[str, Any] = {
        "network": "a", "uuid": "1", "state": "up", "health": "ok", "address": None,
        "dhcp_leases": [],
    }  # fmt: skip
    row = {
        "guest": "web", "network": "a", "proto": "tcp", "address": None, "first": 1,
        "target": None, "state": "off",
    }  # fmt: skip
    before: dict[str, Any] = {"networks": [network], "host": ["x"], "forwards": []}
    after: dict[str, Any] = {
        "networks": [], "host": [], "forwards": [row], "missed": [
            {"network": "b", "difference": "has no router"}
        ],
    }  # fmt: skip
    lines = list(watch_lines.of(before, after, {"event": "change", "time": 0}))
    assert [line.partition(" ")[2] for line in lines] == [
        "network a: gone",
        "forward of web: tcp *:1 -> its DHCP address, off",
        "host: x: no more",
        "b: has no router",
    ]


def test_a_job_has_its_output_and_its_end() -> None:
    def body() -> int:
        print("out", flush=True)
        os.write(2, b"err")
        return 3

    job = look_jobs.start(body)
    select.select([job.descriptor], [], [], 30)
    assert job.finish() == JobOutcome(3, "out\n", "err")


def test_a_job_that_fails_is_no_second_server() -> None:
    def body() -> int:
        raise ZeroDivisionError

    job = look_jobs.start(body)
    select.select([job.descriptor], [], [], 30)
    outcome = job.finish()
    assert (outcome.status, outcome.out) == (look_jobs.FAILED, "")
    assert outcome.err.endswith("ZeroDivisionError\n")


def test_a_killed_job_leaves_no_program() -> None:
    """The programs that a command has started end with it."""

    def body() -> int:
        child = subprocess.Popen(["sleep", "600"])
        print(child.pid, flush=True)
        return child.wait()

    job = look_jobs.start(body)
    select.select([job.descriptor], [], [], 0.5)
    job.kill()
    select.select([job.descriptor], [], [], 30)
    outcome = job.finish()
    assert outcome.status == -signal.SIGKILL
    pid = outcome.out.strip()
    assert not pid or state_of(pid) in ("Z", "")


def state_of(pid: str) -> str:
    """The state of a process; "" for none."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return ""
