"""Between tokens and rows: what both ways of running the experts in torch need."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.records import ExpertCall


def row_slots(call: ExpertCall, num_rows: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Token [.] and router weight [., 1] of the Dispatch's first `num_rows` rows, or of these `rows`."""
    source = call.dispatched.source
    slots = source if num_rows == call.num_rows else source[:num_rows]
    if rows is not None:
        slots = source.index_select(0, rows)
    tokens = torch.from_numpy(slots.numpy() // call.dispatched.top_k)  # in half the time of torch's division
    return tokens, call.weights.reshape(-1, 1).index_select(0, slots)


def scatter_to_slots(call: ExpertCall, row_values: Tensor) -> Tensor:
    """Values of the kept rows -> [T, K] in the weights' dtype, with zeros at the slots that have no row."""
    out = torch.zeros_like(call.weights, memory_format=torch.contiguous_format)
    out.view(-1)[call.dispatched.source[: row_values.shape[0]].long()] = row_values.to(out.dtype)
    return out


def sum_rows(rows: Tensor, position: Tensor, zero_row: int | None = None) -> Tensor:
    """Sum of each token's rows, in choice order, accumulated in fp32 (fp64 for fp64), on the CPU.

    Row `zero_row`, which must come after all others, is set to zeros and stands in for the choices that have none;
    None where every choice has a row.
    """
    num_tokens, top_k = position.shape
    if position.numel() == 0 or rows.shape[1] == 0:
        return rows.new_zeros(num_tokens, rows.shape[1])
    if zero_row is not None:
        rows[zero_row] = 0
        position = position.remainder(zero_row + 1)  # -1 becomes zero_row
    starts = torch.arange(0, num_tokens * top_k, top_k, dtype=position.dtype)
    return torch.embedding_bag(rows, position.reshape(-1), starts)[0]
