# SPDX-License-Identifier: LGPL-2.1-or-later
"""The long-lived nft: it does what a single nft does, and where it cannot, a single one does it."""

import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import run

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import nft, nft_child
from libvirt_natns.kernel import netns

SCRIPT = """\
table inet child {
\tset some {
\t\ttype inet_service . inet_proto
\t\telements = { 80 . tcp, 81 . udp }
\t}
\tchain forward {
\t\ttype filter hook forward priority filter; policy accept;
\t\tmeta l4proto { tcp, udp } counter accept comment "libvirt-natns"
\t}
}
"""


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    run("nft", "-f", "-", input="add table inet child\ndelete table inet child\n")
    yield
    run("nft", "-f", "-", input="add table inet child\ndelete table inet child\n")
    nft_child._silent.clear()


def child() -> nft_child.NftChild:
    return nft_child._children[os.getpid()]


def listed() -> str:
    return run("nft", "-s", "list", "ruleset").stdout


def test_a_script_is_loaded_as_a_single_nft_loads_it() -> None:
    nft.load(None, SCRIPT)
    by_the_child = listed()
    assert "counter accept comment" in by_the_child
    run("nft", "delete", "table", "inet", "child")
    done = nft.run(None, SCRIPT)
    assert done.returncode == 0
    assert listed() == by_the_child


def test_one_process_does_all() -> None:
    nft.load(None, SCRIPT)
    first = child().process.pid
    for _ in range(3):
        items = json.loads(nft.ruleset_json())["nftables"]
        assert [item for item in items if item.get("table", {}).get("name") == "child"]
    # Other programs' changes are seen.
    run("nft", "delete", "table", "inet", "child")
    assert '"child"' not in nft.ruleset_json()
    assert child().process.pid == first


def test_a_refused_script_changes_nothing_and_the_next_one_works() -> None:
    for wrong in ("add rule inet child nowhere accept\n", "add tabel inet child\n"):
        with pytest.raises(FirewallError, match="nft refused the rules") as refusal:
            nft.load(None, SCRIPT + wrong)
        assert "Error:" not in str(refusal.value)
        assert "child" not in listed()
    nft.load(None, SCRIPT)
    assert '"child"' in nft.ruleset_json()
    with pytest.raises(FirewallError, match="File exists"):
        nft.load(None, "create table inet child\n")
    assert '"child"' in nft.ruleset_json()


def test_a_long_script_is_loaded_by_a_single_nft() -> None:
    elements = ", ".join(f"{port} . tcp" for port in range(1000, 4000))
    script = f"{SCRIPT}add element inet child some {{ {elements} }}\n"
    assert len(script) > nft_child.LONGEST
    nft.load(None, script)
    assert "3999" in listed()
    # Its listing is longer than any pipe.
    nft.load(None, "add rule inet child forward accept\n" * 300)
    assert nft.ruleset_json().count('"accept"') >= 300


def test_the_longest_line_is_loaded_whole() -> None:
    rules = "add rule inet child forward tcp dport 1 accept; "
    count = (nft_child.LONGEST - len(nft_child.one_line(SCRIPT)) - 10) // len(rules)
    script = SCRIPT + rules * count
    assert len(nft_child.one_line(script)) > nft_child.LONGEST - 2 * len(rules)
    nft.load(None, SCRIPT)
    before = child().process.pid
    nft.load(None, rules * count)
    assert child().process.pid == before
    assert listed().count("dport 1 accept") == count


def test_a_child_that_was_killed_is_replaced() -> None:
    nft.load(None, SCRIPT)
    first = child().process.pid
    os.kill(first, signal.SIGKILL)
    assert '"child"' in nft.ruleset_json()
    nft.load(None, "delete table inet child\n")
    assert child().process.pid != first


def test_a_child_that_is_stuck_does_not_hold_others_up(monkeypatch: pytest.MonkeyPatch) -> None:
    nft.load(None, SCRIPT)
    stuck = child().process
    os.kill(stuck.pid, signal.SIGSTOP)
    monkeypatch.setattr(nft, "TIME_LIMIT", 1.0)
    assert '"child"' in nft.ruleset_json()
    assert stuck.returncode is not None


def test_another_namespace_is_not_asked_through_the_child() -> None:
    nft.load(None, SCRIPT)
    run("ip", "netns", "add", "child")
    try:
        with netns.entered("child"):
            assert '"child"' not in nft.ruleset_json()
            nft.load(None, "table inet inner { }\n")
            assert '"inner"' in nft.ruleset_json()
        assert '"inner"' not in nft.ruleset_json()
    finally:
        run("ip", "netns", "delete", "child")


def test_a_fork_has_a_child_of_its_own() -> None:
    nft.load(None, SCRIPT)
    pid = os.fork()
    if not pid:
        try:
            found = '"child"' in nft.ruleset_json()
            own = child().process.pid
            os._exit(0 if found and own else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert '"child"' in nft.ruleset_json()


def test_a_complaint_longer_than_a_pipe_is_read() -> None:
    """For each failing command nft shows the whole line, and a line of carets below."""
    script = "add rule inet child nowhere accept\n" * 300
    assert len(script) ** 2 / 35 > 1 << 20
    with pytest.raises(FirewallError, match="No such file or directory"):
        nft.load(None, script)
    nft.load(None, SCRIPT)
    assert '"child"' in nft.ruleset_json()


def test_a_complaint_beside_a_listing_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """nft complains of a rule that it cannot decode, lists all others, and succeeds."""
    nft.load(None, SCRIPT)
    talking = child().process.pid
    odd = "echo 'netlink: Error: Relational expression size mismatch' >&2"
    complain = (
        f'while read -r line; do case $line in "list ruleset"*) {odd};; esac; echo "$line"; done'
    )
    # nft's own standard error, in the place and at the moment of nft's complaint.
    program = ["bash", "-c", f"{complain} | exec /usr/sbin/nft -i -j -s -t"]
    nft_child._end()
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen(program, **options))
    monkeypatch.setattr(nft_child.NftChild, "is_fit", True)
    for _ in range(3):
        assert '"child"' in nft.ruleset_json()
        # The answers have not slipped by one.
        with pytest.raises(FirewallError, match="File exists"):
            nft.load(None, "create table inet child\n")
        nft.load(None, "add rule inet child forward accept\n")
    assert child().process.pid != talking
    nft_child._end()


def test_a_worn_out_child_and_an_upgraded_program_are_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nft.load(None, SCRIPT)
    first = child().process.pid
    monkeypatch.setattr(nft_child, "WORN_OUT", 1)
    assert '"child"' in nft.ruleset_json()
    second = child().process.pid
    assert second != first
    monkeypatch.undo()
    child().program = (1, 1)
    assert '"child"' in nft.ruleset_json()
    assert child().process.pid not in (first, second)
    assert not Path(f"/proc/{first}").exists()


def test_a_child_that_ends_amid_a_change_is_not_presumed_to_have_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same script twice may make a rule twice: the caller compares anew."""
    nft.load(None, SCRIPT)
    send = nft_child.NftChild.send

    def kill(self: nft_child.NftChild, line: bytes) -> None:
        send(self, line)
        self.process.kill()

    monkeypatch.setattr(nft_child.NftChild, "send", kill)
    with pytest.raises(FirewallError, match="amid a change"):
        nft.load(None, "add rule inet child forward accept\n" * 200)
    monkeypatch.undo()
    assert '"child"' in nft.ruleset_json()


def test_an_interrupted_answer_does_not_pass_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    nft.load(None, SCRIPT)
    monkeypatch.setattr(nft_child.NftChild, "answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        nft.ruleset_json()
    monkeypatch.undo()
    with pytest.raises(FirewallError, match="File exists"):
        nft.load(None, "create table inet child\n")


@pytest.mark.parametrize(
    "talk",
    [
        "echo 'Error: This build has no interactive mode' >&2; exit 1",
        "exit 0",
        'while read -r line; do echo "nft> $line"; done',
        # As where the kernel has no nftables: no answer to a listing.
        "while read -r line; do echo 'Error: cache initialization failed' >&2; done",
    ],
)
def test_an_nft_that_does_not_talk_is_started_for_each_command(
    talk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nft"
    program.write_text(
        f'#!/bin/sh\n[ "$1" != -i ] || {{ {talk}; exit; }}\nexec /usr/sbin/nft "$@"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(nft, "program", lambda: str(program))
    nft_child._end()
    nft.load(None, SCRIPT)
    assert '"child"' in nft.ruleset_json()
    assert not nft_child._children
    with pytest.raises(FirewallError, match="File exists"):
        nft.load(None, "create table inet child\n")


def test_the_child_ends_with_its_process(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    nft.load(None, SCRIPT)
    pid = os.fork()
    if not pid:
        try:
            nft.ruleset_json()
            note.write_text(str(child().process.pid))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    orphan = Path("/proc") / note.read_text()
    # A zombie has ended.
    for _ in range(200):
        try:
            if "State:\tZ" in (orphan / "status").read_text():
                return
        except FileNotFoundError:
            return
        run("sleep", "0.02")
    raise AssertionError(f"{orphan} goes on")
