# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures of the tests that run inside an emulated machine (tests/machine/run).

The lab of the system tests serves here as well: the machine is its sandbox.  Tests of
a file run in their order, and each begins with what the tests before have left.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]
sys.path[:0] = [os.fspath(CHECKOUT / "tests" / "system"), os.fspath(CHECKOUT)]
pytest.register_assert_rewrite("lab_machine")

import lab  # noqa: E402 - needs the path
import lab_base  # noqa: E402
import lab_machine  # noqa: E402
import lab_virsh  # noqa: E402


def pytest_sessionstart() -> None:
    """Refuse to run on any other machine."""
    if not lab_base.is_test_machine():
        raise pytest.UsageError("this changes the whole machine: run it with tests/machine/run")
    Path("/run/tmp").mkdir(exist_ok=True)
    lab_base.virsh_library = lab_virsh.run
    lab_base.patience = 20.0


@pytest.fixture(scope="session", autouse=True)
def outside() -> Iterator[lab_machine.Outside]:
    """Servers beyond the gateway, for the whole part."""
    with lab_machine.Outside() as world:
        yield world


@pytest.fixture(scope="module")
def guest() -> Iterator[lab.FastGuest]:
    """A guest in the network lab, with the address that lab's port leads to."""
    with lab_machine.guest_in("virbr10", "inlab") as made:
        yield made
