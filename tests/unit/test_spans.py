# SPDX-License-Identifier: LGPL-2.1-or-later
"""Spans without other spans: against a set of numbers."""

from random import Random

import pytest

from libvirt_natns.spans import Span, remaining


@pytest.mark.parametrize(
    ("excluded", "rest"),
    [
        ([], [(1, 9)]),
        ([(4, 5)], [(1, 3), (6, 9)]),
        ([(7, 12), (0, 2)], [(3, 6)]),
        ([(2, 8), (3, 4)], [(1, 1), (9, 9)]),
        ([(12, 14)], [(1, 9)]),
        ([(0, 9)], []),
    ],
)
def test_parts_remain_in_order(excluded: list[Span], rest: list[Span]) -> None:
    assert list(remaining((1, 9), excluded)) == rest


def test_each_number_remains_or_is_excluded() -> None:
    random = Random(7)
    for _ in range(300):
        pairs = [(random.randint(0, 30), random.randint(0, 8)) for _ in range(random.randint(0, 5))]
        excluded = [(first, first + length) for first, length in pairs]
        parts = list(remaining((5, 25), excluded))
        numbers = [number for first, last in parts for number in range(first, last + 1)]
        gone = {number for first, last in excluded for number in range(first, last + 1)}
        assert numbers == [number for number in range(5, 26) if number not in gone]
        assert all(first <= last for first, last in parts)
