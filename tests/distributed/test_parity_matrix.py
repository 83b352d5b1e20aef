"""Every pair of choices of parallelism, wrapper, accumulation, checkpointing and model, against one process."""

from __future__ import annotations

import itertools
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.helpers import parity_matrix
from tests.helpers.parity_matrix import CHOICES, TOLERANCE, Composition, error_of, rows, sample

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
SAMPLE = sample()


def name_of(composition: Composition) -> str:
    return "-".join(f"{name}={value}" for name, value in asdict(composition).items())


@pytest.mark.parametrize("composition", SAMPLE, ids=name_of)
def test_a_composition(four_ranks, composition):
    assert max(four_ranks.run(error_of, composition)) <= TOLERANCE[composition.model]


def without_reduction(composition: Composition) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity_matrix, "reduce_gradients", lambda *_: None)
        return error_of(composition)


def test_gradients_that_are_not_reduced_are_seen(four_ranks):
    composition = next(c for c in SAMPLE if c.wrapper == "none" and c.edp > 1)
    assert min(four_ranks.run(without_reduction, composition)) > 1e-2


def test_every_pair_that_is_possible_is_in_the_sample():
    possible = [c for values in itertools.product(*CHOICES.values()) if (c := Composition(*values)).is_possible()]
    for first, second in itertools.combinations(CHOICES, 2):
        found, wanted = (
            {(getattr(c, first), getattr(c, second)) for c in compositions} for compositions in (SAMPLE, possible)
        )
        assert found == wanted
    assert len(SAMPLE) <= 24, "each takes a second"


def test_the_page_has_these_compositions():
    table = re.search(r"<!-- table: parity \(benchmarks/parity.py\) -->\n(.*?)<!-- end", PAGE.read_text(), re.DOTALL)
    assert table
    without_errors = [line.rpartition("|")[0].rpartition("|")[0] for line in table[1].splitlines()]
    assert without_errors == [line.rpartition("|")[0].rpartition("|")[0] for line in rows(dict.fromkeys(SAMPLE, 0.0))]
    errors = re.findall(r"\| (\S+) \|$", table[1], re.MULTILINE)[1:]  # without the header
    for composition, error in zip(SAMPLE, errors, strict=True):
        assert float(error) <= TOLERANCE[composition.model]
