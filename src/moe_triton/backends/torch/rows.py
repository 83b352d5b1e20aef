"""Between tokens and rows: what both ways of running the experts in torch need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.records import ExpertCall


def row_slots(call: ExpertCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Token [.] and router weight [., 1] of the Dispatch's `rows`."""
    slots = call.dispatched.source.index_select(0, rows)
    return slots // call.dispatched.top_k, call.weights.reshape(-1).index_select(0, slots)[:, None]


def scatter_to_slots(call: ExpertCall, row_values: Tensor) -> Tensor:
    """Values of the kept rows -> [T, K] in the weights' dtype, with zeros at the slots that have no row."""
    out = torch.zeros_like(call.weights, memory_format=torch.contiguous_format)
    out.view(-1)[call.dispatched.source[: row_values.shape[0]].long()] = row_values.to(out.dtype)
    return out


def sum_rows(rows: Tensor, position: Tensor, zero_row: int) -> Tensor:
    """Sum of each token's rows, in choice order, accumulated in fp32 (fp64 for fp64), on the CPU.

    Row `zero_row`, which must come after all others, is set to zeros and stands in for the choices that have none.
    """
    if position.numel() == 0 or rows.shape[1] == 0:
        return rows.new_zeros(position.shape[0], rows.shape[1])
    rows[zero_row] = 0
    return F.embedding_bag(position.remainder(zero_row + 1), rows, mode="sum")  # -1 becomes zero_row
