"""moe_triton.route on every backend against the reference; its errors; its noise."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_triton
from moe_triton import reference
from moe_triton.records import SCORES
from moe_triton.routing import gumbel_noise, router_spec
from tests.helpers.compare import assert_close

BACKENDS = ["torch", "triton"]
OPTIONS = [
    {},
    {"normalize": False},
    {"normalize": True, "scale": 2.5},
    {"score": "sigmoid"},
    {"score": "sigmoid", "normalize": True, "scale": 1.5},
    {"score": "topk_softmax"},
    {"score": "sqrt_softplus"},
    {"score": "sqrt_softplus", "normalize": True, "scale": 1.5, "weightless": 4},
    {"score": "topk_softmax", "weightless": 5},
    {"weightless": 12},
    {"num_groups": 3, "top_groups": 2},
    {"num_groups": 3, "top_groups": 1, "group_score": "top2_sum"},
    {"score": "sigmoid", "num_groups": 3, "top_groups": 2, "group_score": "top2_sum"},
    {"score": "sqrt_softplus", "num_groups": 3, "top_groups": 2, "group_score": "top2_sum", "normalize": True},
]


def check_against_reference(
    logits, top_k, backend, *, choice_bias=None, noise=None, token_mask=None, experts=None, **options
):
    got_in = logits.detach().clone().requires_grad_()
    want_in = logits.detach().double().requires_grad_()
    what = {"choice_bias": choice_bias, "noise": noise, "token_mask": token_mask}
    got = moe_triton.route(got_in, top_k, **what, experts=experts, backend=backend, **options)
    spec = router_spec(logits.shape[1], top_k, **options)
    # the choice itself is made in fp32 by definition; the reference is asked for it there
    chosen = reference.route(logits, spec, **what, given=experts)
    want = reference.route(want_in, spec, **what, given=experts)
    assert torch.equal(got.experts, chosen.experts)
    assert torch.equal(got.counts, chosen.counts)
    assert got.experts.dtype == torch.int32
    assert got.num_tokens == chosen.num_tokens
    assert_close(got.weights, want.weights)
    assert_close(got.score_sums, want.score_sums)
    assert_close(got.z_sum, want.z_sum)
    grads = [torch.randn(x.shape, dtype=torch.float64) for x in (want.weights, want.score_sums, want.z_sum)]

    def backward(routing, leaf):
        outputs = (routing.weights, routing.score_sums, routing.z_sum)
        torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
        return leaf.grad

    expected = backward(want, want_in)
    actual = backward(got, got_in)
    assert actual.dtype == logits.dtype
    assert_close(actual, expected)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(backend, options):
    check_against_reference(torch.randn(33, 12), 3, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2, 5, 12])
@pytest.mark.parametrize("score", list(SCORES))
def test_any_top_k_with_mask_bias_and_noise(backend, top_k, score):
    check_against_reference(
        torch.randn(20, 12),
        top_k,
        backend,
        score=score,
        choice_bias=torch.randn(12),
        noise=torch.randn(20, 12),
        token_mask=torch.rand(20) < 0.7,
    )


def given_experts(num_tokens, num_experts, top_k):
    """Distinct ids; in the first rows some that are repeated or out of range, then rows of nothing else."""
    experts = torch.rand(num_tokens, num_experts).argsort(-1)[:, :top_k].int()
    experts[0, 0] = num_experts
    experts[1, -1] = experts[1, 0]
    experts[2] = torch.tensor([-(2**31), 2**31 - 1] * top_k)[:top_k]
    experts[3] = -1
    return experts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_given_experts(backend, options):
    logits, experts = torch.randn(33, 12), given_experts(33, 12, 3)
    mask = torch.arange(33) % 7 != 0
    everything = {"choice_bias": torch.randn(12), "noise": torch.randn(33, 12), "token_mask": mask}
    for extras in ({}, everything):
        got = check_against_reference(logits, 3, backend, experts=experts, **options, **extras).experts
        live = moe_triton.route(logits, 3, **options, **extras).experts
        assert torch.equal(got[4:][mask[4:]], experts[4:][mask[4:]])
        assert torch.equal(got[2:4], live[2:4])
        assert got[1].tolist() == [*experts[1, :2].tolist(), -1]
    assert (got[~mask] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("top_k", [1, 5])
def test_the_choice_given_back_gives_the_same_bits(backend, score, top_k):
    logits = torch.randn(20, 12).round()
    options = {"score": score, "normalize": True, "noise": torch.randn(20, 12), "backend": backend}
    live, again = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    want = moe_triton.route(live, top_k, **options)
    got = moe_triton.route(again, top_k, experts=want.experts.long(), **options)
    for name in ("experts", "weights", "counts", "score_sums", "z_sum"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    outer = torch.randn(20, top_k)
    (want.weights * outer).sum().backward()
    (got.weights * outer).sum().backward()
    assert torch.equal(live.grad, again.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_ragged_sizes(backend, data):
    num_tokens = data.draw(st.integers(0, 40))
    num_experts = data.draw(st.integers(1, 20))
    top_k = data.draw(st.integers(1, num_experts))
    logits = torch.randn(
        num_tokens, num_experts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    if data.draw(st.booleans()):
        logits = logits.round()  # many exact ties
    check_against_reference(logits, top_k, backend, score=data.draw(st.sampled_from(["softmax", "sigmoid"])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_numbers_give_distinct_experts_in_range(backend):
    logits = torch.randn(6, 8)
    logits[0], logits[1], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, ::2] = float("nan")
    logits[4] = torch.tensor([0.0, -0.0] * 4)
    got = moe_triton.route(logits, 8, backend=backend).experts
    assert torch.equal(got, reference.route(logits, router_spec(8, 8)).experts)
    assert (got.sort(-1).values == torch.arange(8)).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_masks_of_bools_and_integers_say_the_same(dtype):
    logits, mask = torch.randn(6, 8), torch.tensor([1, 0, 1, 1, 0, 1])
    got = moe_triton.route(logits, 2, token_mask=mask.to(dtype))
    assert (got.experts[:, 0] < 0).tolist() == (mask == 0).tolist()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("score", list(SCORES))
def test_scores_that_all_underflow_give_finite_weights_and_gradients(backend, score):
    """sigmoid(-400) is 0 in fp32: its normalisation divides zero by the small number that keeps it finite."""
    logits = torch.full((3, 8), -400.0, requires_grad=True)
    vanishes = score in ("sigmoid", "sqrt_softplus")
    got = moe_triton.route(logits, 2, score=score, normalize=True, scale=2.0, backend=backend)
    assert got.weights.tolist() == [[0.0 if vanishes else 1.0] * 2] * 3
    share = 0.0 if vanishes else 3 / 8
    assert_close(got.score_sums, torch.full((8,), share))
    loss = (got.weights * torch.tensor([1.0, 2.0])).sum() + (got.score_sums * torch.arange(8)).sum()
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    if vanishes:
        assert (logits.grad == 0).all()
    else:
        assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_sqrt_softplus_from_far_below_to_far_above(backend):
    """log(1 + exp(x)) loses all digits for x << 0 where it is computed as it stands."""
    logits = torch.linspace(-120, 120, 97).view(1, -1)
    got = moe_triton.route(logits, 97, score="sqrt_softplus", normalize=False, backend=backend)
    x = logits.double().flip(1)
    exact = torch.where(x < -30, x - x.exp() / 2, x.exp().log1p().log()) / 2  # of the logarithm
    exact = torch.where(x > 30, x.log() / 2, exact)
    assert ((got.weights.double().log() - exact).abs() < 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_places_and_tokens_without_experts(backend):
    """-2 leaves a place empty; its token counts in the sums even without any expert."""
    logits = torch.randn(5, 6)
    experts = torch.tensor([[3, -2], [-2, -2], [-2, 4], [-1, -1], [-1, -2]])
    for options in ({}, {"score": "sqrt_softplus"}, {"score": "topk_softmax", "token_mask": torch.arange(5) > 1}):
        got = check_against_reference(logits, 2, backend, experts=experts, **options)
        assert (got.weights[got.experts < 0] == 0).all()
    whole = moe_triton.route(logits, 2, experts=experts, backend=backend)
    assert whole.experts[:3].tolist() == experts[:3].tolist()
    assert (whole.experts[3] >= 0).all()
    assert whole.experts[4].tolist() == [-1, -2]
    assert whole.num_tokens == 5
    assert whole.counts.sum() == 4


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_of_each_sequence(backend, masked):
    """They are those of its tokens alone, with their gradients."""
    logits = torch.randn(3, 7, 6, dtype=torch.float32).requires_grad_()
    mask = torch.rand(21) < 0.6 if masked else None
    options = {"score": "sigmoid", "backend": backend}
    got = moe_triton.route(logits.flatten(0, 1), 2, token_mask=mask, sequences=3, **options)
    outer = torch.randn(3, 6)
    (expected_grad,) = torch.autograd.grad((got.sequences.score_sums * outer).sum(), logits, retain_graph=True)
    for b in range(3):
        part = logits[b].detach().requires_grad_()
        alone = moe_triton.route(part, 2, token_mask=None if mask is None else mask.view(3, 7)[b], **options)
        assert torch.equal(got.sequences.counts[b], alone.counts)
        assert got.sequences.num_tokens[b] == alone.num_tokens
        assert_close(got.sequences.score_sums[b], alone.score_sums)
        (alone.score_sums * outer[b]).sum().backward()
        assert_close(expected_grad[b], part.grad)
    whole = moe_triton.route(logits.flatten(0, 1), 2, token_mask=mask, **options)
    assert whole.sequences is None
    for name in ("counts", "num_tokens", "experts", "weights"):
        assert torch.equal(getattr(got, name), getattr(whole, name))
    assert_close(got.score_sums, whole.score_sums)
    assert_close(got.z_sum, whole.z_sum)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits_are_computed_in_fp32(backend, dtype):
    logits = torch.randn(10, 8).to(dtype)
    got = moe_triton.route(logits, 2, backend=backend)
    want = moe_triton.route(logits.float(), 2, backend=backend)
    assert got.weights.dtype == torch.float32
    assert torch.equal(got.weights, want.weights)


def test_float64_stays_float64():
    logits = torch.randn(5, 8, dtype=torch.float64)
    for backend in ("auto", "torch", "reference"):
        assert moe_triton.route(logits, 2, backend=backend).weights.dtype == torch.float64
    with pytest.raises(TypeError, match=r"backend: got 'triton' for torch\.float64"):
        moe_triton.route(logits, 2, backend="triton")


def test_torch_backend_gradcheck():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def run(x):
        routing = moe_triton.route(x, 2, normalize=True, backend="torch")
        return routing.weights, routing.score_sums, routing.z_sum

    assert torch.autograd.gradcheck(run, logits)


def test_gumbel_noise_samples_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(20000, 3)
    torch.manual_seed(5)
    routing = moe_triton.route(logits, 1, noise="gumbel")
    share = routing.counts / 20000
    assert_close(share, logits[0].softmax(-1), tolerance=0.02)
    torch.manual_seed(5)
    assert torch.equal(routing.experts, moe_triton.route(logits, 1, noise="gumbel").experts)
    clean = logits.softmax(-1).gather(1, routing.experts.long())
    assert_close(routing.weights, clean)  # noise chooses, it never weighs
    assert torch.isfinite(gumbel_noise(logits)).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k: got 0, wanted 1 to 8"),
        ({"top_k": 9}, ValueError, "top_k: got 9, wanted 1 to 8"),
        ({"top_k": 2.0}, TypeError, "top_k: got 2.0, wanted an int"),
        (
            {"score": "softmin"},
            ValueError,
            "score: got 'softmin', wanted one of softmax, sigmoid, topk_softmax, sqrt_softplus",
        ),
        ({"num_groups": 3}, ValueError, "num_groups: got 3, wanted a divisor of num_experts=8"),
        ({"num_groups": 4, "top_groups": 5}, ValueError, "top_groups: got 5, wanted 1 to 4"),
        ({"num_groups": 8, "top_groups": 1}, ValueError, "top_k: got 2, wanted at most 1"),
        ({"choice_bias": torch.zeros(7)}, ValueError, r"choice_bias: got shape \[7\], wanted \[8\]"),
        ({"noise": "uniform"}, ValueError, "noise: got 'uniform', wanted one of gumbel"),
        ({"noise": torch.zeros(4, 7)}, ValueError, r"noise: got shape \[4, 7\], wanted \[4, 8\]"),
        ({"token_mask": torch.ones(5)}, ValueError, r"token_mask: got shape \[5\], wanted \[4\]"),
        ({"token_mask": torch.zeros(4)}, TypeError, r"token_mask: got dtype torch.float32, wanted torch.bool or"),
        ({"token_mask": [1, 1, 1, 1]}, TypeError, "token_mask: got list, wanted a Tensor"),
        (
            {"token_mask": torch.tensor([0.0, 0.0, float("-inf"), 0.0])},
            TypeError,
            "token_mask: got dtype torch.float32",
        ),
        ({"token_mask": torch.ones(4).half()}, TypeError, "token_mask: got dtype torch.float16, wanted torch.bool or"),
        ({"experts": torch.zeros(4, 3).int()}, ValueError, r"experts: got shape \[4, 3\], wanted \[4, 2\]"),
        ({"experts": torch.zeros(4, 2)}, TypeError, "experts: got dtype torch.float32, wanted torch.int32 or"),
        ({"sequences": 3}, ValueError, "sequences: got 3, wanted a divisor of the 4 tokens"),
        ({"weightless": 9}, ValueError, "weightless: got 9, wanted 0 to 8"),
        ({"scale": 10**309}, ValueError, "scale: got 1000"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "num_experts: got 0, wanted at least 1"),
        (
            {"logits": torch.zeros(4, 8).to_sparse()},
            TypeError,
            "logits: got layout torch.sparse_coo, wanted torch.strided",
        ),
        ({"scale": float("nan")}, ValueError, "scale: got nan"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda', wanted one of auto, triton, torch, reference"),
        ({"logits": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "logits: got dtype torch.int64"),
        ({"logits": torch.zeros(8)}, ValueError, r"logits: got shape \[8\], wanted \[T, E\]"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        moe_triton.route(**({"logits": torch.zeros(4, 8), "top_k": 2} | arguments))


# Sums that are computed when they are read ---------------------------------------------------------------------------


def unsummed(**options):
    torch.manual_seed(3)
    router = moe_triton.Router(12, 6, 2, backend="torch", **options).eval()
    x = torch.randn(5, 12)
    with torch.no_grad():
        lazy = router(x)
    return lazy, router(x.requires_grad_())


@pytest.mark.parametrize("options", [{}, {"score": "sigmoid", "scale": 2.5}, {"score": "topk_softmax"}])
def test_inference_computes_the_sums_when_one_is_read(options):
    lazy, whole = unsummed(**options)
    assert "counts" not in vars(lazy)
    assert torch.equal(lazy.z_sum, whole.z_sum)
    for name in ("experts", "weights", "counts", "score_sums", "num_tokens"):
        assert torch.equal(getattr(lazy, name), getattr(whole, name)), name
    assert lazy.counts is lazy.counts
    assert lazy.sequences is None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lazy.nothing  # noqa: B018


@pytest.mark.parametrize("copied", [replace, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_routing_without_sums_yet_can_be_copied(copied):
    lazy, whole = unsummed()
    assert torch.equal(copied(lazy).score_sums, whole.score_sums)


def test_a_public_call_computes_the_sums_at_once():
    logits = torch.randn(4, 6)
    routing = moe_triton.route(logits, 2)
    logits.zero_()  # the caller's own
    assert routing.z_sum > 0
    assert "counts" in vars(routing)
