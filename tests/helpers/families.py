"""Tiny random transformers models of the families that the integration is proven on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

VOCAB = 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
# config class, model class, what the family's config has beyond COMMON; E = 6 or 8 experts, K = 2 or 3 choices
FAMILIES = {
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "decoder_sparse_step": 1,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "head_dim": 8,
        },
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    ),
    "phimoe": ("Phimoe", {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoe", {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "glm4_moe": (
        "Glm4Moe",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "head_dim": 8,
        },
    ),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model on the eager implementation, with weights large enough that every expert matters to the logits."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options}, experts_implementation="eager")
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=(parameter.shape[-1]) ** -0.5)
            elif "bias" in parameter_name:
                parameter.normal_()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
        for module in experts_modules(model):  # gates on both sides of gpt-oss's clamps
            bias = getattr(module, "gate_up_proj_bias", None)
            if bias is not None:
                bias.normal_(std=6.0)
    return model.to(dtype)


def experts_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


@contextmanager
def only_ours(model: nn.Module) -> Iterator[None]:
    """Every implementation but ours raises: those that are registered, and the eager forward of the model's experts."""

    def refuse(name: str) -> Callable:
        def forward(*args: object, **kwargs: object) -> None:
            raise AssertionError(f"{name} ran")

        return forward

    others = {key: fn for key, fn in ALL_EXPERTS_FUNCTIONS._global_mapping.items() if key != "moe_triton"}
    cells = []
    for cls in {type(module) for module in experts_modules(model)}:
        code = cls.forward.__code__
        cell = cls.forward.__closure__[code.co_freevars.index("original_forward")]
        cells.append((cell, cell.cell_contents))
    try:
        ALL_EXPERTS_FUNCTIONS._global_mapping.update({key: refuse(key) for key in others})
        for cell, _ in cells:
            cell.cell_contents = refuse("the eager forward")
        yield
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.update(others)
        for cell, original in cells:
            cell.cell_contents = original
