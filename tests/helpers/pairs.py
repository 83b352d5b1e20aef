"""Cases in which any two values of two axes meet: their whole product is many more, and proves little more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def every_pair(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by few combinations in which each value of each axis meets each value of every other one.

    Greedy: the next combination is the first of those with the most pairs that are still missing.
    """
    rows = list(product(*(range(len(axis)) for axis in axes.values())))
    missing = {pair for row in rows for pair in combinations(enumerate(row), 2)}
    cases = []
    while missing:
        best = max(rows, key=lambda row: sum(pair in missing for pair in combinations(enumerate(row), 2)))
        missing -= set(combinations(enumerate(best), 2))
        values = [axis[index] for axis, index in zip(axes.values(), best, strict=True)]
        cases.append(pytest.param(*values, id="-".join(map(str, values))))
    return pytest.mark.parametrize(list(axes), cases)
