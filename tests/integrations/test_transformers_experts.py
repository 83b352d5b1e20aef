"""One experts module of transformers' interface at a time: layouts, gates, dtypes, skipped slots, torch.compile."""

from __future__ import annotations

from functools import wraps

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_triton import reference
from moe_triton.integrations import transformers as hf
from tests.helpers.experts_classes import experts_class, tiny_experts
from tests.helpers.experts_modules import (
    D,
    E,
    K,
    N,
    RmsNorm,
    T,
    assert_same,
    expected_results,
    make_experts,
    make_inputs,
    results,
)


@pytest.fixture(autouse=True)
def registered() -> None:
    hf.register()


LAYOUTS = [
    {},
    {"is_transposed": True},
    {"has_bias": True},
    {"is_concatenated": False},
    {"is_transposed": True, "has_bias": True, "is_concatenated": False},
    {"has_gate": False},
    {"has_gate": False, "is_transposed": True, "has_bias": True},
]


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_are_fused(layout, backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    module = make_experts(**layout, dtype=dtype)
    module.moe_triton_backend = backend
    x, index, weights = make_inputs(dtype)
    activation = hf.fused_activation(module).activation
    assert activation == ("swiglu" if module.has_gate else "silu")
    expected = expected_results(
        module, x, index, weights, lambda h: reference.activate(h, activation, module.is_concatenated)
    )
    actual = results(module(x, index, weights), module, x, weights)
    assert_same(actual, expected)
    assert torch.equal(actual["out"][9], torch.zeros(D, dtype=x.dtype))
    assert (actual["weights"][9] == 0).all()
    assert (actual["down_proj"][E - 1] == 0).all()


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize(
    ("act_fn", "name"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        (F.silu, "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        ("quick_gelu", None),
        ("gelu_fast", None),
        ("gelu_10", None),
        ("sigmoid", None),
        (torch.tanh, None),
    ],
)
def test_activations(act_fn, name, has_gate):
    module = make_experts(act_fn=act_fn, has_gate=has_gate)
    fused = hf.fused_activation(module)
    expected = hf.GATED.get(name) if has_gate else name
    assert fused == (None if expected is None else hf.Fused(expected))
    x, index, weights = make_inputs()

    def activate(h):
        return module._apply_gate(h) if has_gate else module.act_fn(h)

    expected = expected_results(module, x, index, weights, activate)
    assert_same(results(module(x, index, weights), module, x, weights), expected)


class ScaledSilu(nn.SiLU):
    """A subclass of an activation that we know, and not that activation."""

    def forward(self, x):
        return 2 * super().forward(x)


def squashed(self, h):
    gate, up = h.chunk(2, dim=-1)
    return self.act_fn(gate) * up.tanh()


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("layout", [{}, {"is_transposed": True, "has_bias": True}], ids=str)
@pytest.mark.parametrize("options", [{"gate": squashed}, {"act_fn": ScaledSilu()}], ids=["gate", "act_fn"])
def test_a_gate_that_we_do_not_know_is_called(options, layout, backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    module = make_experts(**options, **layout, dtype=dtype)
    module.moe_triton_backend = backend
    assert hf.fused_activation(module) is None
    x, index, weights = make_inputs(dtype)
    expected = expected_results(module, x, index, weights, module._apply_gate)
    assert_same(results(module(x, index, weights), module, x, weights), expected)
    fused = reference.activate(torch.randn(4, 2 * N, dtype=x.dtype), "swiglu")
    assert not torch.allclose(module._apply_gate(torch.randn(4, 2 * N, dtype=x.dtype)), fused)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("layout", [{}, {"is_transposed": True, "has_bias": True}, {"has_gate": False}], ids=str)
@pytest.mark.parametrize("gate", [None, squashed], ids=["fused", "called"])
def test_a_norm_of_every_experts_rows(gate, layout, backend):
    """Before the router weights multiply them; a skipped slot has no row, and no share in any gradient."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    act_fn = ScaledSilu() if gate and "has_gate" in layout else "silu"
    module = make_experts(act_fn=act_fn, gate=gate, post_expert_norm=RmsNorm(), **layout, dtype=dtype)
    module.moe_triton_backend = backend
    assert (hf.fused_activation(module) is None) == (gate is not None)
    x, index, weights = make_inputs(dtype)
    activate = module._apply_gate if module.has_gate else module.act_fn
    expected = expected_results(module, x, index, weights, activate)
    actual = results(module(x, index, weights), module, x, weights)
    assert_same(actual, expected)
    assert torch.equal(actual["out"][9], torch.zeros(D, dtype=dtype))
    assert (actual["weights"][9] == 0).all()


def test_a_gate_with_parameters_or_on_one_module_is_called():
    module = make_experts()
    module.scale = nn.Parameter(torch.randn(N, dtype=torch.float64))
    module._apply_gate = lambda h: torch.tanh(h[..., :N]) * h[..., N:] * module.scale
    assert hf.fused_activation(module) is None
    x, index, weights = make_inputs()
    expected = expected_results(module, x, index, weights, module._apply_gate)
    assert_same(results(module(x, index, weights), module, x, weights), expected)


# Gates that count by name ---------------------------------------------------------------------------------------------


def eager_results(module, x, index, weights):
    module.config._experts_implementation = "eager"
    expected = results(module(x, index, weights), module, x, weights)
    module.config._experts_implementation = "moe_triton"
    return expected


GPT_OSS, MINIMAX = "gpt_oss.GptOssExperts", "minimax_m3_vl.MiniMaxM3VLExperts"
DEEPSEEK = "deepseek_v4.DeepseekV4Experts"


@pytest.mark.parametrize(
    ("name", "change", "fused"),
    [
        (GPT_OSS, {"alpha": 1.5}, ("gpt_oss", 7.0, 1.5)),
        (GPT_OSS, {"limit": 5.0}, ("gpt_oss", 5.0, 1.702)),
        (GPT_OSS, {"limit": float("inf")}, None),
        (GPT_OSS, {"is_concatenated": True}, None),
        (MINIMAX, {"swiglu_alpha": 1.5, "swiglu_limit": 5}, ("gpt_oss", 5, 1.5)),
        (MINIMAX, {"swiglu_limit": None}, None),
        (MINIMAX, {"is_concatenated": False}, None),
        (DEEPSEEK, {"limit": 3.0}, ("swiglu", 3.0, None)),
        (DEEPSEEK, {"act_fn": nn.GELU()}, None),
    ],
    ids=str,
)
def test_a_gate_by_name_with_another_attribute(name, change, fused):
    """Fused with the module's own limit and alpha; called where it has none that we take.

    The flag says nothing to a gate that is called: it takes gate and up from where it always did.
    """
    module = tiny_experts(name)
    assert hf.fused_activation(module) is not None
    for attribute, value in change.items():
        setattr(module, attribute, value)
    assert hf.fused_activation(module) == fused
    if change.get("swiglu_limit", 1) is None:  # torch's clamp refuses a maximum of None
        return
    x, _, weights = make_inputs()
    index = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    expected = eager_results(module, x, index, weights)
    assert_same(results(module(x, index, weights), module, x, weights), expected)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_gate_by_name_in_every_other_layout_is_fused(is_transposed, has_bias):
    """Which way the weights lie and whether biases are added does not concern the gate."""
    gate = experts_class(GPT_OSS)._apply_gate
    module = make_experts(gate=gate, is_transposed=is_transposed, has_bias=has_bias, is_concatenated=False)
    module.alpha, module.limit = 1.702, 7.0
    assert hf.fused_activation(module) == ("gpt_oss", 7.0, 1.702)
    x, index, weights = make_inputs()
    expected = expected_results(module, x, index, weights, module._apply_gate)
    assert_same(results(module(x, index, weights), module, x, weights), expected)


def test_a_gate_that_only_has_the_name_is_called(monkeypatch):
    module = tiny_experts(GPT_OSS)
    assert hf.fused_activation(module) == ("gpt_oss", 7.0, 1.702)

    def other(self, gate_up):
        return gate_up[..., ::2] * gate_up[..., 1::2]

    original = type(module)._apply_gate
    other.__module__, other.__qualname__ = original.__module__, original.__qualname__
    monkeypatch.setattr(type(module), "_apply_gate", other)
    assert hf.fused_activation(module) is None


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, squashed], ids=["fused", "called"])
@pytest.mark.parametrize(
    ("hidden", "experts", "router"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float64),
        (torch.float64, torch.float64, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes(hidden, experts, router, gate):
    module = make_experts(has_bias=True, gate=gate, dtype=experts)
    x, index, weights = make_inputs(hidden, router)
    actual = results(module(x, index, weights), module, x, weights)
    assert [actual[name].dtype for name in ("out", "x", "weights", "down_proj")] == [hidden, hidden, router, experts]
    exact = make_experts(has_bias=True, gate=gate)
    exact.load_state_dict(module.state_dict())
    wide_x, wide_weights = (t.detach().double().requires_grad_() for t in (x, weights))
    expected = expected_results(exact, wide_x, index, wide_weights, exact._apply_gate)
    coarsest = max((hidden, experts, router), key=lambda dtype: torch.finfo(dtype).eps)
    assert_same(actual, expected, {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[coarsest])


@pytest.mark.parametrize("gate", [None, squashed], ids=["fused", "called"])
def test_autocast(gate):
    module = make_experts(has_bias=True, gate=gate, dtype=torch.float32)
    x, index, weights = make_inputs(torch.float32)
    expected = expected_results(module, x, index, weights, module._apply_gate)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, index, weights)
    assert out.dtype == torch.float32
    actual = results(out, module, x, weights)
    assert not torch.allclose(actual["out"], expected["out"], rtol=1e-5)  # the products did run in bf16
    assert_same(actual, expected, tolerance=3e-2)


@pytest.mark.parametrize("gate", [None, squashed], ids=["fused", "called"])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_assignment_gives_zeros(num_tokens, gate):
    module = make_experts(has_bias=True, gate=gate)
    x = torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_tokens, K, dtype=torch.float64, requires_grad=True)
    out = module(x, torch.full((num_tokens, K), E), weights)
    assert torch.equal(out, torch.zeros_like(x))
    out.sum().backward()
    for leaf in (x, weights, *module.parameters()):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


# torch.compile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "ops"),
    [
        (lambda: make_experts(), "moe_triton.experts"),
        (lambda: make_experts(act_fn=F.silu, has_gate=False, has_bias=True), "moe_triton.experts"),
        (lambda: tiny_experts("gpt_oss.GptOssExperts"), "moe_triton.experts"),
        (lambda: tiny_experts("nemotron_h.NemotronHExperts"), "moe_triton.experts"),
        (lambda: make_experts(gate=squashed, has_bias=True), "moe_triton.grouped_linear"),
        (lambda: tiny_experts("deepseek_v4.DeepseekV4Experts"), "moe_triton.experts"),
        (lambda: make_experts(post_expert_norm=RmsNorm()), "moe_triton.experts"),
        (lambda: make_experts(post_expert_norm=RmsNorm(), gate=squashed), "moe_triton.grouped_linear"),
    ],
    ids=["default", "ungated", "gpt_oss", "nemotron", "called", "deepseek_v4", "normalised", "called_normalised"],
)
def test_compile_without_a_graph_break(make, ops):
    from torch._dynamo.backends.debugging import aot_eager

    module = make()
    module.config._experts_implementation = "moe_triton"
    x, index, weights = make_inputs()
    expected = results(module(x, index, weights), module, x, weights)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for inner in graph.modules() for node in inner.graph.nodes)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert_same(results(compiled(x, index, weights), module, x, weights), expected)
    assert any(target.startswith(ops) for target in seen), seen


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "has_post_expert_norm", True), "post_expert_norm: got NoneType"),
        (lambda m: setattr(m, "has_gate", False), "up_proj: got NoneType"),
        (lambda m: setattr(m, "has_bias", True), "gate_up_proj_bias: got NoneType"),
        (lambda m: setattr(m, "down_proj", None), "down_proj: got NoneType"),
        (lambda m: setattr(m, "down_proj", nn.Parameter(torch.randn(D, N))), r"down_proj: got shape \[16, 12\]"),
        (
            lambda m: setattr(
                m, "down_proj", nn.Parameter(torch.zeros(E, D, N, dtype=torch.int8), requires_grad=False)
            ),
            "down_proj: got dtype torch.int8",
        ),
    ],
)
def test_a_module_that_we_do_not_understand_is_refused(change, message):
    module = make_experts()
    x, index, weights = make_inputs()
    module(x, index, weights)
    change(module)
    with pytest.raises(ValueError, match=f"Experts: {message}"):
        module(x, index, weights)


def by_decorator(cls, value):
    """A flag as transformers adds one: a decorator's constructor sets it after the class's own."""
    original = cls.__init__

    @wraps(original)
    def constructor(self, config):
        original(self, config)
        self.is_sharded = value

    cls.__init__ = constructor
    return cls


def by_constructor(cls, value):
    def constructor(self, config):
        super(cls, self).__init__(config)
        self.is_sharded = value

    cls.__init__ = constructor
    return cls


def by_class(cls, value):
    cls.is_sharded = value
    return cls


@pytest.mark.parametrize("add", [by_decorator, by_constructor, by_class])
def test_a_flag_of_a_later_release(add):
    known = make_experts()
    module, other = (add(type("Experts", (type(known),), {}), value)(known.config) for value in (True, False))
    with pytest.raises(ValueError, match="Experts: is_sharded: got True, a flag that moe_triton does not know"):
        module(*make_inputs())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="is_sharded: got True"):
        torch.compile(module, backend="eager", fullgraph=True)(*make_inputs())
    assert hf.obstacle(other) is None


def test_register_without_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match="transformers >= 5"):
        hf.register()
