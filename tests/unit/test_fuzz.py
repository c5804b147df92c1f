# SPDX-License-Identifier: LGPL-2.1-or-later
"""A short run of the fuzzer: always the same cases, which hypothesis makes small.

tests/fuzz/run does as many cases as one likes.
"""

import os
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(os.fspath(Path(__file__).resolve().parents[1] / "fuzz"))

import campaign
from targets import TARGETS, Target

CHOSEN, PLAIN = 40, 150
"""Cases of each target: hypothesis' own, and those of the plain generator."""

NAMES = [target.name for target in TARGETS]


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_cases_that_hypothesis_chooses(target: Target) -> None:
    @settings(
        max_examples=CHOSEN,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(random=st.randoms(use_true_random=False))
    def holds(random: Random) -> None:
        target.check(target.make(random))

    holds()


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_cases_of_a_seed(target: Target) -> None:
    outcome = campaign.run_chunk(0, target.name, 0, PLAIN)
    assert outcome.failures == []
    assert outcome.cases[target.name] == PLAIN


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_seeds_hold_as_they_are(target: Target) -> None:
    for seed in target.seeds():
        target.check(seed)


def test_a_failure_is_made_small() -> None:
    def check(data: bytes) -> None:
        assert b"needle" not in data

    data = b"hay" * 100 + b"needle" + b"hay" * 100
    found = campaign.problem(check, data)
    assert found is not None
    assert campaign.least(check, data, found[1]) == b"needle"
