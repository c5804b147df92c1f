# SPDX-License-Identifier: LGPL-2.1-or-later
"""A few steps of the random campaign, so that it works when somebody needs it.

``tests/torture/run`` is the campaign itself.
"""

import os

import pytest
from lab import CHECKOUT, PYTHON, run

CAMPAIGN = os.fspath(CHECKOUT / "tests" / "torture" / "campaign.py")


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """The campaign compares for itself, and its world ends with this file's sandbox."""


@pytest.mark.parametrize("mode", ["--service", "--hooks"])
def test_a_short_campaign(mode: str) -> None:
    done = run(PYTHON, CAMPAIGN, mode, "--operations", "25", "--seed", "7", timeout=180)
    assert "25 operations without a fault" in done.stderr
