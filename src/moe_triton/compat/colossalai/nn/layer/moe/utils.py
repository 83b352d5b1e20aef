"""Noise on the router's logits, which spreads the tokens over the experts early in training; `build_ffn_experts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_triton.checks import check_int, check_number
from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.compat.colossalai.context.random import seed
from moe_triton.compat.colossalai.nn.layer.moe.ffn_experts import FFNExperts, TPExperts


class NormalNoiseGenerator:
    """x + N(0, std) with std = 1 / E**2 (ViT-MoE, arXiv 2106.05974, has 1 / E; this is Colossal-AI's).

    The noise is the same on ranks with the same tokens, and differs on the others.
    """

    def __init__(self, num_experts: int) -> None:
        check_int("num_experts", num_experts, low=1)
        self.std = 1.0 / num_experts**2

    def __call__(self, inputs: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        with seed(ParallelMode.TOKENS):
            return inputs + self.std * torch.randn_like(inputs)


class UniformNoiseGenerator:
    """x * U(1 - eps, 1 + eps), Switch Transformer's jitter (arXiv 2101.03961) on the logits."""

    def __init__(self, eps: float = 1e-2) -> None:
        check_number("eps", eps, low=0)
        self.eps = float(eps)

    def __call__(self, inputs: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        with seed(ParallelMode.TOKENS):
            return inputs * (1 + self.eps * (2 * torch.rand_like(inputs) - 1))


def build_ffn_experts(
    num_experts: int, d_model: int, d_ff: int, activation: Any = None, drop_rate: float = 0
) -> FFNExperts:
    """Make `FFNExperts` where the ranks can share E experts, else `TPExperts` where they can split d_ff.

    Raises NotImplementedError where they can do neither.
    """
    check_int("num_experts", num_experts, low=1)
    ranks = MOE_CONTEXT.max_ep_size
    if num_experts % ranks == 0 or ranks % num_experts == 0:
        return FFNExperts(num_experts, d_model, d_ff, activation, drop_rate)
    if d_ff % ranks == 0:
        return TPExperts(num_experts, d_model, d_ff, activation, drop_rate)
    raise NotImplementedError(
        f"num_experts, d_ff: got {num_experts} and {d_ff}, wanted one of them to fit max_ep_size={ranks}"
    )
