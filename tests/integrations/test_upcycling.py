"""Upcycled models: the dense model's outputs, whatever the number of experts and their granularity."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import moe_triton
from moe_triton.layers import FeedForward, MoE
from tests.helpers.compare import assert_close, relative_rms

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}
BECOMES = {
    "Llama": ("MixtralForCausalLM", {"head_dim": 16}),
    "Mistral": ("MixtralForCausalLM", {"sliding_window": 8}),
    "Qwen2": ("Qwen2MoeForCausalLM", {}),
    "Qwen3": ("Qwen3MoeForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    "Olmo2": ("FlexOlmoForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "Granite": ("GraniteMoeForCausalLM", {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
}


def dense_model(name: str, **options: object) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **BECOMES[name][1], **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("name", "num_experts", "granularity", "top_k"),
    [*((name, 8, 2, 4) for name in BECOMES), ("Qwen3", 8, 1, None), ("Llama", 6, 3, 3), ("Olmo2", 1, 1, 1)],
)
def test_the_logits_are_the_dense_models(name, num_experts, granularity, top_k):
    dense = dense_model(name)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    model = moe_triton.upcycle(dense, num_experts, granularity, top_k)
    assert type(model).__name__ == BECOMES[name][0]
    assert not model.training
    expected = logits(dense)
    assert_close(logits(model), expected, tolerance=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in dense.parameters()) or num_experts == 1
    router = next(p for key, p in model.named_parameters() if key.endswith(("mlp.gate.weight", "router.weight")))
    assert router.unique(dim=0).shape[0] == num_experts // granularity


def test_on_our_experts_saved_and_trained(tmp_path):
    dense = dense_model("Qwen3")
    model = moe_triton.upcycle(dense, 4, 2, 4)
    moe_triton.swap(model)
    assert_close(logits(model), logits(dense), tolerance=1e-6)
    moe_triton.export_safetensors(tmp_path / "model.safetensors", model)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_close(logits(loaded), logits(dense), tolerance=1e-6)
    ids = torch.randint(0, 64, (2, 12))
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    assert type(dense.config).__name__ == "Qwen3Config"


def test_bf16_stays_bf16():
    dense = dense_model("Llama").bfloat16()
    model = moe_triton.upcycle(dense, 4, 2, 2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_close(logits(model).float(), logits(dense).float(), tolerance=0.03)


def test_what_is_not_exact_is_measured():
    dense = dense_model("Qwen3")
    with pytest.warns(UserWarning, match=r"differ from the dense model's by (\S+) \(.*normalize=False") as caught:
        model = moe_triton.upcycle(dense, 8, 2, 4, normalize=False)
    said = float(str(caught[0].message).split(" by ")[1].split(" ")[0])
    assert 1e-4 < said < 1
    assert 0.3 * said < relative_rms(logits(model), logits(dense)) < 3 * said
    with pytest.warns(UserWarning, match=r"reinitialize=0.5"):
        moe_triton.upcycle(dense, 4, reinitialize=0.5)


def test_reinitialized_columns_keep_their_statistics():
    torch.manual_seed(0)
    dense = FeedForward(16, 512)
    with torch.no_grad():
        dense.gate_up_proj.weight[:512].add_(1)
    with pytest.warns(UserWarning, match="reinitialize=0.25"):
        layer = moe_triton.upcycle(dense, 4, 2, 2, reinitialize=0.25)
    whole = dense.gate_up_proj.weight[:512].view(2, 256, 16)
    changed_EN = (layer.experts.gate_up_proj[:, :256] != whole.repeat(2, 1, 1)).any(-1)
    assert changed_EN.sum(1).tolist() == [64] * 4
    assert not torch.equal(changed_EN[0], changed_EN[2])  # two copies of a shard now differ
    for expert, changed in enumerate(changed_EN):
        new, old = layer.experts.gate_up_proj[expert, :256][changed], whole[expert % 2][changed]
        assert abs(new.mean() - old.mean()) < 0.02
        assert abs(new.std() / old.std() - 1) < 0.1
    down = 2 * dense.down_proj.weight[:, :256]
    assert ((layer.experts.down_proj[0] != down).any(0) == changed_EN[0]).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_our_own_layer(activation, bias):
    torch.manual_seed(0)
    dense = FeedForward(16, 24, activation=activation, bias=bias, dtype=torch.float64)
    layer = moe_triton.upcycle(dense, 6, 2, 4)
    assert isinstance(layer, MoE)
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    assert_close(layer(x).output, dense(x))
    with pytest.warns(UserWarning, match="normalize=False"):
        moe_triton.upcycle(dense, 4, normalize=False)


@pytest.mark.parametrize(
    ("name", "options", "arguments", "kind", "message"),
    [
        ("Llama", {}, (7, 2), ValueError, "num_experts: got 7, wanted a multiple of the granularity 2"),
        ("Llama", {}, (8, 2, 3), ValueError, "top_k: got 3, wanted a multiple of the granularity 2"),
        ("Llama", {}, (8, 1, 9), ValueError, "top_k: got 9, wanted 1 to 8"),
        ("Llama", {}, (10, 5), ValueError, "dense_model: intermediate_size: got 48, wanted a multiple of"),
        ("Llama", {"mlp_bias": True}, (4,), ValueError, "has mlp_bias=True, for which Mixtral has none"),
        ("Llama", {"attention_bias": True}, (4,), ValueError, "has attention_bias=True, for which Mixtral"),
        (
            "Qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            (4,),
            ValueError,
            "has layer_types=",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name, options, arguments, kind, message):
    with pytest.raises(kind, match=message):
        moe_triton.upcycle(dense_model(name, **options), *arguments)


def test_other_refusals():
    with pytest.raises(TypeError, match="dense_model: got Linear, wanted a FeedForward or one of LlamaForCausalLM"):
        moe_triton.upcycle(torch.nn.Linear(2, 2), 4)
    with pytest.raises(ValueError, match="normalize: got False, wanted True: Mixtral always normalises"):
        moe_triton.upcycle(dense_model("Llama"), 4, normalize=False)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="reinitialize: got"):
            moe_triton.upcycle(dense_model("Llama"), 4, reinitialize=share)
