# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's ifupdown configures the NIC and hands it to the router, by contrib/ifupdown/ens3."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import lab_vps
import pytest
from lab import CHECKOUT, ECHO_PORT, INTERNET, PYTHON, Result, remove_config, run, write_config
from lab_vps import ADDRESS, ADDRESS6, CONFIG, INTERNET6, NIC, ROUTER, Vps, greeting

SNIPPET = CHECKOUT / "contrib" / "ifupdown" / "ens3"
COMMANDS = Path("/run/tmp/commands")


@pytest.fixture
def vps(nothing_left: None) -> Iterator[Vps]:
    """A server whose NIC nobody has configured yet."""
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, lab_vps.STATE, ignore_errors=True)
        cleanup.callback(shutil.rmtree, "/run/network", ignore_errors=True)
        cleanup.callback(shutil.rmtree, COMMANDS, ignore_errors=True)
        cleanup.callback(remove_config)
        COMMANDS.mkdir()
        command = COMMANDS / "virt-natns"
        command.write_text(
            f'#!/bin/sh\nPYTHONPATH={CHECKOUT} exec {PYTHON} -m libvirt_natns "$@"\n'
        )
        command.chmod(0o755)
        # ifup has this directory in its PATH, as a shell has.
        run("mount", "--bind", COMMANDS, "/usr/local/bin")
        cleanup.callback(run, "umount", "/usr/local/bin")
        Path("/run/network").mkdir(exist_ok=True)
        write_config(CONFIG)
        yield cleanup.enter_context(Vps(configured=False))


def ifupdown(program: str) -> Result:
    return run(program, "-i", SNIPPET, NIC)


def talks() -> bool:
    return (greeting(INTERNET, ECHO_PORT), greeting(INTERNET6, ECHO_PORT)) == (ADDRESS, ADDRESS6)


def test_ifup_and_ifdown(vps: Vps) -> None:
    ifupdown("ifup")
    assert Path("/sys/class/net", NIC).exists(), "nobody has confirmed the router yet"
    assert talks()
    run(COMMANDS / "virt-natns", "router", "up", "wan", "--confirm-within", "60s")
    run(COMMANDS / "virt-natns", "router", "confirm", "wan")
    assert talks()
    # As at a shutdown, and at the next boot.
    for _ in range(2):
        ifupdown("ifdown")
        addresses = run("ip", "-o", "address", "show", NIC, "scope", "global").stdout
        assert addresses == "", "ifdown has found the NIC, and taken its addresses"
        assert not Path("/run/netns", ROUTER).exists()
        ifupdown("ifup")
        assert not Path("/sys/class/net", NIC).exists()
        assert talks()
    ifupdown("ifdown")
