"""Linear layers whose weights the tensor-parallel ranks split (Megatron-LM, arXiv 1909.08053).

A column-parallel layer takes whole activations and gives this rank's slice of the outputs; a row-parallel one takes a
slice and gives the whole sum. Weights are drawn whole on every rank and cut, so that they are one process's. On one
process both are nn.Linear.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton.checks import check_int
from moe_triton.compat.colossalai.context.parallel_context import global_context
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.distributed.groups import Group


class _Linear1D(nn.Linear):
    """The whole layer's start, of which this rank keeps its part along dimension `split` of the weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool, split: int, parts: int) -> None:
        super().__init__(in_features, out_features, bias)
        self.group = global_context.group(ParallelMode.TENSOR)
        size = self.group.size
        check_int("parts", parts, low=1)
        if (out_features, in_features)[split] % (size * parts):
            name = ("out_features", "in_features")[split]
            raise ValueError(f"{name}: got {(out_features, in_features)[split]}, wanted a multiple of {size * parts}")
        if size > 1:
            self.weight = nn.Parameter(self._own(self.weight.detach(), split, parts))
            if bias and split == 0:
                self.bias = nn.Parameter(self._own(self.bias.detach(), 0, parts))
        self.out_features, self.in_features = self.weight.shape

    def _own(self, whole: Tensor, dim: int, parts: int) -> Tensor:
        own = [part.chunk(self.group.size, dim)[self.group.rank] for part in whole.chunk(parts, dim)]
        return torch.cat(own, dim)


class Linear1D_Col(_Linear1D):
    """[..., in] -> [..., out / ranks]: this rank's outputs.

    parts: the number of matrices side by side in the outputs (3 for query, key and value); each is split separately.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, parts: int = 1) -> None:
        super().__init__(in_features, out_features, bias, 0, parts)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(_Copied.apply(input, self.group), self.weight, self.bias)


class Linear1D_Row(_Linear1D):
    """[..., in / ranks], this rank's inputs -> [..., out], summed over the ranks; the bias, whole everywhere, once."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, 1, 1)

    def forward(self, input: Tensor) -> Tensor:
        out = _Summed.apply(F.linear(input, self.weight), self.group)
        return out if self.bias is None else out + self.bias


def _sum(x: Tensor, group: Group) -> Tensor:
    if group.size == 1:
        return x
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group.handle)
    return total


class _Copied(torch.autograd.Function):
    """The same activations on all ranks; backward sums what each rank's slice makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum over ranks; its gradient is everybody's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
