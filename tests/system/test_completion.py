# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion in real shells: bash, zsh and fish complete names of libvirt's networks and guests.

A line is typed at a terminal, with its Tabs. A function in the place of the command notes the
words that it got, so a name with blanks must have been quoted.
"""

import os
import pty
import re
import select
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from lab import CHECKOUT, isolated, remove_config, run, virsh, wait_for, write_config

COMPLETION = CHECKOUT / "contrib" / "completion"
WORK = Path("/run/tmp/completion")
NOTED = WORK / "noted"
"""The words of the command, each ended by a null character."""

NETWORKS = {"lab one": "virbr10", "lab-two": "virbr11", "-dash": "virbr12", "it's": "virbr13"}
ACTIVE = "lab-two"
GUESTS = ("web", "data base", "a:b")
CONFIG = '[upstreams.provider]\nkind = "host"\n[upstreams.wan]\nkind = "router"\nnic = "ens3"\n'

READY = f"printf ready >{NOTED}"
INIT = {
    "bash": f"""
        source {COMPLETION}/virt-natns
        bind 'set bell-style none'
        virt-natns() {{ printf '%s\\0' "$@" >{NOTED}.new; mv {NOTED}.new {NOTED}; }}
    """,
    "bash-completion": f"""
        source /usr/share/bash-completion/bash_completion
        source {COMPLETION}/virt-natns
        bind 'set bell-style none'
        virt-natns() {{ printf '%s\\0' "$@" >{NOTED}.new; mv {NOTED}.new {NOTED}; }}
    """,
    "zsh": f"""
        unsetopt BEEP LIST_BEEP
        fpath=({COMPLETION} $fpath)
        autoload -Uz compinit
        compinit -u -D
        virt-natns() {{ printf '%s\\0' "$@" >{NOTED}.new; mv {NOTED}.new {NOTED}; }}
    """,
}
COMMANDS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


class Terminal:
    """An interactive shell with our completion; ``init`` is the name of its start-up."""

    def __init__(self, init: str) -> None:
        script = WORK / "init"
        script.write_text(INIT[init])
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "TERM": "dumb", "HISTFILE": "", "HOME": os.fspath(WORK)}
            command = COMMANDS[init.partition("-")[0]]
            os.execvpe(command[0], command, environment)
        self.type(f". {script}; {READY}\n")

    def type(self, keys: str) -> str:
        """Type keys that run the command, and return the words that it got, joined by "|"."""
        NOTED.unlink(missing_ok=True)
        os.write(self.end, keys.encode())
        deadline = time.monotonic() + 60
        shown = b""
        while not NOTED.exists():
            assert time.monotonic() < deadline, shown.decode(errors="replace")
            # A shell that cannot write its echo reads no more keys.
            if select.select([self.end], [], [], 0.05)[0]:
                shown += os.read(self.end, 65536)
        return NOTED.read_text().removesuffix("\0").replace("\0", "|")

    def close(self) -> None:
        os.close(self.end)
        os.waitpid(self.pid, 0)


@contextmanager
def terminal(init: str) -> Iterator[Terminal]:
    opened = Terminal(init)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    WORK.mkdir(parents=True)
    write_config(CONFIG)
    for name, bridge in NETWORKS.items():
        file = WORK / "network.xml"
        file.write_text(isolated("NAME", bridge).replace("NAME", escape(name)))
        virsh("net-define", os.fspath(file))
    virsh("net-start", ACTIVE)
    # The kernel sets the state of a bridge without ports a moment after the bridge.
    wait_for(lambda: "state DOWN" in run("ip", "link", "show", NETWORKS[ACTIVE]).stdout)
    for guest in GUESTS:
        file = WORK / "domain.xml"
        file.write_text(
            f"<domain type='qemu'><name>{guest}</name><memory>8192</memory>"
            "<os><type arch='x86_64'>hvm</type></os></domain>"
        )
        virsh("define", os.fspath(file))
    (WORK / "a file.xml").touch()
    (WORK / "folder").mkdir()
    yield
    for guest in GUESTS:
        virsh("undefine", guest)
    virsh("net-destroy", ACTIVE)
    remove_config()


LINES = [
    ("stat\t\n", "status"),
    ("forw\tli\t--js\t\n", "forward|list|--json"),
    ("status lab-\t\n", "status|lab-two"),
    ("status --json lab\\ \t\n", "status|--json|lab one"),
    ("status 'lab \t\n", "status|lab one"),
    ("status it\t\n", "status|it's"),
    # A name like an option goes after "--".
    ("status -- -d\t\n", "status|--|-dash"),
    # Only a network that is up has a namespace.
    ("exec la\t-- id -\n", "exec|lab-two|--|id|-"),
    ("forward add --netw\tlab-\tw\t2222:22\n", "forward|add|--network|lab-two|web|2222:22"),
    ("forward add --network=lab-\tw\t1\n", "forward|add|--network=lab-two|web|1"),
    ("forward add --source 10.0.0.0/8 d\t1\n", "forward|add|--source|10.0.0.0/8|data base|1"),
    ("forward list a:\t\n", "forward|list|a:b"),
    ("router conf\tw\t\n", "router|confirm|wan"),
    ("install --sc\tanno\t\n", "install|--scope|annotated"),
    (f"validate {WORK}/a\t\n", f"validate|{WORK}/a file.xml"),
    (f"validate x.xml {WORK}/fol\tx\n", f"validate|x.xml|{WORK}/folder/x"),
    (f"plan {WORK}/a\t\n", f"plan|{WORK}/a file.xml"),
    ("plan lab-\t\n", "plan|lab-two"),
    # There is nothing to complete.
    ("sync x\t\n", "sync|x"),
    ("forward add web 22\t\n", "forward|add|web|22"),
]


@pytest.mark.parametrize("init", INIT)
def test_a_line_is_completed(init: str) -> None:
    with terminal(init) as shell:
        typed = {words: shell.type(f"virt-natns {keys}") for keys, words in LINES}
    # zsh completes an option with a value to "--network=".
    joined = "=" if init == "zsh" else "|"
    expected = [re.sub(r"(--network|--scope)\|", rf"\1{joined}", words) for words in typed]
    assert list(typed.values()) == expected


NAMES = ["it's", "lab one", "lab-two"]
LISTS = [
    ("forward ", ["add", "list", "remove"]),
    ("forward l", ["list"]),
    ("router ", ["confirm", "down", "status", "up"]),
    ("status --", ["--help", "--json", "--watch"]),
    ("forward add --", ["--guest-address", "--help", "--mac", "--network", "--source"]),
    ("status ", NAMES),
    ("status -- ", ["-dash", *NAMES]),
    ("status lab", ["lab one", "lab-two"]),
    ("status a ", []),
    ("check ", ["lab-two"]),
    ("exec ", ["lab-two"]),
    ("forward remove ", sorted(GUESTS)),
    ("forward add web ", []),
    ("forward add --network ", NAMES),
    ("forward add --mac ", []),
    ("forward add --mac x ", sorted(GUESTS)),
    ("router up ", ["wan"]),
    ("install --scope ", ["annotated", "isolated"]),
    ("sync ", []),
    ("no-such ", []),
]


@pytest.mark.parametrize(("line", "listed"), LISTS)
def test_a_list_in_fish(line: str, listed: list[str]) -> None:
    script = f"source {COMPLETION}/virt-natns.fish; complete -C {shlex.quote(f'virt-natns {line}')}"
    done = run("fish", "--no-config", "-c", script, env={**os.environ, "HOME": os.fspath(WORK)})
    offered = [each.partition("\t")[0] for each in done.stdout.splitlines()]
    assert sorted(offered) == listed


@pytest.mark.parametrize(("line", "listed"), LISTS)
def test_a_list_in_bash(line: str, listed: list[str]) -> None:
    *words, last = f"virt-natns {line}".split(" ")
    script = f"""
        source {COMPLETION}/virt-natns
        COMP_WORDS=({shlex.join([*words, last])}) COMP_CWORD={len(words)}
        _virt_natns
        eval "printf '%s\\n' ${{COMPREPLY[*]}}"
    """
    offered = run("bash", "--norc", "-c", script).stdout.split("\n")
    assert sorted(filter(None, set(offered) - {"-h"})) == listed


@pytest.mark.parametrize("line", ["status ", "status -- ", "forward add --network "])
def test_without_names_fish_lists_nothing(line: str) -> None:
    script = (
        f"source {COMPLETION}/virt-natns.fish; function sh; end; complete -C 'virt-natns {line}'"
    )
    assert run("fish", "--no-config", "-c", script).stdout == ""


def test_files_in_fish() -> None:
    for command in ("validate", "validate x.xml", "plan"):
        line = shlex.quote(f"virt-natns {command} {WORK}/")
        script = f"source {COMPLETION}/virt-natns.fish; complete -C {line}"
        offered = run("fish", "--no-config", "-c", script).stdout
        assert f"{WORK}/a file.xml" in offered
        assert f"{WORK}/folder/" in offered


def test_a_command_in_fish() -> None:
    line = "virt-natns exec lab-two -- ip -"
    script = f"source {COMPLETION}/virt-natns.fish; complete -C '{line}'"
    known = run("fish", "--no-config", "-c", "complete -C 'ip -'").stdout
    assert run("fish", "--no-config", "-c", script).stdout == known
