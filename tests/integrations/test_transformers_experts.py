"""One experts module of transformers' interface at a time: layouts, gates, dtypes, skipped slots, torch.compile."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_triton import dispatch, reference
from moe_triton.integrations import called_gate
from moe_triton.integrations import transformers as hf
from moe_triton.integrations.called_gate import called_gate_mlp, grouped_linear
from moe_triton.records import ExpertSpec
from tests.helpers.compare import assert_close
from tests.helpers.experts_modules import (
    D,
    E,
    K,
    N,
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
    activation = hf.fused_activation(module)
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
    assert fused == (hf.GATED.get(name) if has_gate else name)
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


def test_a_gate_with_parameters_or_on_one_module_is_called():
    module = make_experts()
    module.scale = nn.Parameter(torch.randn(N, dtype=torch.float64))
    module._apply_gate = lambda h: torch.tanh(h[..., :N]) * h[..., N:] * module.scale
    assert hf.fused_activation(module) is None
    x, index, weights = make_inputs()
    expected = expected_results(module, x, index, weights, module._apply_gate)
    assert_same(results(module(x, index, weights), module, x, weights), expected)


# Every distinct body among the decorated classes of transformers 5.17. ------------------------------------------------

CLASSES = {
    "mixtral.MixtralExperts": "swiglu",
    "gpt_oss.GptOssExperts": "gpt_oss",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "gpt_oss",
    "minimax_m3_vl.MiniMaxM3VLExperts": "gpt_oss",
    "nemotron_h.NemotronHExperts": "relu2",
    "lfm2_moe.Lfm2MoeExperts": "swiglu",
    "ernie4_5_vl_moe.Ernie4_5_VLMoeMoeExperts": "swiglu",
    "qwen3_omni_moe.Qwen3OmniMoeThinkerTextExperts": "swiglu",
    "deepseek_v4.DeepseekV4Experts": None,
    "glm5_next.Glm5NextTextExperts": None,
    "hy_v4.HYV4Experts": None,
}


def real_experts(name, dtype=torch.float64):
    """An instance of a transformers class, with inputs large enough to reach its clamps."""
    family, cls = name.split(".")
    config = SimpleNamespace(
        hidden_size=D,
        **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts"], E),
        **dict.fromkeys(["intermediate_size", "moe_intermediate_size"], N),
        hidden_act="silu",
        mlp_hidden_act="relu2",
        moe_latent_size=None,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        _experts_implementation="eager",
    )
    module = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), cls)(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=2.0 if "bias" in cls else 1.5)
    return module.to(dtype)


@pytest.mark.parametrize(("name", "activation"), CLASSES.items())
def test_the_classes_of_transformers(name, activation):
    module = real_experts(name)
    assert hf.fused_activation(module) == activation
    x, _, weights = make_inputs()
    index = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    eager = module(x, index, weights)
    if name.startswith("openai"):  # its eager path multiplies in fp32
        eager, tolerance = eager.double(), 1e-6
    else:
        tolerance = None
    expected = results(eager, module, x, weights)
    module.config._experts_implementation = "moe_triton"
    assert_same(results(module(x, index, weights), module, x, weights), expected, tolerance)


@pytest.mark.parametrize(("name", "value"), [("alpha", 1.5), ("limit", 5.0)])
def test_gpt_oss_with_other_constants_is_called(name, value):
    module = real_experts("gpt_oss.GptOssExperts")
    setattr(module, name, value)
    assert hf.fused_activation(module) is None
    x, _, weights = make_inputs()
    index = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    expected = results(module(x, index, weights), module, x, weights)
    module.config._experts_implementation = "moe_triton"
    assert_same(results(module(x, index, weights), module, x, weights), expected)


def test_a_gate_that_only_has_the_name_is_called(monkeypatch):
    module = real_experts("gpt_oss.GptOssExperts")
    assert hf.fused_activation(module) == "gpt_oss"

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


# torch.compile and the custom operation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "ops"),
    [
        (lambda: make_experts(), "moe_triton.experts"),
        (lambda: make_experts(act_fn=F.silu, has_gate=False, has_bias=True), "moe_triton.experts"),
        (lambda: real_experts("gpt_oss.GptOssExperts"), "moe_triton.experts"),
        (lambda: real_experts("nemotron_h.NemotronHExperts"), "moe_triton.experts"),
        (lambda: make_experts(gate=squashed, has_bias=True), "moe_triton.grouped_linear"),
        (lambda: real_experts("deepseek_v4.DeepseekV4Experts"), "moe_triton.grouped_linear"),
    ],
    ids=["default", "ungated", "gpt_oss", "nemotron", "called", "deepseek_v4"],
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


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_grouped_linear_is_a_sound_operation(is_transposed, has_bias):
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)  # an idle expert, and two rows past the end
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, *((5, 4) if is_transposed else (4, 5)), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True) if has_bias else None
    torch.library.opcheck(grouped_linear, (x, weight, bias, offsets, is_transposed))
    assert torch.autograd.gradcheck(
        lambda *tensors: grouped_linear(
            tensors[0], tensors[1], tensors[2] if has_bias else None, offsets, is_transposed
        ),
        (x, weight, bias) if has_bias else (x, weight),
    )


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_grouped_linear_without_a_host_sync(is_transposed, has_bias, monkeypatch):
    """The way that bf16 takes on a GPU, on the CPU's grouped_mm, against the loop over experts."""
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    x = torch.randn(9, 16, requires_grad=True)
    weight = torch.randn(3, *((16, 8) if is_transposed else (8, 16)), requires_grad=True)
    bias = torch.randn(3, 8, requires_grad=True) if has_bias else None
    leaves = [x, weight, bias] if has_bias else [x, weight]
    upstream = torch.randn(9, 8)

    def run():
        out = grouped_linear(x, weight, bias, offsets, is_transposed)
        return out, *torch.autograd.grad(out, leaves, upstream)

    expected = run()
    monkeypatch.setattr(called_gate, "_sync_free", lambda a, b: True)
    monkeypatch.setattr(called_gate, "_ranges", None)  # the way with a host sync
    for actual, value in zip(run(), expected, strict=True):
        assert value.abs().max() > 0
        assert_close(actual, value)


def test_called_gate_equals_the_reference():
    x, index, weights = make_inputs()
    up, down = torch.randn(E, 2 * N, D, dtype=x.dtype), torch.randn(E, D, N, dtype=x.dtype)
    actual = called_gate_mlp(x, index, weights, up, down, lambda h: reference.activate(h, "geglu"))
    plan = dispatch(index, E)
    expected = reference.moe_mlp(x, weights, plan, up, down, None, None, ExpertSpec(activation="geglu"))
    assert_close(actual, expected)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "has_post_expert_norm", True), "has_post_expert_norm: got True"),
        (lambda m: setattr(m, "is_sharded", True), "is_sharded: got True"),
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


def test_a_flag_that_is_off_is_no_obstacle():
    module = make_experts()
    module.has_post_expert_norm = False
    assert hf.obstacle(module) is None


def test_register_without_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match="transformers >= 5"):
        hf.register()
