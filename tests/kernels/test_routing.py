"""The routing kernels against `reference.route`: the same experts exactly, weights and sums to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton import reference
from moe_triton.backends.triton.routing import options_of, route_backward, route_forward
from moe_triton.records import SCORES, RouterSpec
from moe_triton_kernels import routing, topk_options
from moe_triton_kernels.scores import EPS
from tests.helpers.compare import assert_close
from tests.helpers.pairs import every_pair

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about intended infinities and NaN

device = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SPECS = [
    RouterSpec(top_k=2),
    RouterSpec(top_k=1, normalize=True),
    RouterSpec(top_k=5, normalize=True, scale=2.5),
    RouterSpec(top_k=4, score="sigmoid"),
    RouterSpec(top_k=3, score="sigmoid", normalize=True, scale=1.5),
    RouterSpec(top_k=3, score="topk_softmax"),
    RouterSpec(top_k=3, score="sqrt_softplus", normalize=True, weightless=2),
    RouterSpec(top_k=4, score="topk_softmax", normalize=True, scale=0.5),
]


def make_logits(num_tokens: int, num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of which no two in a row are near each other, so that rounding cannot change the choice."""
    steps = torch.rand(num_tokens, num_experts).argsort(-1)
    return ((steps + 0.5 * torch.rand(num_tokens, 1)) * (6.0 / num_experts) - 3.0).to(dtype).to(device)


def check_forward(
    logits: Tensor,
    spec: RouterSpec,
    choice_bias: Tensor | None = None,
    noise: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    experts, weights, counts, score_sums, z_sum = route_forward(logits, spec, choice_bias, noise, token_mask)
    # the choice is defined on the logits as they are (fp32); the values in float64
    chosen = reference.route(logits, spec, choice_bias=choice_bias, noise=noise, token_mask=token_mask)
    exact = reference.route(logits.double(), spec, choice_bias=choice_bias, noise=noise, token_mask=token_mask)
    assert (experts.dtype, weights.dtype, counts.dtype) == (torch.int32, torch.float32, torch.int32)
    assert torch.equal(experts, chosen.experts)
    assert torch.equal(counts, chosen.counts)
    assert torch.equal(chosen.experts, exact.experts), "the test's logits are too close to each other"
    assert_close(weights, exact.weights)
    assert_close(score_sums, exact.score_sums)
    assert_close(z_sum, exact.z_sum)
    return experts


def check_backward(
    logits: Tensor, spec: RouterSpec, experts: Tensor, token_mask: Tensor | None = None, given: Tensor | None = None
) -> None:
    """experts: the forward's choice."""
    wide = logits.double().requires_grad_()
    routing = reference.route(wide, spec, token_mask=token_mask, given=given)
    grad_weights = torch.randn_like(routing.weights)
    grad_scores = torch.randn_like(routing.score_sums)
    grad_z = torch.randn_like(routing.z_sum)
    (expected,) = torch.autograd.grad(
        (routing.weights, routing.score_sums, routing.z_sum), wide, (grad_weights, grad_scores, grad_z)
    )
    grad = route_backward(grad_weights.float(), grad_scores.float(), grad_z.float(), logits, experts, spec)
    assert grad.dtype == logits.dtype
    assert_close(grad, expected)


@every_pair(spec=SPECS, num_experts=[5, 8, 60], dtype=DTYPES)
def test_forward_and_backward(spec: RouterSpec, num_experts: int, dtype: torch.dtype) -> None:
    logits = make_logits(70, num_experts, dtype)
    check_backward(logits, spec, check_forward(logits, spec))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_groups", [1, 3])
def test_given_choices(num_groups: int, dtype: torch.dtype) -> None:
    """Groups of 3 experts lie in lanes of their own; rows of -1 are chosen from the logits."""
    spec = RouterSpec(top_k=3, normalize=True, scale=1.5, num_groups=num_groups, top_groups=1)
    logits = make_logits(70, 9, dtype)
    given = torch.rand(70, 9).argsort(-1)[:, :3].int().to(device)
    given[::5], given[1::5, 0] = -1, -1
    experts, weights, counts, score_sums, z_sum = route_forward(logits, spec, None, None, None, given)
    exact = reference.route(logits.double(), spec, given=given)
    assert torch.equal(experts, exact.experts)
    assert torch.equal(counts, exact.counts)
    for actual, expected in ((weights, exact.weights), (score_sums, exact.score_sums), (z_sum, exact.z_sum)):
        assert_close(actual, expected)
    check_backward(logits, spec, experts, given=given)


@settings(max_examples=12, deadline=None)
@given(
    num_tokens=st.integers(1, 90),
    num_experts=st.sampled_from([1, 2, 3, 16, 31, 130]),
    top_k=st.integers(1, 9),
    score=st.sampled_from(list(SCORES)),
    masked=st.booleans(),
)
def test_ragged_shapes(num_tokens: int, num_experts: int, top_k: int, score: str, masked: bool) -> None:
    spec = RouterSpec(top_k=min(top_k, num_experts), score=score, normalize=masked)
    token_mask = (torch.rand(num_tokens) < 0.7).to(device) if masked else None
    logits = make_logits(num_tokens, num_experts)
    experts = check_forward(logits, spec, token_mask=token_mask)
    # the gradient of a token is a difference of terms, which may cancel: all tokens together do not
    if num_experts > 1 and num_tokens > 8:
        check_backward(logits, spec, experts, token_mask=token_mask)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1024, 8), (130, 130)])
def test_many_experts_and_many_choices(num_experts: int, top_k: int) -> None:
    logits = make_logits(4, num_experts)
    spec = RouterSpec(top_k=top_k, normalize=True)
    check_backward(logits, spec, check_forward(logits, spec))


@every_pair(
    groups=[(1, 1, "max"), (6, 2, "max"), (6, 3, "top2_sum"), (3, 2, "top2_sum"), (18, 7, "top2_sum")],
    score=list(SCORES),
    with_noise=[False, True],
    with_bias=[False, True],
)
def test_choice_options(score: str, with_noise: bool, with_bias: bool, groups: tuple[int, int, str]) -> None:
    num_groups, top_groups, group_score = groups
    spec = RouterSpec(
        top_k=5, score=score, normalize=True, num_groups=num_groups, top_groups=top_groups, group_score=group_score
    )
    logits = make_logits(40, 18)
    bias = torch.randn(18, device=device) * (0.5 if score == "topk_softmax" else 0.05) if with_bias else None
    noise = torch.randn(40, 18, device=device) if with_noise else None
    mask = (torch.rand(40) < 0.8).to(device)
    experts = check_forward(logits, spec, bias, noise, mask)
    if with_noise or with_bias or top_groups in (2, 3):  # the option did something; seven groups of one change nothing
        assert not torch.equal(experts, route_forward(logits, RouterSpec(top_k=5, score=score), None, None, mask)[0])
    used = (experts.long() // (18 // num_groups))[mask].sort().values
    assert (1 + (used.diff() != 0).sum(1)).max() <= max(top_groups, 1 if num_groups > 1 else 5)


NAN, INF = float("nan"), float("inf")
ODD_ROWS = [
    [NAN] * 6,
    [INF] * 6,
    [-INF] * 6,
    [0.0] * 6,
    [-0.0, 0.0, -0.0, 0.0, -0.0, 0.0],
    [0.0, -0.0, -1.0, 1e-30, -1e-30, 0.0],
    [NAN, 1.0, NAN, 2.0, INF, -INF],
    [-INF, NAN, -INF, NAN, 3.0, -3.0],
    [INF, 5.0, INF, 5.0, 4.0, 4.0],
    [1.0, 2.0, 2.0, 1.0, 2.0, 1.0],
    [-5.0, -5.0, -4.0, -4.0, -6.0, -6.0],
]


@every_pair(
    groups=[(1, 1, "max"), (3, 2, "max"), (3, 2, "top2_sum"), (2, 1, "top2_sum")],
    score=list(SCORES),
    dtype=DTYPES,
    with_bias=[False, True],
)
def test_odd_logits_give_distinct_ids(
    dtype: torch.dtype, groups: tuple[int, int, str], score: str, with_bias: bool
) -> None:
    num_groups, top_groups, group_score = groups
    for top_k in (1, 3, 6):
        spec = RouterSpec(
            top_k=top_k, score=score, num_groups=num_groups, top_groups=top_groups, group_score=group_score
        )
        logits = torch.tensor(ODD_ROWS, dtype=dtype, device=device)
        bias = torch.tensor([0.0, 0.5, 0.0, 0.5, -0.5, 0.25], device=device) if with_bias else None
        experts, _, counts, _, _ = route_forward(logits, spec, bias, None, None)
        expected = reference.route(logits, spec, choice_bias=bias)
        assert torch.equal(experts, expected.experts)
        assert torch.equal(counts, expected.counts)
        assert all(len(set(row)) == top_k and 0 <= min(row) <= max(row) < 6 for row in experts.tolist())


def test_masked_tokens_do_not_touch_the_sums_even_with_nan_logits() -> None:
    logits = make_logits(50, 9)
    token_mask = (torch.arange(50) % 3 != 0).to(device)
    logits = torch.where(token_mask[:, None], logits, NAN)
    spec = RouterSpec(top_k=3, normalize=True)
    outputs = route_forward(logits, spec, None, None, token_mask)
    alone = reference.route(logits[token_mask].double(), spec)
    assert torch.equal(outputs[0][token_mask], alone.experts)
    assert (outputs[0][~token_mask] == -1).all()
    assert (outputs[1][~token_mask] == 0).all()
    assert torch.equal(outputs[2], alone.counts)
    assert_close(outputs[3], alone.score_sums)
    assert_close(outputs[4], alone.z_sum)
    grads = (torch.randn(50, 3), torch.randn(9), torch.randn(()))
    grad = route_backward(*(g.to(device) for g in grads), logits, outputs[0], spec)
    assert (grad[~token_mask] == 0).all()
    assert (grad[token_mask] != 0).any(1).all()


def test_no_tokens() -> None:
    logits = torch.empty(0, 7, device=device)
    spec = RouterSpec(top_k=2)
    experts, weights, counts, score_sums, z_sum = route_forward(logits, spec, None, None, None)
    assert experts.shape == weights.shape == (0, 2)
    assert counts.tolist() == score_sums.tolist() == [0] * 7
    assert z_sum.item() == 0
    assert route_backward(weights, score_sums, z_sum, logits, experts, spec).shape == (0, 7)


def test_strided_inputs_and_expanded_gradients() -> None:
    spec = RouterSpec(top_k=2)
    logits = make_logits(20, 12).T.contiguous().T
    assert not logits.is_contiguous()
    assert torch.equal(check_forward(logits, spec), check_forward(logits.contiguous(), spec))
    experts = route_forward(logits, spec, None, None, None)[0]
    ones, zero = torch.ones((), device=device), torch.zeros((), device=device)
    grad = route_backward(ones.expand(20, 2), zero.expand(12), zero, logits, experts, spec)
    full = route_backward(torch.ones(20, 2, device=device), torch.zeros(12, device=device), zero, logits, experts, spec)
    assert torch.equal(grad, full)
    assert grad.abs().sum() > 0


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """The sizes of launches are chosen anew, and forgotten after the test."""
    options = (topk_options.lanes_of, topk_options.choice_constants, topk_options.programs_of)
    cached = (*options, routing._launch, routing._sum_launch)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("nothing_kept")
def test_many_programs_loop_over_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_options, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(topk_options, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(topk_options, "MAX_SLOTS", 80)  # one program takes fewer
    monkeypatch.setattr(routing, "SUM_PROGRAMS", 2)
    spec = RouterSpec(top_k=2)
    assert topk_options.programs_of(85, 8, options_of(spec)).number == 3
    check_forward(make_logits(85, 8), spec, token_mask=(torch.rand(85) < 0.6).to(device))


class Counted:
    """Stands for a kernel and counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def run(self, *args: Any, **constants: Any) -> None:
        self.launches += 1
        self.kernel.run(*args, **constants)


@pytest.mark.usefixtures("nothing_kept")
def test_few_tokens_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = [Counted(routing.topk_kernel), Counted(routing.sum_partials_kernel)]
    monkeypatch.setattr(routing, "topk_kernel", counted[0])
    monkeypatch.setattr(routing, "sum_partials_kernel", counted[1])
    few = topk_options.MAX_SLOTS // 2
    check_forward(make_logits(few, 20), RouterSpec(top_k=2))
    assert [kernel.launches for kernel in counted] == [1, 0]
    check_forward(make_logits(few + 1, 20), RouterSpec(top_k=2))
    assert [kernel.launches for kernel in counted] == [2, 1]


def test_same_input_same_bits() -> None:
    logits = make_logits(90, 20)
    first, second = (route_forward(logits, RouterSpec(top_k=4), None, None, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_epsilon_is_the_references() -> None:
    assert getattr(EPS, "value", EPS) == reference.EPS
