"""Noise on the router's logits, which spreads the tokens over the experts early in training."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.checks import check_int, check_number
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.compat.colossalai.context.random import seed


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
