"""The sparse block of transformers, with each of its implementations of the experts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_triton.benchmarking.cases import Case, Workload
from moe_triton.benchmarking.limits import SMALL_TOKENS
from moe_triton.benchmarking.providers.block import Block, Unavailable, require, require_swiglu, share

COPIED_BYTES = 8 << 30  # of weights that batched_mm may gather


def require_few_copies(case: Case) -> None:
    """batched_mm copies the weights of every choice of every token."""
    size = case.tokens * case.top_k * case.weight_elements * case.torch_dtype.itemsize
    if case.tokens > SMALL_TOKENS:
        raise Unavailable("not applicable", f"copies each token's experts: only for T <= {SMALL_TOKENS} tokens")
    if size > COPIED_BYTES:
        raise Unavailable("not applicable", f"copies each token's experts: {size / 2**30:.0f} GiB of weights here")


def transformers(implementation: str) -> Callable[[Workload], Block]:
    """The sparse block of a Qwen3-MoE model made from its config, with one of transformers' experts implementations."""

    def build(workload: Workload) -> Block:
        case = workload.case
        require("transformers")
        require_swiglu(case, "the Qwen3-MoE block")
        if implementation == "batched_mm":
            require_few_copies(case)
        try:
            from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeSparseMoeBlock
        except ImportError as error:
            raise Unavailable("too old", f"this transformers has no stacked Qwen3-MoE experts: {error}") from error
        config = Qwen3MoeConfig(
            hidden_size=case.hidden,
            moe_intermediate_size=case.intermediate,
            num_experts=case.experts,
            num_experts_per_tok=case.top_k,
            norm_topk_prob=case.top_k > 1,
            hidden_act="silu",
            experts_implementation=implementation,
        )
        with torch.device("meta"):
            block = Qwen3MoeSparseMoeBlock(config)
        experts: Qwen3MoeExperts = block.experts
        block.gate.weight = share(workload.gate)
        experts.gate_up_proj = share(workload.gate_up)
        experts.down_proj = share(workload.down)
        return Block(
            forward=lambda x: block(x[None])[0],
            choose=lambda x: block.gate(x)[2],
            parameters={"gate": block.gate.weight, "gate_up": experts.gate_up_proj, "down": experts.down_proj},
        )

    return build
