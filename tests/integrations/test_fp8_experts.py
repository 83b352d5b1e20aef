"""transformers' FP8Experts run by ours, over their own codes, against their dequantised numbers on transformers'."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_triton import QuantizedWeight, swap
from moe_triton.integrations import fp8_experts
from moe_triton.integrations import transformers as hf
from moe_triton.records import ExpertSpec
from moe_triton.reference import activate
from tests.helpers.compare import assert_close

T, D, N, E, K = 12, 256, 128, 4, 2


def make_experts(expert_dtype: str = "fp8", block_size: tuple[int, int] | None = (128, 128), **config: Any) -> Any:
    """One FP8Experts module as transformers makes it, with random projections in its format."""
    from transformers.integrations import finegrained_fp8
    from transformers.integrations.moe import use_experts_implementation

    hf.register()
    cls = use_experts_implementation(
        type("FP8Experts", (finegrained_fp8.FP8Experts,), {}),
        experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS,
    )
    given = {"hidden_size": D, "moe_intermediate_size": N, "num_experts": E, "hidden_act": "silu", **config}
    scale_fmt = "ue8m0" if expert_dtype == "fp4" else "float"
    settings = SimpleNamespace(**given, _experts_implementation=hf.KEY, expert_dtype=expert_dtype)
    options = (
        {"expert_dtype": expert_dtype}
        if "expert_dtype" in finegrained_fp8.FP8Experts.__init__.__code__.co_varnames
        else {}
    )
    module = cls(settings, block_size=block_size, scale_fmt=scale_fmt, **options)
    torch.manual_seed(0)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name)
        rows, columns = weight.shape[1], weight.shape[2] * (2 if expert_dtype == "fp4" else 1)
        made = QuantizedWeight.quantize(
            torch.randn(E, rows, columns) / columns**0.5, "mxfp4" if expert_dtype == "fp4" else "fp8"
        )
        weight.data = made.codes.view(weight.dtype)
        scales = getattr(module, f"{name}_scale_inv")
        if block_size is not None:
            scales.data = made.scales.view(scales.dtype)
        else:
            scales.data = torch.rand_like(scales) / 64
    return module


def numbers(module: Any, name: str) -> Tensor:
    """By transformers' own rule, or that of mxfp4."""
    from transformers.integrations import finegrained_fp8

    weight, scales = getattr(module, name).detach(), getattr(module, f"{name}_scale_inv").detach()
    if weight.dtype == torch.int8:
        return QuantizedWeight.from_mxfp4(weight.view(torch.uint8), scales.view(torch.uint8)).dequantize(torch.float32)
    if module.block_size is None:
        return weight.float() * scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    return finegrained_fp8._dequantize_fp8_weight(weight, scales, list(module.block_size), torch.float32)


def expected_of(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    gate_up, down = numbers(module, "gate_up_proj"), numbers(module, "down_proj")
    for t in range(len(x)):
        for k in range(index.shape[1]):
            e = int(index[t, k])
            out[t] += weights[t, k] * (down[e] @ module._apply_gate((gate_up[e] @ x[t])[None])[0])
    return out


def call() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    index = torch.rand(T, E).topk(K).indices
    return torch.randn(T, D), index, torch.rand(T, K)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": None},
        {"swiglu_limit": 0.7},
        {"swiglu_limit": 0.7, "swiglu_alpha": 1.702},
        {"mlp_gate_softcap": 1.0, "mlp_up_softcap": 2.0},
        {"expert_dtype": "fp4"},
    ],
    ids=str,
)
def test_the_results_of_the_dequantised_experts(options: dict[str, Any]) -> None:
    module, (x, index, weights) = make_experts(**options), call()
    x.requires_grad_()
    out = module(x, index, weights)
    twin = x.detach().clone().requires_grad_()
    expected = expected_of(module, twin, index, weights)
    assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), [x])
    assert_close(grad, torch.autograd.grad(expected.sum(), [twin])[0])
    is_fused = hf.fused_activation(module) is not None
    assert is_fused == ("mlp_gate_softcap" not in options)


def test_nothing_is_copied() -> None:
    module = make_experts()
    found = fp8_experts.quantized_projection(module, "gate_up_proj")
    assert found.codes.data_ptr() == module.gate_up_proj.data_ptr()
    assert found.scales.data_ptr() == module.gate_up_proj_scale_inv.data_ptr()


def test_a_whole_model_is_swapped() -> None:
    """A tiny Qwen3-MoE whose experts transformers has replaced; its linear layers stay, since they need a GPU."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=97, hidden_size=D, intermediate_size=64, moe_intermediate_size=N, num_hidden_layers=2,
        num_experts=E, num_experts_per_tok=K, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    ids = torch.randint(0, 97, (1, 9))
    for layer in model.model.layers:
        fp8 = make_experts()
        fp8.config = model.config
        layer.mlp.experts.gate_up_proj.data = numbers(fp8, "gate_up_proj")
        layer.mlp.experts.down_proj.data = numbers(fp8, "down_proj")
        layer.fp8 = fp8
    expected = model(ids).logits
    for layer in model.model.layers:
        layer.mlp.experts = layer._modules.pop("fp8")
    report = swap(model)
    assert len(report.swapped) == 2
    assert report.skipped == []
    assert_close(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size": (64, 128)}, r"block_size: got \(64, 128\), wanted \(128, 128\)"),
        ({"moe_intermediate_size": 64}, r"gate_up_proj_scale_inv: got shape \[4, 2, 2\], wanted \[4, 1, 2\]"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], words: str) -> None:
    from transformers.integrations import finegrained_fp8

    hf.register()
    config = {"hidden_size": D, "moe_intermediate_size": N, "num_experts": E, "hidden_act": "silu"}
    block_size = change.pop("block_size", (128, 128))
    module = finegrained_fp8.FP8Experts(SimpleNamespace(**{**config, **change}), block_size=block_size)
    with pytest.raises(ValueError, match=words):
        fp8_experts.quantized_projection(module, "gate_up_proj")


def test_the_limits_are_those_of_the_gate() -> None:
    """An activation that only resembles ours would be noticed: `computes` tries the gate."""
    module = make_experts(swiglu_limit=0.7)
    fused = hf.fused_activation(module)
    assert fused == hf.Fused("swiglu", 0.7)
    x = torch.linspace(-2, 2, 2 * N, dtype=torch.float64).view(1, -1)
    spec = ExpertSpec(activation="swiglu", activation_limit=0.7)
    assert torch.allclose(module._apply_gate(x), activate(x, "swiglu", True, 0.7, spec.alpha))


def test_numbers_that_were_decoded_while_loading() -> None:
    module, (x, index, weights) = make_experts(), call()
    expected = module(x, index, weights)
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, nn.Parameter(numbers(module, name)))
    assert_close(module(x, index, weights), expected)
