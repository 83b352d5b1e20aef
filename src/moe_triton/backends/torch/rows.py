"""Between tokens and rows: what both ways of running the experts in torch need."""

from __future__ import annotations

from ctypes import addressof

import torch
from torch import Tensor

from moe_triton.backends.torch.fused import runs_on_threads
from moe_triton.backends.torch.memory import empty
from moe_triton.backends.torch.threads import on_all_threads
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


def take_rows(source: Tensor, index: Tensor, out: Tensor) -> None:
    """Write source[index[i]] to row i of `out`; index: int32, in range."""
    if not (source.is_contiguous() and out.is_contiguous() and runs_on_threads(source.dtype)):
        torch.index_select(source, 0, index, out=out)
        return
    from moe_triton.backends.torch.row_loops import Gather, gather_loop

    words = source.shape[1] * source.element_size() // 2
    rows = Gather(
        source=source.data_ptr(), out=out.data_ptr(), index=index.data_ptr(), num_rows=index.shape[0], words=words
    )
    on_all_threads(gather_loop().address, addressof(rows))


def sum_rows(rows: Tensor, position: Tensor, zero_row: int | None = None, weights: Tensor | None = None) -> Tensor:
    """Sum of each token's rows [T, K] in choice order, accumulated in fp32 (fp64 for fp64), on the CPU.

    zero_row    a row after all others that stands in for the choices that have none, which position has as -1 or as
                `zero_row`; it is set to zeros, and added where `rows` end before it. None where every choice has a row,
                or where `runs_on_threads`.
    weights     [T, K], where `runs_on_threads`: what rows are multiplied by
    """
    num_tokens, top_k = position.shape
    if position.numel() == 0 or rows.shape[1] == 0:
        return rows.new_zeros(num_tokens, rows.shape[1])
    if runs_on_threads(rows.dtype):
        return _sum_by_loop(rows, position, rows.shape[0] if zero_row is None else zero_row, weights)
    assert weights is None
    if zero_row is not None:
        if zero_row == rows.shape[0]:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        else:
            rows[zero_row] = 0
        position = position.remainder(zero_row + 1)  # -1 becomes zero_row
    starts = torch.arange(0, num_tokens * top_k, top_k, dtype=position.dtype)
    return torch.embedding_bag(rows, position.reshape(-1), starts)[0]


def _sum_by_loop(rows: Tensor, position: Tensor, num_rows: int, weights: Tensor | None) -> Tensor:
    """`sum_rows` of rows that begin with num_rows ones."""
    from moe_triton.backends.torch.row_loops import Combine, combine_loop

    rows, position = rows.contiguous(), position.to(torch.int32).contiguous()
    weights = None if weights is None else weights.float().contiguous()
    (num_tokens, top_k), columns = position.shape, rows.shape[1]
    out = empty((num_tokens, columns), rows.dtype)
    job = Combine(
        rows=rows.data_ptr(), position=position.data_ptr(), weights=0 if weights is None else weights.data_ptr(),
        out=out.data_ptr(), num_rows=num_rows, num_tokens=num_tokens, top_k=top_k, columns=columns,
    )  # fmt: skip
    on_all_threads(combine_loop(rows.dtype == torch.bfloat16).address, addressof(job))
    return out


def widen_rows(rows: Tensor) -> Tensor:
    """Return contiguous bf16 rows in fp32, where `runs_on_threads`."""
    from moe_triton.backends.torch.row_loops import Widening, widening_loop

    wide = empty(tuple(rows.shape), torch.float32)
    job = Widening(wide=wide.data_ptr(), narrow=rows.data_ptr(), size=rows.numel())
    on_all_threads(widening_loop().address, addressof(job))
    return wide


def round_rows(wide: Tensor, addend: Tensor | None) -> Tensor:
    """Return contiguous fp32 rows, with bf16 ones added, in bf16, where `runs_on_threads`."""
    from moe_triton.backends.torch.row_loops import Widening, rounding_loop

    rounded = empty(tuple(wide.shape), torch.bfloat16)
    narrow = 0 if addend is None else addend.data_ptr()
    job = Widening(wide=wide.data_ptr(), narrow=narrow, rounded=rounded.data_ptr(), size=wide.numel())
    on_all_threads(rounding_loop().address, addressof(job))
    return rounded
