"""The arithmetic of load statistics."""

from __future__ import annotations

import math

import pytest
import torch

from moe_triton import load_statistics


def test_an_even_load():
    found = load_statistics(torch.tensor([5, 5, 5, 5]), dropped=0)
    assert (found.assignments, found.max_load, found.min_load, found.idle) == (20, 1.0, 1.0, 0)
    assert found.entropy == pytest.approx(1.0)
    assert (found.max_violation, found.dropped) == (0.0, 0.0)


def test_an_uneven_load():
    found = load_statistics(torch.tensor([6, 2, 0, 0], dtype=torch.int32), dropped=2)
    assert found.max_load == pytest.approx(3.0)
    assert found.max_violation == pytest.approx(2.0)
    assert found.idle == 2
    assert found.dropped == pytest.approx(0.25)
    assert found.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert "2 idle, dropped 25.00%" in str(found)


def test_nothing_and_one_expert():
    assert load_statistics(torch.zeros(3, dtype=torch.int64)).entropy == 1.0
    assert load_statistics(torch.tensor([7])).max_load == 1.0
    assert load_statistics(torch.tensor([7])).dropped is None


@pytest.mark.parametrize(
    ("counts", "dropped", "message"),
    [
        (torch.ones(2), None, "counts: got dtype torch.float32"),
        (torch.ones(2, 2, dtype=torch.int64), None, r"counts: got shape \[2, 2\]"),
        ([1, 2], None, "counts: got list"),
        (torch.ones(2, dtype=torch.int64), -1, "dropped: got -1"),
    ],
)
def test_bad_arguments(counts, dropped, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_statistics(counts, dropped)


def test_the_load_of_every_expert():
    found = load_statistics(torch.tensor([6, 0, 2, 0]), balance=1.5)
    assert found.loads == (3.0, 0.0, 1.0, 0.0)
    assert found.dead_experts == [1, 3]
    assert load_statistics(torch.zeros(2, dtype=torch.int64)).dead_experts == [0, 1]
    assert "2 idle, balance 1.500" in str(found)
