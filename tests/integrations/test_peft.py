"""PEFT's LoRA on experts: the gradients of PEFT over transformers' eager experts, with no weight ever materialised."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layers
from torch import nn

import moe_triton
from moe_triton.integrations import peft as ours
from moe_triton.integrations import transformers as hf
from moe_triton.layers import MoE
from tests.helpers.adapters import (
    TOLERANCE,
    adapted,
    assert_equals_eager,
    assert_same,
    logits,
    lora_config,
    nothing_materialised,
    switch,
    token_ids,
    train_step,
)
from tests.helpers.compare import assert_close, relative_rms
from tests.helpers.families import FAMILIES, experts_modules, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    """Gradients, disabled, merged, and merged for good."""
    model = adapted(family)
    base = logits(tiny_model(family))
    assert_equals_eager(model)
    assert sum("lora" in name for name, p in model.named_parameters() if p.requires_grad) == 4 * len(
        experts_modules(model)
    )
    with nothing_materialised():
        expected = logits(model)
        with model.disable_adapter():
            assert_close(logits(model), base, tolerance=TOLERANCE)
        assert relative_rms(expected, base) > 0.01
        model.merge_adapter()
        assert_close(logits(model), expected, tolerance=5e-6)
        model.unmerge_adapter()
        assert_close(logits(model), expected, tolerance=5e-6)
        merged = model.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())
    assert_close(logits(merged), expected, tolerance=5e-6)


def test_the_materialised_way_is_noticed():
    model = adapted("mixtral")
    with nothing_materialised(), pytest.raises(AssertionError, match="made a tensor of the weight's size"):
        logits(model)


@pytest.mark.parametrize("broken", ["a", "b", "scaling"])
def test_the_comparison_can_fail(broken, monkeypatch):
    model = adapted("qwen3_moe")

    def wrong(wrapper: nn.Module, key: str, *version: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The expert fastest in A; slowest in B."""
        a, b = right(wrapper, key, *version)
        weight_a, weight_b = wrapper.lora_A[key].weight, wrapper.lora_B[key].weight
        if broken == "a":
            a = weight_a.view(-1, a.shape[0], a.shape[2]).transpose(0, 1)
        elif broken == "b":
            b = weight_b.view(b.shape[1], b.shape[0], -1).transpose(0, 1)
        else:
            a = 1.001 * a
        return a, b

    right = ours._unpacked
    monkeypatch.setattr(ours, "_unpacked", wrong)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_equals_eager(model)


# Ways to name what PEFT adapts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("targets", ["v4", "all-linear"])
def test_names_of_transformers_4(family, targets):
    """PEFT rewrites them for the fused parameters; gate and up then have one adapter of twice the rank."""
    v4 = ["w1", "w2", "w3"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    model = adapted(family, torch.float64, target_modules=v4 if targets == "v4" else targets, target_parameters=None)
    experts = experts_modules(model)[0]
    wrappers = [m for m in model.modules() if isinstance(m, peft_layers.ParamWrapper) and m.get_base_layer() is experts]
    ranks = {m.parameter_name: m.r["default"] for m in wrappers}
    assert ranks == {"gate_up_proj": 6, "down_proj": 3}
    assert_equals_eager(model, tolerance=1e-12)


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_one_parameter_only(parameter):
    assert_equals_eager(adapted("gpt_oss", target_parameters=[f"experts.{parameter}"]))


def test_biases_beside_projections():
    """PEFT adapts a bias [E, 2n] as one matrix; that stays PEFT's own way."""
    names = ["gate_up_proj", "gate_up_proj_bias", "down_proj"]
    assert_equals_eager(adapted("gpt_oss", target_parameters=[f"experts.{name}" for name in names]))


def test_modules_to_save_and_rslora():
    model = adapted(
        "qwen3_moe", torch.float64, use_rslora=True, modules_to_save=["gate"], rank_pattern={".*down_proj": 5}
    )
    assert_equals_eager(model, tolerance=1e-12)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("gate.modules_to_save" in name for name in trained)


def test_several_adapters():
    model = adapted("qwen3_moe")
    model.add_adapter("second", lora_config(r=2, lora_alpha=1))
    switch(model, "moe_triton")
    by_name = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        assert_equals_eager(model)
        by_name[name] = logits(model)
    assert relative_rms(by_name["second"], by_name["default"]) > 0.01
    model.base_model.set_adapter(["default", "second"])
    assert_equals_eager(model)
    both = logits(model)
    assert_close(logits(model.merge_and_unload(adapter_names=["default", "second"])), both, tolerance=5e-6)


def test_save_and_load(tmp_path):
    model = adapted("gpt_oss")
    switch(model, "moe_triton")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = tiny_model("gpt_oss")
    base.set_experts_implementation("moe_triton")
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with nothing_materialised():
        assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "does not work with lora_dropout != 0"),
        ({"use_dora": True}, "does not work with use_dora=True"),
        ({"lora_bias": True}, "does not work with lora_bias=True"),
    ],
)
def test_what_peft_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        adapted("mixtral", **options)


def test_export_wants_merged_adapters(tmp_path):
    with pytest.raises(ValueError, match=r"model: has adapters of PEFT, wanted model.merge_and_unload\(\) first"):
        moe_triton.export_safetensors(tmp_path / "model.safetensors", adapted("mixtral"))


# Numbers, gates, layers -----------------------------------------------------------------------------------------------


def test_float64():
    assert_equals_eager(adapted("gpt_oss", torch.float64), tolerance=1e-12)


def test_on_the_kernels():
    model = adapted("qwen3_moe")
    expected = train_step(model)
    moe_triton.swap(model, backend="triton")
    with nothing_materialised():
        assert_same(train_step(model), expected, 1e-6)


def test_fp32_adapters_of_a_bf16_model():
    """Against the same model in float64: no worse than PEFT on the eager experts."""
    model = adapted("mixtral", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    exact = copy.deepcopy(model).double()
    switch(exact, "eager")
    expected = logits(exact)
    eager = relative_rms(logits(model), expected)
    switch(model, "moe_triton")
    with nothing_materialised():
        actual = relative_rms(logits(model), expected)
    assert 0 < actual <= 1.25 * eager


def test_a_gate_that_is_called():
    model = adapted("qwen3_moe")
    for module in experts_modules(model):
        module.act_fn = nn.Softplus()
        assert hf.fused_activation(module) is None
    assert_equals_eager(model)


def test_our_own_layer():
    torch.manual_seed(0)
    layer = MoE(16, 12, 4, 2, dtype=torch.float64)
    moe_triton.swap(layer)  # PEFT is imported: its wrapper hands factors over from now on
    model = get_peft_model(nn.Sequential(layer), lora_config(target_modules=[]))
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    with nothing_materialised():
        out = model(x).output
        out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 4
    assert all(grad.abs().max() > 0 for grad in grads.values())
    assert layer.experts.get_base_layer().gate_up_proj.grad is None
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(merged(x).output, out)

    deltas = {}
    for wrapper in (layer.experts, layer.experts.base_layer):  # dL/dW of the merged layer gives those of A and B
        deltas[wrapper.parameter_name] = wrapper.get_delta_weight("default")
    dense = merged[0]
    for parameter in dense.experts.parameters():
        parameter.requires_grad_()
    dense(x).output.square().sum().backward()
    for name, delta in deltas.items():
        factors = [p for n, p in model.named_parameters() if p.requires_grad]
        expected = torch.autograd.grad(delta, factors, dense.experts.get_parameter(name).grad, allow_unused=True)
        for key, grad in zip(grads, expected, strict=True):
            if grad is not None:
                assert_close(grads[key], grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = adapted("qwen3_moe")
    switch(model, "moe_triton")
    expected = train_step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with nothing_materialised():
        actual = train_step(model)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def largest_saved(model: nn.Module) -> int:
    """Elements of the largest tensor that backward keeps, the model's own parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.train()(input_ids=token_ids(), labels=token_ids())
    return max(sizes)


def test_nothing_of_a_weights_size_is_kept_for_backward():
    model = adapted("qwen3_moe")
    weight = experts_modules(model)[0].down_proj.numel()
    assert largest_saved(model) > weight
    switch(model, "moe_triton")
    assert largest_saved(model) < weight


def test_torch_compile():
    """One graph: PEFT's own way breaks it at every adapted parameter."""
    model = adapted("gpt_oss")
    switch(model, "moe_triton")
    expected = train_step(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad(set_to_none=True)
    compiled(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative_rms(parameter.grad, expected[f"grad.{name}"]) <= 1e-6, name
