"""The torch backend's routing equals the reference: choices exactly, floats and gradients against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe_triton import reference
from moe_triton.backends.torch import fused, routing
from moe_triton.records import SCORES, RouterSpec
from tests.helpers.compare import assert_close

GROUPS = ((1, 1, "max"), (4, 2, "max"), (4, 2, "top2_sum"))
CASES = list(itertools.product(SCORES, (False, True), GROUPS))


@pytest.fixture(params=["0", "1"], ids=["by torch", "by loops"], autouse=True)
def by_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "1":
        pytest.importorskip("numba")
    monkeypatch.setenv(fused.VARIABLE, request.param)


def make_spec(score: str, normalize: bool, groups: tuple[int, int, str]) -> RouterSpec:
    num_groups, top_groups, group_score = groups
    return RouterSpec(
        top_k=3, score=score, normalize=normalize, scale=1.7, num_groups=num_groups, top_groups=top_groups,
        group_score=group_score,
    )  # fmt: skip


def in_float64(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("score", "normalize", "groups"), CASES)
def test_forward_and_backward(
    score: str, normalize: bool, groups: tuple[int, int, str], extras: bool, dtype: torch.dtype
) -> None:
    spec = make_spec(score, normalize, groups)
    num_tokens, num_experts = 29, 16
    wide = reference.wide(dtype)
    logits = (2 * torch.randn(num_tokens, num_experts)).to(dtype)
    choice_bias = torch.randn(num_experts, dtype=wide) if extras else None
    noise = torch.randn(num_tokens, num_experts, dtype=wide) if extras else None
    mask = torch.rand(num_tokens) > 0.3 if extras else None

    experts, weights, counts, score_sums, z_sum = routing.route_forward(logits, spec, choice_bias, noise, mask)
    same_dtype = reference.route(logits, spec, choice_bias=choice_bias, noise=noise, token_mask=mask)
    assert experts.dtype == counts.dtype == torch.int32
    assert torch.equal(experts, same_dtype.experts)
    assert torch.equal(counts, same_dtype.counts)

    exact_logits = logits.detach().clone().double().requires_grad_()
    exact = reference.route(
        exact_logits, spec, choice_bias=in_float64(choice_bias), noise=in_float64(noise), token_mask=mask
    )
    assert torch.equal(experts, exact.experts), "the case has a near-tie: change its seed"
    for actual, expected in ((weights, exact.weights), (score_sums, exact.score_sums), (z_sum, exact.z_sum)):
        assert actual.dtype == wide
        assert_close(actual, expected)

    grads = [torch.randn_like(t) for t in (weights, score_sums, z_sum)]
    (expected,) = torch.autograd.grad(
        [exact.weights, exact.score_sums, exact.z_sum], exact_logits, [g.double() for g in grads]
    )
    actual = routing.route_backward(*grads, logits, experts, spec)
    assert actual.dtype == dtype
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", GROUPS)
def test_the_lower_index_wins_a_tie(groups: tuple[int, int, str], dtype: torch.dtype) -> None:
    spec = make_spec("softmax", False, groups)
    logits = torch.randint(-1, 2, (200, 16)).to(dtype) * 0.5
    logits[:, ::2] *= -1.0  # negative zeros beside positive ones
    experts = routing.route_forward(logits, spec, None, None, None)[0]
    assert torch.equal(experts, reference.route(logits, spec).experts)
    assert routing.route_forward(torch.zeros(1, 16, dtype=dtype), spec, None, None, None)[0].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("groups", GROUPS)
def test_choices_stay_distinct_and_in_range_without_finite_logits(groups: tuple[int, int, str]) -> None:
    spec = make_spec("softmax", True, groups)
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0])
    logits = odd[torch.randint(0, 4, (100, 16))]
    logits[:4] = odd[:, None]
    experts = routing.route_forward(logits, spec, None, None, None)[0]
    assert torch.equal(experts, reference.route(logits, spec).experts)
    assert (experts >= 0).all()
    assert (experts < 16).all()
    assert all(len(set(row)) == 3 for row in experts.tolist())


def test_a_masked_token_adds_nothing_even_when_it_is_nan() -> None:
    spec = make_spec("softmax", True, GROUPS[0])
    logits = torch.randn(5, 16)
    logits[2] = float("nan")
    mask = torch.tensor([True, True, False, True, True])
    experts, weights, counts, score_sums, z_sum = routing.route_forward(logits, spec, None, None, mask)
    assert experts[2].tolist() == [-1] * 3
    assert weights[2].tolist() == [0.0] * 3
    assert counts.sum() == 12
    assert torch.isfinite(score_sums).all()
    assert torch.isfinite(z_sum)
    grad = routing.route_backward(torch.ones(5, 3), torch.ones(16), torch.ones(()), logits, experts, spec)
    assert torch.isfinite(grad).all()
    assert grad[2].abs().sum() == 0
    assert grad[3].abs().sum() > 0


@pytest.mark.parametrize("score", SCORES)
def test_the_gradient_of_given_choices(score: str) -> None:
    """-1 for a choice that counts nowhere, alone or for all of its token; -2 for one that was left empty."""
    spec = make_spec(score, True, GROUPS[0])
    given = torch.tensor([[3, -1, 5], [0, 1, 2], [-1, -1, -1], [-2, 4, -2], [-2, -2, -2]], dtype=torch.int32)
    logits = torch.randn(5, 16)
    exact_logits = logits.double().requires_grad_()
    exact = reference.route(exact_logits, spec, given=given)
    grads = [torch.randn_like(x) for x in (exact.weights, exact.score_sums, exact.z_sum)]
    outputs = [exact.weights, exact.score_sums, exact.z_sum]
    (expected,) = torch.autograd.grad(outputs, exact_logits, grads)
    experts = exact.experts.clone()
    assert experts[2].min() >= 0, "a token without given choices chooses by its logits"
    actual = routing.route_backward(*(grad.float() for grad in grads), logits, experts, spec)
    assert_close(actual, expected)
    experts[2] = -1  # what a mask makes of it
    masked = routing.route_backward(*(grad.float() for grad in grads), logits, experts, spec)
    assert masked[2].tolist() == [0.0] * 16
    assert torch.equal(masked[:2], actual[:2])


def test_the_same_weights_without_finite_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(6, 16)
    logits[0, 3], logits[1], logits[2, 5], logits[3, 1:] = float("nan"), -float("inf"), float("inf"), -float("inf")
    spec = make_spec("softmax", False, GROUPS[0])
    found = routing.route_forward(logits, spec, None, None, None)
    monkeypatch.setenv(fused.VARIABLE, "0")
    for actual, expected in zip(found, routing.route_forward(logits, spec, None, None, None), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_no_tokens() -> None:
    spec = make_spec("sigmoid", True, GROUPS[0])
    experts, weights, counts, score_sums, z_sum = routing.route_forward(torch.randn(0, 16), spec, None, None, None)
    assert experts.shape == weights.shape == (0, 3)
    assert counts.tolist() == [0] * 16
    assert score_sums.tolist() == [0.0] * 16
    assert z_sum == 0
    grad = routing.route_backward(weights, score_sums, z_sum, torch.randn(0, 16), experts, spec)
    assert grad.shape == (0, 16)


def test_the_comparison_can_fail() -> None:
    spec = make_spec("softmax", False, GROUPS[0])
    logits = torch.randn(40, 16)
    weights = routing.route_forward(logits, spec, None, None, None)[1]
    expected = reference.route(logits.double(), spec).weights
    assert_close(weights, expected)
    one_token_dropped = weights.clone()
    one_token_dropped[7] = 0
    for wrong in (torch.zeros_like(weights), weights.flip(1), one_token_dropped, weights / spec.scale):
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(wrong, expected)


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("score", routing.LOOP_SCORES)
def test_many_tokens_whatever_the_threads(score: str, sequences: int) -> None:
    """More than a thread takes at a time, with a piece that is not full; every token counts once."""
    spec = RouterSpec(top_k=3, score=score, sequences=sequences)
    logits, mask, threads = torch.randn(1238, 16), torch.rand(1238) > 0.1, torch.get_num_threads()
    grads, found = (torch.randn(1238, 3), torch.randn(sequences, 16), torch.tensor(0.3)), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcome = routing.route_forward(logits, spec, None, None, mask)
            found.append((*outcome, routing.route_backward(*grads, logits, outcome[0], spec)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
    exact_logits = logits.double().requires_grad_()
    halves = zip(exact_logits.chunk(sequences), mask.chunk(sequences), strict=True)
    exact = [reference.route(of, RouterSpec(top_k=3, score=score), token_mask=real) for of, real in halves]
    experts, weights, counts, score_sums, z_sum, grad_logits = found[0]
    assert torch.equal(experts, torch.cat([each.experts for each in exact]))
    assert torch.equal(counts.view(sequences, 16), torch.stack([each.counts for each in exact]))
    outputs = (
        torch.cat([each.weights for each in exact]),
        torch.stack([each.score_sums for each in exact]),
        torch.stack([each.z_sum for each in exact]).sum(),
    )
    for actual, wanted in zip((weights, score_sums.view(sequences, 16), z_sum), outputs, strict=True):
        assert_close(actual, wanted)
    (wanted,) = torch.autograd.grad(outputs, exact_logits, [grad.double() for grad in grads])
    assert_close(grad_logits, wanted)
    with pytest.raises(AssertionError):
        assert_close(grad_logits.roll(1, 0), wanted)
