"""Cases in which any two values of two axes meet: their whole product is many more, and proves little more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairs(case: tuple[Any, ...]) -> set[tuple[Any, ...]]:
    """Two values at a time, each with its place."""
    return set(combinations(enumerate(case), 2))


def covering(cases: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Some of the cases, with all of their pairs of values, found greedily: the same every time."""
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def every_pair(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by few combinations in which each value of each axis meets each value of every other one."""
    cases = []
    for indices in covering(list(product(*(range(len(axis)) for axis in axes.values())))):
        values = [axis[index] for axis, index in zip(axes.values(), indices, strict=True)]
        cases.append(pytest.param(*values, id="-".join(map(str, values))))
    return pytest.mark.parametrize(list(axes), cases)
