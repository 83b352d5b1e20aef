"""The torch backend's dispatch equals the reference exactly, for every capacity rule and any ids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton import reference
from moe_triton.backends.torch import dispatch as backend
from moe_triton.backends.torch.fused import loops_problem

RULES = ("position", "choice", "keys")
FIELDS = ("counts", "offsets", "source", "position")


def check(
    experts: Tensor, num_experts: int, capacity: int | None = None, groups: int = 1, rule: str = "position"
) -> None:
    keys = torch.rand(experts.shape).mul(4).floor() if rule == "keys" else None  # few distinct keys: ties are common
    by_choice = rule == "choice"
    expected = reference.dispatch(
        experts, num_experts, capacity=capacity, capacity_groups=groups, by_choice=by_choice, keys=keys
    )
    results = [backend.build_dispatch(experts, num_experts, capacity, groups, by_choice, keys)]
    if capacity is None and loops_problem() is None:
        found = backend.build_small_dispatch(experts, num_experts)
        assert found is not None
        results.append((found.counts, found.offsets, found.source, found.position))
    for tensor, name in ((x, name) for actual in results for x, name in zip(actual, FIELDS, strict=True)):
        wanted = getattr(expected, name)
        assert tensor.dtype == torch.int32, name
        assert tensor.shape == wanted.shape, name
        assert torch.equal(tensor, wanted), name


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens_per_group=st.integers(0, 20),
    groups=st.integers(1, 3),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    capacity=st.one_of(st.none(), st.integers(0, 8)),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from((torch.int32, torch.int64)),
)
def test_any_ids(
    seed: int,
    tokens_per_group: int,
    groups: int,
    num_experts: int,
    top_k: int,
    capacity: int | None,
    rule: str,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    experts = torch.randint(-1, num_experts + 1, (groups * tokens_per_group, top_k), dtype=dtype)
    experts[experts == num_experts // 2] = -1  # this expert stays empty
    check(experts, num_experts, capacity, groups, rule)


@pytest.mark.parametrize("capacity", [None, 0, 3])
def test_one_expert_with_all_rows_and_none_with_any(capacity: int | None) -> None:
    check(torch.full((7, 2), 3), 5, capacity)
    check(torch.full((7, 2), -1), 5, capacity)


@pytest.mark.parametrize("rule", RULES)
def test_more_ids_than_16_bits(rule: str) -> None:
    check(torch.randint(0, 70_000, (50, 3)), 70_000, 1, 2, rule)


def test_the_order_of_rows_is_by_expert_then_slot() -> None:
    counts, offsets, source, position = backend.build_dispatch(
        torch.tensor([[2, 0], [0, 9], [2, 2]]), 3, None, 1, False, None
    )
    assert counts.tolist() == [2, 0, 3]
    assert offsets.tolist() == [0, 2, 2, 5]
    assert source.tolist() == [1, 2, 0, 4, 5, -1]
    assert position.tolist() == [[2, 0], [1, -1], [3, 4]]


def test_capacity_keeps_the_most_important() -> None:
    experts = torch.zeros(4, 1, dtype=torch.int32)
    keys = torch.tensor([[0.1], [0.9], [0.5], [0.9]])
    position = backend.build_dispatch(experts, 1, 2, 1, False, keys)[3]
    assert position.flatten().tolist() == [-1, 0, -1, 1]


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    original = backend.build_dispatch

    def swapped(*args):
        counts, offsets, source, position = original(*args)
        return counts, offsets, source.roll(1), position

    monkeypatch.setattr(backend, "build_dispatch", swapped)
    with pytest.raises(AssertionError, match="source"):
        check(torch.randint(0, 4, (6, 2)), 4)
