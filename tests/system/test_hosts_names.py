# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks with names that are no file names, options or words of a shell."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from lab import FastGuest, Service, isolated, natns, run, virsh, wait_for
from lab_boundary import on_a_link
from lab_domains import STATE, carries, greeted, networks
from lab_nodes import Node

from libvirt_natns import names

ODD = ("-dash", "a b", "it's", "100%", 'say "hi"')
JOB = "job 1"
SERVER = "203.0.113.80"
SLUG = names.former_namespace(JOB).removeprefix("nat-")


@pytest.fixture(autouse=True)
def far(installed: None) -> Iterator[Node]:
    """A server behind the host, which is the host's way out."""
    with ExitStack() as stack:
        node = on_a_link(stack, "far", "p-far", "203.0.113.1", SERVER)
        run("ip", "route", "add", "default", "via", SERVER)
        node.serve("tcp", 8080)
        yield node


@pytest.mark.parametrize("name", ODD)
def test_an_odd_name_at_the_command_line(name: str, installed: None) -> None:
    xml = isolated("plain", "virbr10").replace("<name>plain<", f"<name>{escape(name)}<")
    file = Path("/run/tmp/odd.xml")
    file.write_text(xml)
    quoted = repr(name)
    for command in (["status", "--", name], ["check", "--", name], ["exec", "--", name, "true"]):
        assert f"there is no network {quoted}: " in _line(*command)
    assert f"there is no guest {quoted}" in _line("forward", "list", "--", name)
    virsh("net-define", os.fspath(file))
    uuid = next(
        words[0] for line in virsh("net-list", "--all", "--uuid").stdout.splitlines()
        if (words := line.split())
    )  # fmt: skip
    try:
        virsh("net-start", uuid)
        assert natns("check", "--", name).stdout == ""
        assert name in natns("status", "--", name).stdout
        assert "10.0.0.1" in natns("exec", "--", name, "--", "ip", "address").stdout
        assert "nat-" in natns("plan", "--", name).stdout
        assert name in natns("diagram").stdout
    finally:
        virsh("net-destroy", uuid, check=False)
        virsh("net-undefine", uuid)


def _line(*arguments: str) -> str:
    done = natns(*arguments, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_a_name_that_begins_with_a_dash_is_hinted_at(installed: None) -> None:
    for arguments in (("exec", "-dash", "--", "true"), ("status", "-dash"), ("plan", "-dash")):
        done = natns(*arguments, check=False)
        assert done.returncode == 2
        fault, _ = done.stderr.splitlines()
        assert fault.endswith(': a name that begins with "-" goes after "--": -- -dash')


def test_the_slug_of_a_network_is_no_other_network(far: Node) -> None:
    with networks(isolated(JOB, "virbr10", domain=None), isolated(SLUG, "virbr11")):
        for bridge in ("virbr10", "virbr11"):
            with FastGuest(bridge, name="guest") as guest:
                guest.dhcp()
                greeted(guest, SERVER, 8080).close()
        assert natns("check").stdout == ""
        assert names.namespace(JOB) != names.namespace(SLUG)


@pytest.mark.parametrize("served", [True, False], ids=["service", "hooks"])
def test_a_network_under_its_former_slug_goes_on(served: bool, far: Node) -> None:
    """An upgrade finds it, its connections live on, and the other network starts."""
    former, today = names.former_namespace(JOB), names.namespace(JOB)
    with (
        networks(isolated(JOB, "virbr10", domain=None)),
        FastGuest("virbr10", name="guest") as guest,
    ):
        guest.dhcp()
        with greeted(guest, SERVER, 8080) as stream:
            _rename(today, former)
            assert natns("exec", JOB, "--", "true").returncode == 0
            if served:
                with Service():
                    wait_for(lambda: not Path("/run/netns", former).exists(), what="the name")
            else:
                with networks(isolated(SLUG, "virbr11")):
                    assert natns("check").stdout == ""
            assert not Path("/run/netns", former).exists()
            assert Path("/run/netns", today).exists()
            assert natns("check").stdout == ""
            assert carries(stream)
        guest.dhcp()
    assert not Path("/run/netns", today).exists()


def _rename(name: str, other: str) -> None:
    """Give a network's namespace the name that an earlier version gave it."""
    path, new = Path("/run/netns", name), Path("/run/netns", other)
    new.touch()
    run("mount", "--bind", path, new)
    run("umount", path)
    path.unlink()
    with closing(sqlite3.connect(STATE / "state.db")) as database, database:
        database.execute("UPDATE network SET namespace = ? WHERE namespace = ?", (other, name))
