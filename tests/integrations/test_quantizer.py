"""Our quantizer behind transformers' `from_pretrained`, `save_pretrained` and Trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from moe_triton import MoeTritonConfig, quantize, swap
from moe_triton.integrations.registration import register_quantizer
from moe_triton.layers.quantized import QuantizedProjection, projection_of
from tests.integrations.test_quantize import VOCAB, tiny_gpt_oss, tiny_qwen3, twin_of

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TEXT = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))


def adapters() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=16, target_modules=[], target_parameters=PARAMETERS)


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TEXT).logits


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": buffer
        for name, module in model.named_modules()
        if isinstance(module, QuantizedProjection)
        for part, buffer in module.named_buffers()
    }


def same_bits(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = codes(model), codes(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 8  # two parts of two projections of two layers
    for name, part in ours.items():
        assert part.dtype == theirs[name].dtype, name
        assert torch.equal(part.view(torch.uint8), theirs[name].view(torch.uint8)), name


def complete(folder: Path, **options: Any) -> nn.Module:
    """Load a model of whose checkpoint nothing is left over, and which misses nothing."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (tiny_gpt_oss, {"format": "mxfp4"}),
        (tiny_qwen3, {"format": "nvfp4"}),
        (tiny_qwen3, {"format": "fp8"}),
        (tiny_gpt_oss, {"format": "int4", "symmetric": False}),
    ],
)
def test_the_same_bits_on_every_way(make, how, tmp_path):
    """Quantised while loading, by `quantize`, and loaded again without being asked for."""
    plain = saved(make().bfloat16(), tmp_path / "plain")
    asked = complete(plain, quantization_config=MoeTritonConfig(**how), dtype=torch.bfloat16)
    assert not [name for name, parameter in asked.named_parameters() if name.endswith("_proj") and parameter.dim() == 3]
    made = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    swap(made)
    quantize(made, **how)
    same_bits(asked, made)
    for number, model in enumerate((asked, made)):
        folder = saved(model, tmp_path / str(number))
        again = complete(folder, dtype=torch.bfloat16)
        same_bits(model, again)
        assert torch.equal(logits(model), logits(again))
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == how["format"]
    assert made.hf_quantizer.is_serializable()
    assert made.hf_quantizer.is_trainable
    assert made.hf_quantizer.is_compileable


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gpt_oss])
def test_trainer_over_a_loaded_base(make, tmp_path):
    """The base as codes and the adapters in folders of their own; both together are the model that was trained."""
    base = saved(complete(saved(make(), tmp_path / "plain"), quantization_config=MoeTritonConfig()), tmp_path / "base")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=5, per_device_train_batch_size=2, learning_rate=2e-2,
        logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TEXT]
    model = complete(base)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments, train_dataset=rows)
    before = codes(model)
    torch.manual_seed(0)
    model = get_peft_model(model, adapters())
    assert len([parameter for parameter in model.parameters() if parameter.requires_grad]) == 2 * 4
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    for (name, part), now in zip(before.items(), codes(model).values(), strict=True):
        assert torch.equal(part, now), name
    apart = saved(model, tmp_path / "adapters")
    assert not (apart / "model.safetensors").exists()
    again = PeftModel.from_pretrained(complete(base), apart)
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(complete(base)))


def test_adapters_before_and_after_are_the_same():
    """PEFT finds the same parameters in a model that is quantised already."""
    first, second = tiny_qwen3(), tiny_qwen3()
    for model in (first, second):
        swap(model)
    quantize(first, "mxfp4")
    torch.manual_seed(0)
    after = get_peft_model(first, adapters())
    torch.manual_seed(0)
    before = get_peft_model(second, adapters())
    quantize(before, "mxfp4")
    assert second.hf_quantizer.quantization_config.format == "mxfp4"
    pairs = zip(after.named_parameters(), before.named_parameters(), strict=True)
    for (name, parameter), (other, expected) in pairs:
        assert name == other
        assert torch.equal(parameter, expected), name
        assert parameter.requires_grad == expected.requires_grad, name
    assert torch.equal(logits(after), logits(before))


def test_a_config_that_two_models_share(tmp_path):
    model = tiny_qwen3()
    other = type(model)(model.config)
    swap(model)
    quantize(model, "mxfp4")
    assert model.config is model.model.config
    assert model.config.quantization_config.format == "mxfp4"
    assert not hasattr(other.config, "quantization_config")
    complete(saved(other, tmp_path))


def test_experts_that_stay(tmp_path):
    kept = "model.layers.1.mlp.experts"
    config = MoeTritonConfig("int4", modules_to_not_convert=[kept])
    model = complete(saved(tiny_qwen3(), tmp_path / "plain"), quantization_config=config)
    again = complete(saved(model, tmp_path / "codes"))
    for found in (model, again):
        experts = [layer.mlp.experts for layer in found.model.layers]
        assert isinstance(experts[0].gate_up_proj, QuantizedProjection)
        assert isinstance(experts[1].gate_up_proj, nn.Parameter)
    assert torch.equal(logits(again), logits(model))


def test_dequantize(tmp_path):
    """transformers' `model.dequantize()` gives parameters with the numbers of the codes, which are saved as such."""
    model = tiny_gpt_oss()
    swap(model)
    quantize(model, "mxfp4")
    twin = twin_of(model, tiny_gpt_oss())
    model.dequantize(torch.float32)
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(projection_of(layer.mlp.experts, name), getattr(other.mlp.experts, name))
    plain = complete(saved(model, tmp_path))
    assert torch.equal(logits(plain), logits(twin))


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="format: got 'fp3'"):
        MoeTritonConfig("fp3")
    with pytest.raises(ValueError, match="group: got 16 for int4"):
        MoeTritonConfig("int4", group=16)
    with pytest.raises(ValueError, match="quant_method: got 'mxfp4'"):
        MoeTritonConfig(quant_method="mxfp4")
    plain = saved(tiny_qwen3(), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: weight: got 64 input columns for int4"):
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=MoeTritonConfig("int4", group=128))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM without experts"):
        AutoModelForCausalLM.from_pretrained(saved(dense, tmp_path / "dense"), quantization_config=MoeTritonConfig())
    folder = saved(complete(plain, quantization_config=MoeTritonConfig()), tmp_path / "codes")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.experts.down_proj.scales")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: missing in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_of_another_quantizer(tmp_path):
    """transformers itself refuses it: it loads gpt-oss of the hub by its own quantizer (docs/low_precision.md)."""
    folder = saved(tiny_gpt_oss(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized with Mxfp4Config but you are passing a MoeTritonConfig"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=MoeTritonConfig("mxfp4"))


def test_the_size_of_parameters_that_will_be_codes():
    """What transformers plans a device map by."""
    model = tiny_qwen3()
    quantizer = AUTO_QUANTIZER_MAPPING["moe_triton"](MoeTritonConfig("int4"), pre_quantized=False)
    sizes = {name: quantizer.param_element_size(model, name, value) for name, value in model.named_parameters()}
    assert {sizes[f"model.layers.1.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")} == {0.5}
    assert sizes["model.layers.1.mlp.gate.weight"] == sizes["lm_head.weight"] == 4
    model.config.distributed_config = "tensor parallel"
    with pytest.raises(ValueError, match="distributed_config: got one with quantization_config 'int4'"):
        quantizer.preprocess_model(model)


def test_registered_by_importing_moe_triton():
    """Before transformers here, and after it in this process."""
    register_quantizer()
    program = (
        "import moe_triton, sys\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers\n"
        "assert quantizers['moe_triton'].__name__ == 'MoeTritonHfQuantizer'\n"
        "assert moe_triton.MoeTritonConfig().quant_method == 'moe_triton'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
