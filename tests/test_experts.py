"""moe_triton.moe_mlp on every backend against the reference in float64, forward and every gradient; its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_triton
from moe_triton import reference
from moe_triton.records import ACTIVATIONS, GATED, ExpertCall, ExpertParameters, ExpertSpec
from tests.helpers.compare import assert_close
from tests.helpers.pairs import every_pair
from tests.helpers.problems import INPUTS, expected_of

BACKENDS = ["torch", "triton"]


def make_case(
    num_tokens=23,
    width=10,
    inner=7,
    num_experts=5,
    top_k=2,
    activation="swiglu",
    bias=False,
    is_transposed=False,
    seed=0,
    dtype=torch.float32,
):
    """Inputs of moe_mlp over ragged routing in which the last expert is empty and some ids are to be skipped."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(dtype)

    rows = 2 * inner if activation in GATED else inner
    ids = torch.arange(-1, num_experts + 1)
    ids = ids[ids != num_experts - 1]
    experts = ids[torch.randint(0, len(ids), (num_tokens, top_k), generator=draw)]
    up, down = normal(num_experts, rows, width), normal(num_experts, width, inner)
    parameters = {
        "gate_up_proj": up.mT.contiguous() if is_transposed else up,
        "down_proj": down.mT.contiguous() if is_transposed else down,
        "gate_up_bias": normal(num_experts, rows) if bias else None,
        "down_bias": normal(num_experts, width) if bias else None,
    }
    weights = torch.rand(num_tokens, top_k, generator=draw).to(dtype if dtype == torch.float64 else torch.float32)
    return normal(num_tokens, width), experts, weights, parameters


def leaves(x, weights, parameters):
    tensors = {"hidden_states": x, "top_k_weights": weights, **parameters}
    return {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}


def compare_with_reference(case, backend, *, capacity=None, tolerance=None, recompute=False, **options):
    x, experts, weights, parameters = case
    got = leaves(x, weights, parameters)
    out = moe_triton.moe_mlp(
        top_k_index=experts, backend=backend, capacity=capacity, recompute=recompute, **got, **options
    )
    plan = reference.dispatch(experts, len(parameters["gate_up_proj"]), capacity=capacity)
    given = ExpertParameters(*parameters.values())
    call = ExpertCall(hidden=x, weights=weights, dispatched=plan, parameters=given, spec=ExpertSpec(**options))
    grad = torch.randn_like(out)
    expected = expected_of(call, grad)
    assert out.dtype == x.dtype
    assert_close(out, expected["out"], tolerance=tolerance)
    out.backward(grad)
    for name, leaf in zip(INPUTS, got.values(), strict=False):  # the adapters come last: there are none here
        if leaf is None:
            continue
        assert leaf.grad is not None, name
        assert leaf.grad.dtype == leaf.dtype
        scale = None
        if name == "weights" and expected[name].numel():
            # each entry is a cancelling sum over d: scale by what was summed
            scale = max(expected[name].square().mean().sqrt().item(), 1e-30)
        assert_close(leaf.grad, expected[name], tolerance=tolerance, scale=scale)


@every_pair(activation=list(ACTIVATIONS), backend=BACKENDS, bias=[False, True])
def test_activations(backend, activation, bias):
    compare_with_reference(make_case(activation=activation, bias=bias), backend, activation=activation)


@every_pair(
    backend=BACKENDS, activation=["swiglu", "gpt_oss"], is_transposed=[False, True], is_concatenated=[False, True]
)
def test_layouts(backend, activation, is_transposed, is_concatenated):
    case = make_case(activation=activation, bias=True, is_transposed=is_transposed)
    compare_with_reference(
        case, backend, activation=activation, is_transposed=is_transposed, is_concatenated=is_concatenated
    )


LIMITS = [
    {"activation": "swiglu", "activation_limit": 0.4},
    {"activation": "swiglu", "activation_limit": 0.4, "activation_alpha": 1.702, "is_concatenated": False},
    {"activation": "gpt_oss", "activation_limit": 0.5},
    {"activation": "gpt_oss", "activation_alpha": 1.0, "is_concatenated": False},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_limits(backend, options):
    compare_with_reference(make_case(bias=True), backend, **options)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("activation", ["swiglu", "gpt_oss"])
def test_the_gradient_at_a_limit_is_the_one_that_passes(backend, activation):
    """One row, whose gate and up are exactly at the limit, then just above it."""
    dtype = torch.float32
    up, down = torch.eye(2, dtype=dtype)[None], torch.ones(1, 2, 1, dtype=dtype)
    index, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=dtype)
    for value, passes in ((1.5, True), (-1.5, True), (1.5000001, False)):
        x = torch.tensor([[abs(value), value]], dtype=dtype, requires_grad=True)
        options = {"activation": activation, "activation_limit": 1.5, "backend": backend}
        moe_triton.moe_mlp(x, index, weights, up, down, **options).sum().backward()
        assert (x.grad != 0).tolist() == [[passes, passes]]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_ragged(backend, data):
    case = make_case(
        num_tokens=data.draw(st.integers(0, 40)),
        width=data.draw(st.integers(1, 34)),
        inner=data.draw(st.integers(1, 20)),
        num_experts=data.draw(st.integers(2, 9)),
        top_k=data.draw(st.integers(1, 4)),
        bias=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 999)),
    )
    compare_with_reference(case, backend, capacity=data.draw(st.sampled_from([None, 0, 1, 5])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_with_all_tokens(backend):
    x, experts, weights, parameters = make_case(num_tokens=40)
    compare_with_reference((x, torch.full_like(experts, 1), weights, parameters), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_skipped(backend):
    x, experts, weights, parameters = make_case()
    compare_with_reference((x, torch.full_like(experts, -1), weights, parameters), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recompute_gives_the_same_bits(backend):
    case = make_case(bias=True)
    compare_with_reference(case, backend, recompute=True)
    grads = []
    for recompute in (False, True):
        x, experts, weights, parameters = case
        inputs = leaves(x, weights, parameters)
        out = moe_triton.moe_mlp(top_k_index=experts, backend=backend, recompute=recompute, **inputs)
        out.sum().backward()
        grads.append([out] + [leaf.grad for leaf in inputs.values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_equal_stacked_and_nothing_is_copied(backend):
    x, experts, weights, parameters = make_case(bias=True)
    stacked = leaves(x, weights, parameters)
    apart = {name: [w.detach().clone().requires_grad_() for w in p] for name, p in parameters.items()}
    out = moe_triton.moe_mlp(top_k_index=experts, backend=backend, **stacked)
    same = moe_triton.moe_mlp(x, experts, weights, backend=backend, **apart)
    assert torch.equal(out, same)
    grad = torch.randn_like(out)
    out.backward(grad)
    same.backward(grad)
    for name, tensors in apart.items():
        for e, tensor in enumerate(tensors):
            assert torch.equal(tensor.grad, stacked[name].grad[e]), (name, e)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_parameter_list_is_a_sequence(backend):
    x, experts, weights, parameters = make_case(bias=True)
    want = moe_triton.moe_mlp(x, experts, weights, backend=backend, **parameters)
    lists = {name: torch.nn.ParameterList(list(p)) for name, p in parameters.items()}
    out = moe_triton.moe_mlp(x, experts, weights, backend=backend, **lists)
    assert torch.equal(out, want)
    out.sum().backward()
    assert all(p.grad is not None for group in lists.values() for p in group[:-1])


@every_pair(name=["gate_up_proj", "down_proj", "gate_up_bias", "down_bias"], backend=BACKENDS, frozen=[0, 2])
def test_a_sequence_with_one_frozen_expert(backend, name, frozen):
    x, experts, weights, parameters = make_case(bias=True)
    stacked = leaves(x, weights, parameters)
    moe_triton.moe_mlp(top_k_index=experts, backend=backend, **stacked).square().sum().backward()
    apart = {key: list(p) for key, p in parameters.items()}
    apart[name] = [w.clone().requires_grad_(e != frozen) for e, w in enumerate(parameters[name])]
    moe_triton.moe_mlp(x, experts, weights, backend=backend, **apart).square().sum().backward()
    for e, tensor in enumerate(apart[name]):
        if e == frozen:
            assert tensor.grad is None
        else:
            assert torch.equal(tensor.grad, stacked[name].grad[e]), e


@every_pair(sizes=[{"width": 0}, {"inner": 0}, {"width": 0, "inner": 0}], backend=BACKENDS, bias=[False, True])
def test_sizes_of_zero(backend, bias, sizes):
    """An empty sum is zero, so that with n = 0 only the down projection's bias is left."""
    compare_with_reference(make_case(bias=bias, **sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_with_and_without_autograd_and_twice(backend):
    x, experts, weights, parameters = make_case(bias=True)
    with torch.no_grad():
        plain = moe_triton.moe_mlp(x, experts, weights, backend=backend, **parameters)
    inputs = leaves(x, weights, parameters)
    first = moe_triton.moe_mlp(top_k_index=experts, backend=backend, **inputs)
    second = moe_triton.moe_mlp(top_k_index=experts, backend=backend, **inputs)
    assert torch.equal(plain, first)
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_expanded_inputs(backend):
    x, experts, weights, parameters = make_case()
    strided = torch.stack([x, x], 2)[:, :, 1]
    want = moe_triton.moe_mlp(x, experts, weights[:1].expand_as(weights).contiguous(), backend=backend, **parameters)
    got = moe_triton.moe_mlp(
        strided, experts.T.contiguous().T, weights[:1].expand_as(weights), backend=backend, **parameters
    )
    assert torch.equal(got, want)
    same_token = x[:1].expand(6, -1)
    alike = moe_triton.moe_mlp(
        same_token, experts[:1].expand(6, -1), weights[:1].expand(6, -1), backend=backend, **parameters
    )
    assert_close(alike, alike[:1].expand_as(alike))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_garbage_token_that_is_skipped_leaves_no_trace(backend):
    x, experts, weights, parameters = make_case()
    experts[3], x[3], weights[3] = -1, float("nan"), float("nan")
    inputs = leaves(x, weights, parameters)
    out = moe_triton.moe_mlp(top_k_index=experts, backend=backend, **inputs)
    assert torch.isfinite(out).all()
    assert (out[3] == 0).all()
    out.sum().backward()
    for name, leaf in inputs.items():
        if leaf is not None:
            assert torch.isfinite(leaf.grad).all(), name


@pytest.mark.parametrize("needs", ["hidden_states", "top_k_weights", "gate_up_proj", "down_proj"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_gradients(backend, needs):
    x, experts, weights, parameters = make_case()
    everything = leaves(x, weights, parameters)
    moe_triton.moe_mlp(top_k_index=experts, backend=backend, **everything).sum().backward()
    one = {name: leaf if leaf is None else leaf.detach() for name, leaf in everything.items()}
    one[needs] = one[needs].clone().requires_grad_()
    moe_triton.moe_mlp(top_k_index=experts, backend=backend, **one).sum().backward()
    assert torch.equal(one[needs].grad, everything[needs].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_on_the_torch_backend(dtype):
    case = make_case(num_tokens=64, width=32, inner=24, dtype=dtype, bias=True)
    compare_with_reference(case, "torch", tolerance=1.2e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_on_the_triton_backend(dtype):
    case = make_case(width=16, inner=16, dtype=dtype, bias=True)
    compare_with_reference(case, "triton", tolerance=1.2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_float64_and_gradcheck_on_the_torch_backend():
    x, experts, weights, parameters = make_case(num_tokens=5, width=4, inner=3, bias=True, dtype=torch.float64)
    inputs = list(leaves(x, weights, parameters).values())

    def run(*tensors):
        names = ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
        return moe_triton.moe_mlp(top_k_index=experts, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, inputs)
    with pytest.raises(TypeError, match="triton"):
        moe_triton.moe_mlp(x, experts, weights, backend="triton", **parameters)


def test_saved_for_backward_is_what_the_design_says():
    """Hidden states, pre-activation, router weights and the dispatch, besides the parameters: nothing else."""
    x, experts, weights, parameters = make_case(num_tokens=32, width=16, inner=24)
    inputs = leaves(x, weights, parameters)
    own = {leaf.data_ptr() for name, leaf in inputs.items() if leaf is not None and name != "hidden_states"}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        moe_triton.moe_mlp(top_k_index=experts, backend="torch", **inputs)
    activations = sum(t.numel() * 4 for t in saved if t.data_ptr() not in own and t.dtype == torch.float32)
    assert activations == 4 * (32 * 16 + 64 * 48)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        moe_triton.moe_mlp(top_k_index=experts, backend="torch", recompute=True, **inputs)
    assert sum(t.numel() * 4 for t in saved if t.data_ptr() not in own and t.dtype == torch.float32) == 4 * 32 * 16


def test_autocast():
    x, experts, weights, parameters = make_case(num_tokens=32, width=32, inner=24)
    inputs = leaves(x, weights, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_triton.moe_mlp(top_k_index=experts, **inputs)
    assert out.dtype == torch.float32
    narrow = {k: v if v is None or k == "top_k_weights" else v.detach().bfloat16() for k, v in inputs.items()}
    assert torch.equal(out, moe_triton.moe_mlp(top_k_index=experts, **narrow).float())
    with torch.autocast("cpu", torch.bfloat16):  # rows that an earlier layer already made narrow
        mixed = moe_triton.moe_mlp(top_k_index=experts, **(inputs | {"hidden_states": x.bfloat16()}))
    assert torch.equal(mixed, out.bfloat16())
    out.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in inputs.values() if leaf is not None)


X, IDS, W = torch.zeros(4, 6), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)
UP, DOWN = torch.zeros(3, 10, 6), torch.zeros(3, 6, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_states": torch.zeros(4, 6, 1)}, ValueError, r"hidden_states: got shape \[4, 6, 1\], wanted \[T, d\]"),
        ({"hidden_states": torch.zeros(4, 6).int()}, TypeError, "hidden_states: got dtype torch.int32"),
        ({"top_k_index": IDS[:3]}, ValueError, r"top_k_index: got shape \[3, 2\], wanted \[4, K\]"),
        ({"top_k_index": IDS.float()}, TypeError, "top_k_index: got dtype torch.float32"),
        ({"top_k_weights": W[:, :1]}, ValueError, r"top_k_weights: got shape \[4, 1\], wanted \[4, 2\]"),
        ({"top_k_weights": W.double()}, TypeError, "top_k_weights: got dtype torch.float64"),
        ({"gate_up_proj": UP[:, :9]}, ValueError, "gate_up_proj: got 9 rows of gate and up, wanted an even number"),
        ({"gate_up_proj": UP[:, :, :5]}, ValueError, r"gate_up_proj: got shape \[3, 10, 5\], wanted \[3, 10, 6\]"),
        ({"gate_up_proj": UP.half()}, TypeError, "gate_up_proj: got dtype torch.float16, wanted torch.float32"),
        ({"gate_up_proj": None}, TypeError, "gate_up_proj: got NoneType, wanted a Tensor or a sequence of tensors"),
        ({"gate_up_proj": (w for w in UP)}, TypeError, "gate_up_proj: got generator, wanted a Tensor or a sequence"),
        ({"gate_up_proj": torch.tensor(1.0)}, ValueError, "gate_up_proj: got a scalar"),
        ({"gate_up_proj": [None] * 3}, ValueError, "gate_up_proj: wanted"),
        ({"down_proj": None}, TypeError, "down_proj: got NoneType, wanted a Tensor or a sequence of tensors"),
        (
            {"down_proj": (w for w in DOWN)},
            TypeError,
            "down_proj: got generator, wanted a Tensor",
        ),
        ({"down_bias": (w for w in DOWN[:, :, 0])}, TypeError, "down_bias: got generator, wanted a Tensor"),
        ({"hidden_states": X.to_sparse()}, TypeError, "hidden_states: got layout torch.sparse_coo"),
        ({"gate_up_proj": []}, ValueError, "gate_up_proj: got no expert"),
        ({"gate_up_proj": [UP[0], UP[1], UP[2, :8]]}, ValueError, r"gate_up_proj\[2\]: got shape \[8, 6\]"),
        ({"down_proj": DOWN[:2]}, ValueError, r"down_proj: got shape \[2, 6, 5\], wanted \[3, 6, 5\]"),
        ({"down_proj": list(DOWN[:2])}, ValueError, "down_proj: got 2 tensors, wanted 3"),
        ({"down_bias": torch.zeros(3, 5)}, ValueError, r"down_bias: got shape \[3, 5\], wanted \[3, 6\]"),
        ({"gate_up_bias": torch.zeros(3, 5)}, ValueError, r"gate_up_bias: got shape \[3, 5\], wanted \[3, 10\]"),
        ({"is_transposed": True}, ValueError, "gate_up_proj: got shape"),
        ({"activation": "swish"}, ValueError, "activation: got 'swish', wanted one of swiglu"),
        ({"activation_limit": 0.0}, ValueError, "activation_limit: got 0.0, wanted a number > 0"),
        ({"activation_limit": float("inf")}, ValueError, "activation_limit: got inf, wanted a number > 0"),
        ({"activation_alpha": "1"}, TypeError, "activation_alpha: got '1', wanted a number"),
        ({"activation": "geglu", "activation_limit": 7.0}, ValueError, "activation_limit: got 7.0 for 'geglu', wanted"),
        ({"backend": "cutlass"}, ValueError, "backend: got 'cutlass'"),
        ({"capacity": -2}, ValueError, "capacity: got -2"),
        ({"down_proj": DOWN.to("meta")}, ValueError, "down_proj: got device meta, wanted cpu"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    good = {"hidden_states": X, "top_k_index": IDS, "top_k_weights": W, "gate_up_proj": UP, "down_proj": DOWN}
    moe_triton.moe_mlp(**good)
    with pytest.raises(error, match=message):
        moe_triton.moe_mlp(**(good | arguments))


def test_a_call_that_passed_lets_no_other_pass() -> None:
    """What is remembered of a check has every size, dtype and layout in it."""
    dispatched = moe_triton.dispatch(torch.tensor([[0], [1]]), 2)
    x, weights = torch.randn(2, 4), torch.ones(2, 1)
    gate_up, down = torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    moe_triton.moe_experts(x, weights, dispatched, gate_up, down)
    for arguments, message in (
        ((x[:, :3], weights, dispatched, gate_up, down), "gate_up_proj: got shape"),
        ((x, weights[:, :0], dispatched, gate_up, down), "weights: got shape"),
        ((x, weights, dispatched, gate_up, down.half()), "down_proj: got dtype"),
        ((x, weights, dispatched, gate_up.to_sparse(), down), "gate_up_proj: got layout"),
        ((x, weights, dispatched, gate_up, down.to("meta")), "down_proj: got device"),
        ((x, weights, dispatched, gate_up, list(down[:1])), "down_proj: got 1 tensors"),
        ((x.tolist(), weights, dispatched, gate_up, down), "hidden_states: got list"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            moe_triton.moe_experts(*arguments)
    with torch.autocast("cpu", torch.bfloat16):  # here dtypes may differ, which is not remembered
        moe_triton.moe_experts(x, weights, dispatched, gate_up, down.half())
    with pytest.raises(TypeError, match="down_proj: got dtype"):
        moe_triton.moe_experts(x, weights, dispatched, gate_up, down.half())
