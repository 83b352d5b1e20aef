"""moe_triton.dispatch on every backend, bit for bit against the reference; capacity; its errors."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_triton
from moe_triton import reference
from moe_triton.dispatch import chosen_experts, dropless_dispatch, sorted_dispatch
from tests.helpers.compare import assert_close

BACKENDS = ["torch", "triton"]
FIELDS = ("counts", "offsets", "source", "position")


def assert_same(got, want):
    for name in FIELDS:
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == torch.int32, name
        assert torch.equal(a, b), f"{name}: {a.tolist()} != {b.tolist()}"


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ragged_routing_with_an_empty_expert(backend, data):
    groups = data.draw(st.integers(1, 3))
    num_tokens = groups * data.draw(st.integers(0, 25))
    num_experts = data.draw(st.integers(2, 20))
    top_k = data.draw(st.integers(1, 6))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    # ids from -1 to E inclusive: both ends are to be skipped; one expert never gets anything
    experts = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=draw)
    experts[experts == num_experts // 2] = num_experts
    if data.draw(st.booleans()):
        experts = experts.int()
    capacity = data.draw(st.sampled_from([None, 0, 1, 3, 1000]))
    priority = data.draw(st.sampled_from(["position", "choice", "probability"]))
    weights = torch.rand(num_tokens, top_k, generator=draw).mul(8).round()  # with ties
    options = {"capacity": capacity, "capacity_groups": groups, "priority": priority, "weights": weights}
    got = moe_triton.dispatch(experts, num_experts, backend=backend, **options)
    assert_same(got, moe_triton.dispatch(experts, num_experts, backend="reference", **options))
    assert got.counts[num_experts // 2] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_fields_agree_with_each_other(backend):
    experts = torch.randint(0, 5, (40, 3))
    plan = moe_triton.dispatch(experts, 5, capacity=11, backend=backend)
    kept = plan.offsets[-1].item()
    assert plan.counts.sum() == 120
    assert (plan.offsets.diff() == plan.counts.clamp(max=11)).all()
    assert (plan.source[kept:] == -1).all()
    for row, slot in enumerate(plan.source[:kept].tolist()):
        assert plan.position.flatten()[slot] == row
        expert = experts.flatten()[slot].item()
        assert plan.offsets[expert] <= row < plan.offsets[expert + 1]
    assert (plan.position >= 0).sum() == kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_priority_is_seeded_and_fair(backend):
    experts = torch.zeros(60, 1, dtype=torch.int32)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"capacity": 20, "priority": "random", "generator": generator, "backend": backend}
        return moe_triton.dispatch(experts, 2, **options).position[:, 0] >= 0

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    kept = torch.stack([draw(seed) for seed in range(40)]).float()
    assert (kept.sum(1) == 20).all()
    assert kept[:, :30].mean().item() == pytest.approx(1 / 3, abs=0.06)  # the first tokens have no privilege
    torch.manual_seed(7)
    first = moe_triton.dispatch(experts, 2, capacity=20, priority="random", backend=backend)
    torch.manual_seed(7)
    assert_same(first, moe_triton.dispatch(experts, 2, capacity=20, priority="random", backend=backend))


def test_renormalize_over_survivors():
    experts = torch.tensor([[0, 1], [0, 1], [0, 2]])
    weights = torch.tensor([[0.6, 0.2], [0.5, 0.3], [0.7, 0.1]], requires_grad=True)
    plan = moe_triton.dispatch(experts, 3, capacity=1)
    out = moe_triton.renormalize(weights, plan)
    expected = torch.tensor([[0.75, 0.25], [0.0, 0.0], [0.0, 1.0]])
    assert_close(out, expected)
    out[0, 0].backward()
    assert_close(weights.grad[0], torch.tensor([0.2 / 0.64, -0.6 / 0.64]))
    assert weights.grad[1:].abs().max() == 0


def test_dispatch_does_not_change_its_input():
    experts = torch.randint(-1, 4, (9, 2))
    before = experts.clone()
    moe_triton.dispatch(experts, 4, capacity=2)
    assert torch.equal(experts, before)
    assert_same(
        moe_triton.dispatch(experts.T.contiguous().T, 4), reference.dispatch(experts, 4)
    )  # and takes strided input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"experts": torch.zeros(4, 2)},
            TypeError,
            "experts: got dtype torch.float32, wanted torch.int32 or torch.int64",
        ),
        ({"experts": torch.zeros(4, dtype=torch.int64)}, ValueError, r"experts: got shape \[4\], wanted \[T, K\]"),
        ({"num_experts": 0}, ValueError, "num_experts: got 0, wanted at least 1"),
        ({"capacity": -1}, ValueError, "capacity: got -1, wanted at least 0"),
        ({"capacity": 1.5}, TypeError, "capacity: got 1.5, wanted an int"),
        ({"capacity_groups": 3}, ValueError, "capacity_groups: got 3, wanted a divisor of the 4 tokens"),
        ({"priority": "fifo"}, ValueError, "priority: got 'fifo', wanted one of position, choice, probability, random"),
        ({"capacity": 1, "priority": "probability"}, ValueError, "weights: got None"),
        (
            {"capacity": 1, "priority": "probability", "weights": torch.zeros(4, 3)},
            ValueError,
            r"weights: got shape \[4, 3\], wanted \[4, 2\]",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        moe_triton.dispatch(**({"experts": torch.zeros(4, 2, dtype=torch.int64), "num_experts": 3} | arguments))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("factor", [1e18, 1e19, 1e300])
def test_a_capacity_beyond_int64_keeps_all(backend, factor):
    experts = torch.randint(0, 3, (7, 2))
    capacity = moe_triton.expert_capacity(7, 3, 2, factor)
    assert capacity == math.ceil(Fraction(str(factor)) * 14 / 3)
    for priority in ("position", "choice", "random"):
        got = moe_triton.dispatch(experts, 3, capacity=capacity, priority=priority, backend=backend)
        assert_same(got, moe_triton.dispatch(experts, 3, backend=backend))


@pytest.mark.parametrize(
    ("factor", "error"),
    [(0, ValueError), (-1.0, ValueError), (float("inf"), ValueError), (10**309, ValueError), ("1", TypeError)],
    ids=lambda value: str(value)[:9],
)
def test_bad_capacity_factor_is_named(factor, error):
    with pytest.raises(error, match="capacity_factor"):
        moe_triton.expert_capacity(8, 2, 1, factor)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), counts=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_rows_in_expert_order(data, counts):
    """As a dispatch of their ids, wherever the experts' runs lie."""
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=len(counts), max_size=len(counts)))
    order = data.draw(st.permutations(range(len(counts))))
    ids, starts = [], torch.zeros(len(counts), dtype=torch.int64)
    for expert in order:
        starts[expert] = len(ids)
        ids += [expert] * counts[expert] + [-1] * gaps[expert]
    found = sorted_dispatch(torch.tensor(counts), len(ids), starts)
    experts = torch.tensor(ids, dtype=torch.int32).view(-1, 1)
    assert_same(found, reference.dispatch(experts, len(counts)))
    in_a_row = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    rest = in_a_row.new_full((2,), -1)
    found = sorted_dispatch(torch.tensor(counts, dtype=torch.int32), len(in_a_row) + 2)
    assert_same(found, reference.dispatch(torch.cat([in_a_row, rest])[:, None], len(counts)))


def test_counts_beyond_the_rows_are_cut():
    found = sorted_dispatch(torch.tensor([2, 5]), 4)
    assert_same(found, reference.dispatch(torch.tensor([[0], [0], [1], [1]]), 2))


@settings(max_examples=15, deadline=None)
@given(
    ids=st.lists(st.tuples(*[st.integers(-2, 6)] * 3), max_size=9),
    capacity=st.one_of(st.none(), st.integers(0, 3)),
)
def test_the_chosen_experts_are_those_that_were_kept(ids, capacity):
    experts = torch.tensor(ids, dtype=torch.int32).view(-1, 3)
    dispatched = reference.dispatch(experts, 5, capacity=capacity)
    kept = torch.where(dispatched.position >= 0, experts, -1)
    assert torch.equal(chosen_experts(dispatched), kept)
    assert chosen_experts(dispatched).dtype == torch.int32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [0, 5, 300])
def test_of_checked_ids(backend, num_tokens):
    experts = (torch.arange(4 * num_tokens, dtype=torch.int32) * 7 % 9 - 1).view(4, num_tokens).T
    assert_same(dropless_dispatch(experts, 7, backend), reference.dispatch(experts, 7))
