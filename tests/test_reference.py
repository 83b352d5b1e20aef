"""The definitions themselves, against hand-computed facts and gradcheck in float64."""

from __future__ import annotations

import mpmath
import pytest
import torch

from moe_triton import expert_capacity, load_balance_loss, reference
from moe_triton.records import ACTIVATIONS, GATED, ExpertCall, ExpertParameters, ExpertSpec, RouterSpec
from tests.helpers.compare import assert_close, relative_rms

# The example of DeepSpeed's gate, whose results were executed there: four tokens, three experts.
LOGITS = torch.tensor([[2, 1, 0], [2, 0, 1], [3, 0, 0], [0, 2, 1]], dtype=torch.float64)


def balance(routing, top_k):
    return load_balance_loss(routing.counts, routing.score_sums, routing.num_tokens, top_k).item()


def test_top1_on_the_known_example():
    routing = reference.route(LOGITS, RouterSpec(top_k=1))
    assert routing.counts.tolist() == [3, 1, 0]
    assert balance(routing, 1) == pytest.approx(1.5065897, abs=1e-7)
    assert routing.weights[:, 0].tolist() == pytest.approx([0.665241, 0.665241, 0.909443, 0.665241], abs=1e-6)
    plan = reference.dispatch(routing.experts, 3, capacity=2)
    assert plan.position.flatten().tolist() == [0, 1, -1, 2]  # token 2 is the latest of expert 0
    assert plan.offsets.tolist() == [0, 2, 3, 3]


def test_token_mask_on_the_known_example():
    routing = reference.route(LOGITS, RouterSpec(top_k=1), token_mask=torch.tensor([1, 1, 0, 1]))
    assert routing.counts.tolist() == [2, 1, 0]
    assert routing.num_tokens.item() == 3
    # DeepSpeed's loss of this case, 1.0697231, has means over all 4 tokens and the masked token's probabilities in it
    scores = LOGITS.softmax(-1).sum(0)
    assert load_balance_loss(routing.counts, scores, torch.tensor(4.0), 1).item() == pytest.approx(1.0697231, abs=1e-7)


def test_top2_on_the_known_example():
    routing = reference.route(LOGITS, RouterSpec(top_k=2, normalize=True))
    assert routing.experts.tolist() == [[0, 1], [0, 2], [0, 1], [1, 2]]
    assert routing.weights[0].tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)
    assert routing.weights[2].tolist() == pytest.approx([0.952574, 0.047426], abs=1e-6)
    assert routing.counts.tolist() == [3, 3, 2]


def test_first_choices_precede_second_ones():
    logits = torch.tensor([[2.0, 1, 0]] * 2 + [[1.0, 2, 0]] * 2, dtype=torch.float64)
    experts = reference.route(logits, RouterSpec(top_k=2)).experts
    by_position = reference.dispatch(experts, 3, capacity=2).position >= 0
    by_choice = reference.dispatch(experts, 3, capacity=2, by_choice=True).position >= 0
    assert by_position.tolist() == [[True, True], [True, True], [False, False], [False, False]]
    assert by_choice.tolist() == [[True, False], [True, False], [True, False], [True, False]]


def test_probability_priority_keeps_the_highest_weights():
    logits = torch.tensor([[2, 1, 0, -1], [1, 2, 0, -1], [3, 2, 1, 0], [-1, -2, -3, -4]], dtype=torch.float64)
    routing = reference.route(logits, RouterSpec(top_k=3, normalize=True))
    assert routing.counts.tolist() == [4, 4, 4, 0]
    assert balance(routing, 3) == pytest.approx(1.2905885, abs=1e-7)
    plan = reference.dispatch(routing.experts, 4, capacity=2)
    weights = reference.renormalize(routing.weights, plan)
    assert weights[0].tolist() == pytest.approx([0.665241, 0.244728, 0.090031], abs=1e-6)
    assert weights[2:].abs().max() == 0
    by_weight = reference.dispatch(routing.experts, 4, capacity=1, keys=routing.weights)
    assert (by_weight.position >= 0).sum(0).sum().item() == 3
    assert (by_weight.position[1] >= 0).tolist() == [True, False, False]  # token 1 alone prefers expert 1


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_is_one_when_uniform(top_k):
    routing = reference.route(torch.zeros(6, 4, dtype=torch.float64), RouterSpec(top_k=top_k))
    assert balance(routing, top_k) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "floor", "wanted"),
    [
        (10, 4, 1.0, 0, 3),
        (10, 4, 1.25, 0, 4),
        (10, 4, 1.0, 4, 4),
        (7, 3, 1.1, 0, 3),
        (1000, 8, 1.1, 0, 138),
        (10, 1, 1.1, 0, 11),
        (0, 4, 1.0, 0, 0),
        (0, 4, 2.0, 4, 4),
    ],
)
def test_capacity(tokens, experts, factor, floor, wanted):
    assert expert_capacity(tokens, experts, 1, factor, floor) == wanted


def test_capacity_groups_equal_separate_runs():
    experts = torch.randint(0, 4, (24, 2), generator=torch.Generator().manual_seed(1))
    together = reference.dispatch(experts, 4, capacity=3, capacity_groups=3).position >= 0
    apart = [reference.dispatch(part, 4, capacity=3).position >= 0 for part in experts.chunk(3)]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(together, reference.dispatch(experts, 4, capacity=9).position >= 0)


def test_nan_and_infinite_logits_give_distinct_experts():
    logits = torch.randn(5, 6)
    logits[0] = float("nan")
    logits[1, 2:] = float("nan")
    logits[2] = float("inf")
    logits[3] = float("-inf")
    experts = reference.route(logits, RouterSpec(top_k=6)).experts
    assert (experts.sort(-1).values == torch.arange(6)).all()
    assert experts[0].tolist() == experts[2].tolist() == experts[3].tolist() == [0, 1, 2, 3, 4, 5]
    assert experts[1, 2:].tolist() == [2, 3, 4, 5]


def test_groups_limit_the_choice():
    logits = torch.tensor([[9.0, 0, 5, 5, 4, 1]], dtype=torch.float64)
    best = reference.route(logits, RouterSpec(top_k=2, num_groups=3, top_groups=1, group_score="max"))
    assert best.experts.tolist() == [[0, 1]]
    sums = RouterSpec(top_k=2, score="sigmoid", num_groups=3, top_groups=1, group_score="top2_sum")
    assert reference.route(logits, sums).experts.tolist() == [[2, 3]]


def test_choice_bias_moves_choices_and_no_weight():
    logits = torch.randn(8, 4, dtype=torch.float64)
    spec = RouterSpec(top_k=1, score="sigmoid")
    routing = reference.route(logits, spec, choice_bias=torch.tensor([0.0, 0, 5, 0]))
    assert routing.experts.flatten().tolist() == [2] * 8
    assert torch.equal(routing.weights[:, 0], logits[:, 2].sigmoid())


def test_given_choices_take_the_place_of_the_choice():
    logits = torch.randn(5, 4, dtype=torch.float64)
    given = torch.tensor([[3, 0], [2, 2], [4, 1], [-1, 7], [0, 1]])
    spec, mask = RouterSpec(top_k=2, normalize=True, scale=2.0), torch.tensor([1, 1, 1, 1, 0])
    routing = reference.route(logits, spec, given=given, token_mask=mask)
    live = reference.route(logits, spec).experts[3].tolist()
    assert routing.experts.tolist() == [[3, 0], [2, -1], [-1, 1], live, [-1, -1]]
    pair = logits[0, [3, 0]].softmax(-1)
    assert_close(routing.weights[:3], torch.stack([2 * pair, *torch.tensor([[2.0, 0.0], [0.0, 2.0]]).double()]))
    assert routing.weights[4].tolist() == [0.0, 0.0]
    assert routing.counts.sum() == 6
    assert_close(routing.score_sums, logits[:4].softmax(-1).sum(0))
    assert routing.num_tokens == 4


SPECS = [
    RouterSpec(top_k=2),
    RouterSpec(top_k=3, normalize=True, scale=2.5),
    RouterSpec(top_k=2, score="sigmoid", normalize=True),
    RouterSpec(top_k=4, score="topk_softmax"),
    RouterSpec(top_k=2, num_groups=2, top_groups=1),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_route_gradcheck(spec):
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    given = torch.tensor([[5, 1, 0, 4], [1, 2, 3, 4], [2, -1, 2, 7]])[:, : spec.top_k]

    def differentiable(x, given=None):
        routing = reference.route(x, spec, token_mask=torch.tensor([1, 0, 1]), given=given)
        return routing.weights, routing.score_sums, routing.z_sum

    assert torch.autograd.gradcheck(differentiable, logits)
    assert torch.autograd.gradcheck(lambda x: differentiable(x, given), logits)


def experts(x, w, dispatched, gate_up, down, gate_up_bias=None, down_bias=None, spec=None):
    parameters = ExpertParameters(gate_up, down, gate_up_bias, down_bias)
    return reference.moe_experts(
        ExpertCall(hidden=x, weights=w, dispatched=dispatched, parameters=parameters, spec=spec or ExpertSpec())
    )


@pytest.mark.parametrize(
    ("activation", "limits"),
    [*((name, {}) for name in ACTIVATIONS), ("swiglu", {"activation_limit": 0.6, "activation_alpha": 1.3})],
)
def test_moe_experts_gradcheck(activation, limits):
    rows = 6 if activation in GATED else 3
    shapes = [(4, 5), (4, 2), (3, rows, 5), (3, 5, 3), (3, rows), (3, 5)]
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    choices = torch.tensor([[0, 2], [2, 0], [0, -1], [2, 3]])  # expert 1 is empty, two ids are skipped
    plan = reference.dispatch(choices, 3, capacity=2)

    def run(x, w, *parameters):
        return experts(x, w, plan, *parameters, ExpertSpec(activation=activation, **limits))

    assert torch.autograd.gradcheck(run, inputs)


def test_limits_of_a_gate():
    """Against the formulas, written with min and max; the slope is 1 at a limit itself and 0 beyond it."""
    gate, up = torch.tensor([[[-9.0, -2.0, 0.5, 2.0, 9.0]], [[9.0, 2.0, 1.0, -2.0, -9.0]]], dtype=torch.float64)
    for name, alpha, plus in (("swiglu", None, 0), ("swiglu", 1.7, 0), ("gpt_oss", None, 1), ("gpt_oss", 0.3, 1)):
        pair = torch.cat([gate, up], 1).requires_grad_()
        out = reference.activate(pair, name, limit=2.0, alpha=alpha)
        slope = alpha or (1.702 if plus else 1.0)
        g, u = gate.minimum(torch.tensor(2.0)), up.minimum(torch.tensor(2.0)).maximum(torch.tensor(-2.0))
        torch.testing.assert_close(out.detach(), g / (1 + torch.exp(-slope * g)) * (u + plus))
        (grad,) = torch.autograd.grad(out.sum(), pair)
        passes = (grad != 0).view(2, 5)
        assert passes.tolist() == [[True] * 4 + [False], [False, True, True, True, False]]


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_gelu_far_from_zero(name):
    """Against 60 digits: a kernel's gradient of 1e-11 was once compared with four."""
    points = [-9.0, -7.5, -6.0, -1.0, 0.5, 3.0]

    def exact(x):
        if name == "gelu":
            return x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2
        return x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))) / 2

    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    y = reference.pointwise(x, name)
    (slope,) = torch.autograd.grad(y.sum(), x)
    with mpmath.workdps(60):
        for index, point in enumerate(points):
            assert float(exact(mpmath.mpf(point))) == pytest.approx(y[index].item(), rel=1e-12)
            assert float(mpmath.diff(exact, mpmath.mpf(point))) == pytest.approx(slope[index].item(), rel=1e-11)


def adapted_problem(is_transposed=False, is_concatenated=True):
    """Inputs of 3 experts with adapters of ranks 2 and 3, and a Dispatch with an empty expert and skipped ids."""
    spec = ExpertSpec(
        is_transposed=is_transposed, is_concatenated=is_concatenated, gate_up_scaling=0.5, down_scaling=3.0
    )
    shapes = [(3, 6, 5), (3, 5, 3)]
    shapes = [(e, columns, rows) if is_transposed else (e, rows, columns) for e, rows, columns in shapes]
    shapes = [(4, 5), (4, 2), *shapes, (3, 6), (3, 5), (3, 2, 5), (3, 6, 2), (3, 3, 3), (3, 5, 3)]
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    plan = reference.dispatch(torch.tensor([[0, 2], [2, 0], [0, -1], [2, 3]]), 3, capacity=2)

    def run(x, w, *parameters):
        given = ExpertParameters(*parameters)
        return reference.moe_experts(ExpertCall(hidden=x, weights=w, dispatched=plan, parameters=given, spec=spec))

    return run, inputs


def test_moe_experts_gradcheck_with_adapters():
    assert torch.autograd.gradcheck(*adapted_problem())


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_concatenated", [False, True])
def test_an_adapter_is_a_change_of_the_projection(is_transposed, is_concatenated):
    run, inputs = adapted_problem(is_transposed, is_concatenated)
    x, w, up, down, up_bias, down_bias, up_a, up_b, down_a, down_b = inputs
    changes = 0.5 * up_b @ up_a, 3.0 * down_b @ down_a
    merged = [p + (c.mT if is_transposed else c) for p, c in zip((up, down), changes, strict=True)]
    out = run(*inputs)
    assert_close(out, run(x, w, *merged, up_bias, down_bias))
    assert relative_rms(out, run(*inputs[:6])) > 0.1
    assert relative_rms(out, run(x, w, *merged, up_bias, down_bias, up_a, up_b)) > 0.1


def test_moe_experts_is_the_formula():
    """One token, one expert, by hand; and each layout says the same."""
    x, w1, w2 = torch.randn(1, 4).double(), torch.randn(1, 6, 4).double(), torch.randn(1, 4, 3).double()
    plan = reference.dispatch(torch.zeros(1, 1, dtype=torch.int32), 1)
    weight = torch.full((1, 1), 0.5, dtype=torch.float64)
    gate, up = w1[0, :3] @ x[0], w1[0, 3:] @ x[0]
    expected = 0.5 * (w2[0] @ (gate * torch.sigmoid(gate) * up))
    assert_close(experts(x, weight, plan, w1, w2)[0], expected)
    turned = ExpertSpec(is_transposed=True)
    assert_close(experts(x, weight, plan, w1.mT, w2.mT, spec=turned)[0], expected)
    woven = w1.view(1, 2, 3, 4).transpose(1, 2).reshape(1, 6, 4)
    assert_close(experts(x, weight, plan, woven, w2, spec=ExpertSpec(is_concatenated=False))[0], expected)


def test_the_comparison_fails_on_zeros_swapped_experts_and_a_dropped_token():
    x, w = torch.randn(16, 8), torch.rand(16, 2)
    w1, w2 = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    choices = torch.rand(16, 4).topk(2).indices
    plan = reference.dispatch(choices, 4)
    right = experts(x, w, plan, w1, w2)
    assert_close(right, right)
    swapped = experts(x, w, plan, w1[[1, 0, 2, 3]], w2)
    dropped = choices.clone()
    dropped[5, 1] = -1
    one_less = experts(x, w, reference.dispatch(dropped, 4), w1, w2)
    for wrong in (torch.zeros_like(right), swapped, one_less, right + float("nan")):
        with pytest.raises(AssertionError):
            assert_close(wrong, right, tolerance=1.2e-2)
    assert relative_rms(torch.zeros_like(right), right) == pytest.approx(1.0)
    assert relative_rms(torch.ones(2), torch.zeros(2)) == float("inf")
