"""The products of experts' rows by `product_loops`, where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ctypes import Array, Structure, addressof, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from moe_triton.backends.torch.blocks import Block
from moe_triton.backends.torch.memory import empty
from moe_triton.backends.torch.threads import on_all_threads
from moe_triton.records import ExpertWeight

WORD = 4  # bytes
PANEL = 32  # columns: see `panels`
MANY_ROWS = 32  # from which copying a matrix into panels pays
FEW_ROWS = 12  # of an expert, on average, up to which a thread takes long pieces of a matrix in columns
ALL = 1 << 62  # more rows, or bytes, than there are
MOST_SUMMED = 2048  # rows of an expert: over more, panels of a gradient's factors are too narrow to be used often
PANEL_BYTES, LEFT_BYTES, RIGHT_BYTES = 1 << 17, 1 << 16, 1 << 20  # of a thread's cache
STREAMED = 1 << 25  # bytes of a gradient: more than a cache holds until the optimizer reads it
Matrices = Callable[[int], Tensor]  # expert -> its matrix [out, in]


def parts_of(parts: Sequence[tuple[int, slice]], of_expert: Callable[[int], int] = int) -> Array[c_int64]:
    """What `of_expert` gives, first row and the row past its last of every part; keep it until the loops have run."""
    return (c_int64 * (3 * len(parts)))(
        *(number for e, part in parts for number in (of_expert(e), part.start, part.stop))
    )


def reads(matrices: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Return whether the loops read matrices [out, in]: dense in rows or in columns, and all in the same steps."""
    return len({matrix.stride() for matrix in matrices}) == 1 and all(_reads(matrix, dtype) for matrix in matrices)


def _reads(matrix_OI: Tensor, dtype: torch.dtype) -> bool:
    return matrix_OI.dtype == dtype and 1 in matrix_OI.stride() and matrix_OI.shape[1] * dtype.itemsize % WORD == 0


class Added(NamedTuple):
    """What an adapter adds to a product: t @ factor[e], for t [m, columns] and factor [E, rank, O].

    narrow   the `adapter_loops.Narrow` that makes t for the block, and is waited for
    by       the address of the loop that takes it
    """

    narrow: Structure
    by: int
    t_mr: Tensor
    factor: Tensor


def multiply(
    block: Block,
    x_mI: Tensor,
    matrices: Matrices,
    biases: ExpertWeight | None = None,
    out: Tensor | None = None,
    added: Added | None = None,
    *,
    by_row: bool = False,
) -> Tensor:
    """Compute x @ matrices(e).T + biases[e] for the rows of every expert e of the block, and what is added, [m, O].

    out: in fp32 also for bf16 where the matrices are dense in rows. by_row: a row's bits depend on this row alone.
    """
    from moe_triton.backends.torch.product_loops import Product, product_loop

    first_OI, size, threads = matrices(block.parts[0][0]), x_mI.element_size(), torch.get_num_threads()
    (size_out, size_in), (step_o, step_i) = first_OI.shape, first_OI.stride()
    parts = parts_of(block.parts, lambda e: matrices(e).data_ptr())
    y_mO = empty((x_mI.shape[0], size_out), x_mI.dtype) if out is None else out
    # what is read where it is, and not copied into panels, in long pieces: the processor then reads ahead
    most_bytes = ALL if step_i != 1 and _are_few(block) else PANEL_BYTES
    job = Product(
        x=x_mI.data_ptr(), x_row=x_mI.stride(0) * size, step=(step_o if step_i == 1 else step_i) * size,
        y=y_mO.data_ptr(), y_row=y_mO.stride(0) * y_mO.element_size(), size_in=size_in, size_out=size_out,
        parts=addressof(parts), num_parts=len(block.parts),
        columns=taken(size_in * size, size_out, most_bytes, threads), many=ALL if by_row else MANY_ROWS,
        threads=threads,
    )  # fmt: skip
    if added is not None:
        job.narrow, job.by, job.experts = addressof(added.narrow), added.by, added.narrow.parts
        job.t, job.t_row = added.t_mr.data_ptr(), added.t_mr.stride(0) * size
        job.out_of, job.rank = added.factor.data_ptr(), added.factor.shape[1]
        job.out_of_e, job.out_of_k, job.out_of_q = (step * size for step in added.factor.stride())
    loop = product_loop(x_mI.dtype == torch.bfloat16, step_i == 1, y_mO.dtype != x_mI.dtype)
    on_all_threads(loop.address, addressof(job))
    if biases is not None:
        for e, part in block.parts:
            y_mO[part] += biases[e]
    return y_mO


def _are_few(block: Block) -> bool:
    """Return whether experts have so few rows that no matrix is copied, and reading it is what takes long."""
    counts = [part.stop - part.start for _, part in block.parts]
    return max(counts) < MANY_ROWS and sum(counts) <= FEW_ROWS * len(counts)


def multiply_outer(block: Block, left_mO: Tensor, right_mI: Tensor, out_EOI: Tensor) -> None:
    """Write left.T @ right over the rows of every expert e of the block to out[e]."""
    _outer(block.parts, left_mO, right_mI, out_EOI)


def clear(out_EOI: Tensor, experts: Iterable[int]) -> None:
    """Write zeros to out[e] of these experts, which is dense: products over no rows."""
    if out_EOI.dtype == torch.bfloat16 and out_EOI.shape[2] % 2 == 0 and out_EOI.storage_offset() % 2 == 0:
        out_EOI = out_EOI.view(torch.float32)  # twice as fast: a tile has as many numbers
    no_rows = [(e, slice(0, 0)) for e in experts]
    if no_rows:
        left_mO, right_mI = (out_EOI.new_empty(0, size) for size in out_EOI.shape[1:])
        _outer(no_rows, left_mO, right_mI, out_EOI)


def _outer(experts: Sequence[tuple[int, slice]], left_mO: Tensor, right_mI: Tensor, out_EOI: Tensor) -> None:
    from moe_triton.backends.torch.product_loops import Outer, outer_loop

    size, address = left_mO.element_size(), out_EOI.data_ptr()
    step_e, step_o = out_EOI.stride(0) * size, out_EOI.stride(1) * size
    parts = parts_of(experts, lambda e: address + e * step_e)
    column = max(part.stop - part.start for _, part in experts) * size
    job = Outer(
        left=left_mO.data_ptr(), left_row=left_mO.stride(0) * size, right=right_mI.data_ptr(),
        right_row=right_mI.stride(0) * size, step=step_o, size_out=left_mO.shape[1], size_in=right_mI.shape[1],
        parts=addressof(parts), num_parts=len(experts),
        outs=taken(column, left_mO.shape[1], LEFT_BYTES, torch.get_num_threads()),
        columns=taken(column, right_mI.shape[1], RIGHT_BYTES, 1), streams=step_e * len(out_EOI) >= STREAMED,
    )  # fmt: skip
    on_all_threads(outer_loop(left_mO.dtype == torch.bfloat16).address, addressof(job))


def taken(column: int, count: int, most_bytes: int, threads: int) -> int:
    """Return how many of `count` columns of so many bytes a thread takes at a time: whole panels, as many for each."""
    panels = max(-(-count // PANEL), 1)
    pieces = -(-panels // max(most_bytes // max(column, 1) // PANEL, 1))
    return PANEL * -(-panels // (-(-pieces // threads) * threads))
