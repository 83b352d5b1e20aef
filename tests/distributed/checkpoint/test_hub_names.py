"""Export and load by the names of the hub: what transformers writes and reads, tensor for tensor."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter

from moe_triton import export_safetensors
from moe_triton.distributed import CheckpointError, load_experts_from
from tests.helpers.families import FAMILIES, experts_modules, tiny_model

# What the hub's own checkpoints of the families have, one name of each kind.
NAMES = {
    "mixtral": ("block_sparse_moe.experts.5.w1.weight", "block_sparse_moe.gate.weight"),
    "qwen2_moe": ("mlp.experts.7.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
    "qwen3_moe": ("mlp.experts.7.down_proj.weight", "mlp.gate.weight"),
    "olmoe": ("mlp.experts.7.up_proj.weight", "mlp.gate.weight"),
    "deepseek_v3": ("mlp.experts.7.gate_proj.weight", "mlp.gate.e_score_correction_bias"),
    "gpt_oss": ("mlp.experts.gate_up_proj", "mlp.router.bias"),
    "phimoe": ("block_sparse_moe.experts.5.w3.weight", "block_sparse_moe.gate.weight"),
    "granitemoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.router.layer.weight"),
    "glm4_moe": ("mlp.experts.7.gate_proj.weight", "mlp.gate.e_score_correction_bias"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_both_ways(family, tmp_path):
    model = tiny_model(family, torch.bfloat16)
    state = model.state_dict()
    model.save_pretrained(tmp_path / "theirs")
    export_safetensors(tmp_path / "ours" / "model.safetensors", model)
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(f"model.layers.1.{name}" in ours for name in NAMES[family])

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(report.values()), report
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())

    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    load_experts_from(tmp_path / "theirs", loaded, only_experts=False)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def spread(path: Path) -> None:
    """Shards that cut experts, since 6 do not divide evenly, and the rows of everything else."""
    from torch.distributed.fsdp import fully_shard

    model = tiny_model("mixtral")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    export_safetensors(path, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    dist.barrier()
    load_experts_from(path, model, only_experts=False)
    assert all(torch.equal(value.full_tensor(), state[name]) for name, value in model.state_dict().items())


def test_a_model_under_fsdp2(two_ranks, tmp_path):
    two_ranks.run(spread, tmp_path / "ours" / "model.safetensors")
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "theirs")
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report


def test_several_files_and_the_models_own_names(tmp_path):
    model = tiny_model("qwen3_moe")
    files = export_safetensors(tmp_path / "model.safetensors", model, max_file_bytes=30_000)
    assert len(files) > 2
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    export_safetensors(tmp_path / "own" / "model.safetensors", model, names="model")
    assert load_file(tmp_path / "own" / "model.safetensors").keys() == model.state_dict().keys()
    assert [file.name for file in (tmp_path / "own").iterdir()] == ["model.safetensors"]


def test_what_does_not_fit_is_named(tmp_path):
    model = tiny_model("mixtral")
    path = tmp_path / "model.safetensors"
    export_safetensors(path, model)
    experts = "model.layers.0.block_sparse_moe.experts"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = load_file(path)
    save_file({name: value for name, value in whole.items() if name != f"{experts}.3.w2.weight"}, path)
    with pytest.raises(CheckpointError, match=rf"has no '{re.escape(experts)}.3.w2.weight'"):
        load_experts_from(path, model, only_experts=False)
    save_file({**whole, f"{experts}.3.w1.weight": torch.zeros(23, 32)}, path)
    with pytest.raises(ValueError, match=r"3.w1.weight' has shape \[23, 32\], wanted \[24, 32\]"):
        load_experts_from(path, model, only_experts=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(TypeError, match=r"model: got Linear, wanted a model of transformers for names='hub'"):
        export_safetensors(path, torch.nn.Linear(2, 2), names="hub")
    with pytest.raises(ValueError, match=r"names: got 'own', wanted"):
        export_safetensors(path, model, names="own")


def test_a_layout_that_is_more_than_rows_is_refused(tmp_path):
    """Such as weights that the hub keeps transposed."""
    model = tiny_model("mixtral")
    model._weight_conversions = [WeightConverter("experts.turned", "experts.down_proj", [Transpose(1, 2)])]
    with pytest.raises(ValueError, match=r"layout of mixtral does more to 'model.layers.0.mlp.experts.down_proj'"):
        export_safetensors(tmp_path / "model.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_a_dense_model_with_tied_embeddings(tmp_path):
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    assert not experts_modules(model)
    export_safetensors(tmp_path / "model.safetensors", model)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
