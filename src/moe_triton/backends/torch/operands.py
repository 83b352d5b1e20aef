"""What the ways of running the experts share: their operands, and how a token's rows are summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.records import ExpertSpec

Weights = Tensor | Sequence[Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Weights | None, Weights | None, Weights | None, Weights | None]
Needs = tuple[bool, bool, bool, bool, bool, bool]


@dataclass(frozen=True, kw_only=True)
class Operands:
    """The operands of `experts_forward`: hidden [T, d], weights [T, K], a Dispatch's tensors, the experts' parameters.

    A projection or bias is stacked [E, ...] or a sequence of one tensor per expert.
    """

    hidden: Tensor
    weights: Tensor
    offsets: Tensor
    source: Tensor
    position: Tensor
    gate_up_proj: Weights
    down_proj: Weights
    gate_up_bias: Weights | None
    down_bias: Weights | None
    spec: ExpertSpec

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def hidden_size(self) -> int:
        return self.hidden.shape[1]

    @property
    def width(self) -> int:
        """Columns of the pre-activation: 2n, or n when ungated."""
        return self.gate_up_proj[0].shape[1 if self.spec.is_transposed else 0]

    @property
    def intermediate_size(self) -> int:
        return self.width // 2 if self.spec.is_gated else self.width

    def row_slots(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Token [.] and router weight [., 1] of the dispatch's `rows`."""
        slots = self.source.index_select(0, rows)
        return slots // self.position.shape[1], self.weights.reshape(-1).index_select(0, slots)[:, None]

    def scatter_to_slots(self, row_values: Tensor) -> Tensor:
        """Values of the kept rows -> [T, K] in the weights' dtype, with zeros at the slots that have no row."""
        out = torch.zeros_like(self.weights, memory_format=torch.contiguous_format)
        out.view(-1)[self.source[: row_values.shape[0]].long()] = row_values.to(out.dtype)
        return out


def sum_rows(rows: Tensor, position: Tensor, zero_row: int) -> Tensor:
    """Sum of each token's rows, in choice order, accumulated in fp32 (fp64 for fp64), on the CPU.

    Row `zero_row`, which must come after all others, is set to zeros and stands in for the choices that have none.
    """
    if position.numel() == 0 or rows.shape[1] == 0:
        return rows.new_zeros(position.shape[0], rows.shape[1])
    rows[zero_row] = 0
    return F.embedding_bag(position.remainder(zero_row + 1), rows, mode="sum")  # -1 becomes zero_row


def as_given(weights: Weights | None, grad: Tensor | None) -> Weights | None:
    """A stacked gradient as the weights were given: a tensor, or a list of one view per expert."""
    return grad if grad is None or isinstance(weights, Tensor) else list(grad.unbind(0))
