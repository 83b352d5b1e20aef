"""Dropout that draws from a stream: alike on the ranks that hold the same activations, different on the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_triton.checks import check_number
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.compat.colossalai.context.random import seed


class WrappedDropout(nn.Dropout):
    """nn.Dropout in the stream of `mode`."""

    def __init__(self, p: float = 0.5, inplace: bool = False, mode: ParallelMode = ParallelMode.TOKENS) -> None:
        super().__init__(p, inplace)
        self.mode = mode

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return inputs
        with seed(self.mode):
            return super().forward(inputs)


class WrappedDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382) in the stream of `mode`: drops whole samples [B, ...] in training."""

    def __init__(self, p: float = 0.0, mode: ParallelMode = ParallelMode.TOKENS) -> None:
        super().__init__()
        check_number("p", p, low=0)
        if p >= 1:
            raise ValueError(f"p: got {p}, wanted a number below 1")
        self.p = float(p)
        self.mode = mode

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return inputs
        shape = (inputs.shape[0], *[1] * (inputs.dim() - 1))
        with seed(self.mode):
            kept = torch.rand(shape, device=inputs.device) >= self.p
        return inputs * kept / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
