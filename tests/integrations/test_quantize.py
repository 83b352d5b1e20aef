"""transformers models with quantised experts: generation, PEFT's adapters over them, and gpt-oss as the hub has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moe_triton import quantize, swap
from moe_triton.layers.quantized import QuantizedProjection, projection_of
from tests.helpers.compare import assert_close

VOCAB = 97


def tiny_gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=False,
    )  # fmt: skip
    return GptOssForCausalLM(config).eval()


def tiny_qwen3():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def twin_of(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """The same model with the numbers of its quantised projections as parameters, on transformers' own experts."""
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedProjection):
            state[name] = module.weight.dequantize(torch.float32)
    kept = {
        name: value for name, value in model.state_dict().items() if not any(name.startswith(f"{q}.") for q in state)
    }
    fresh.load_state_dict({**kept, **state})
    return fresh


@pytest.mark.parametrize("make", [tiny_gpt_oss, tiny_qwen3])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8", "int4"])
def test_generates_what_its_numbers_do(make, format):
    model = make()
    swap(model)
    report = quantize(model, format)
    assert [entry.kind for entry in report.quantized] == [type(model.model.layers[0].mlp.experts).__name__] * 2
    assert all(4 * entry.bytes_after < 1.2 * entry.bytes_before for entry in report.quantized)
    assert f"2 experts modules in {format}" in str(report)
    twin = twin_of(model, make())
    prompt = torch.randint(0, VOCAB, (2, 7))
    with torch.no_grad():
        assert_close(model(prompt).logits, twin(prompt).logits, tolerance=1e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), twin.generate(prompt, **options))


def test_gpt_oss_from_its_blocks(tmp_path: Path):
    """Saved in the hub's layout of mxfp4, loaded by transformers, which dequantises on a CPU, and quantised again."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    source = tiny_gpt_oss()
    swap(source)
    quantize(source, "mxfp4")
    tensors = {}
    for name, value in source.state_dict().items():
        owner, _, part = name.rpartition(".")
        if part in ("codes", "scales"):
            blocks = value.unflatten(2, (-1, 16)) if part == "codes" else value
            tensors[f"{owner}_{'blocks' if part == 'codes' else 'scales'}"] = blocks.contiguous()
        else:
            tensors[name] = value.bfloat16().contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(source.config.to_json_string())
    config |= {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model, info = GptOssForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    prompt = torch.randint(0, VOCAB, (2, 7))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    swap(model)
    before = model.generate(prompt, **options)
    quantize(model, "mxfp4")
    for layer, original in zip(model.model.layers, source.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            again, first = (projection_of(x.mlp.experts, name).dequantize() for x in (layer, original))
            assert torch.equal(again, first), name
    assert torch.equal(model.generate(prompt, **options), before)


@pytest.mark.parametrize("make", [tiny_gpt_oss, tiny_qwen3])
def test_peft_trains_adapters_over_it(make):
    from peft import LoraConfig, get_peft_model

    model = make()
    swap(model)
    experts = "mlp.experts"
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=[], target_parameters=[f"{experts}.gate_up_proj", f"{experts}.down_proj"]
    )
    model = get_peft_model(model, config)
    report = quantize(model, "mxfp4")
    assert len(report.quantized) == 2
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4
    text = torch.randint(0, VOCAB, (4, 16))
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    with pytest.raises(ValueError, match="merge: got quantised projections"):
        model.merge_and_unload()


def test_what_it_refuses():
    model = tiny_qwen3()
    with pytest.raises(ValueError, match="model: got no experts that run on moe_triton"):
        quantize(model, "mxfp4")
    with pytest.raises(TypeError, match="model: got str"):
        quantize("model", "mxfp4")
    swap(model)
    quantize(model, "int8", group=32)
    with pytest.raises(ValueError, match=r"gate_up_proj is quantised, wanted a parameter"):
        quantize(model, "mxfp4")
