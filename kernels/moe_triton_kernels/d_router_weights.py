"""The router weights' gradient: adds up the shares that `d_hidden` wrote, in column order, and the bias's part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.operands import PerExpert, expert_base
from moe_triton_kernels.tiles import TileTables, load_tile


@triton.jit(do_not_specialize=["num_slots", "num_shares"])
def d_router_weights_kernel(
    shares,  # [num_shares, S] fp32
    grad_out,  # [T, d]
    source,  # [S]
    bias,  # per expert [d], or None
    grad_weights,  # [T * K]
    tiles,
    num_shares,
    size_d,
    num_slots,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per row tile: the shares in column order, then <dO, b2>, to the row's slot."""
    tile = tl.program_id(0)
    if tile < tl.load(tiles.num_tiles):
        expert, first_row, end_row = load_tile(tiles.table, tiles.offsets, tile, BLOCK_M)
        rows = first_row + tl.arange(0, BLOCK_M)
        row_mask = rows < end_row
        slots = tl.load(source + rows, mask=row_mask, other=0)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        column_shares = shares + rows
        for _ in tl.range(0, num_shares):
            total += tl.load(column_shares, mask=row_mask, other=0.0)
            column_shares += num_slots
        if bias is not None:
            b = expert_base(bias, expert, grad_out.dtype.element_ty)
            grad_rows = grad_out + (slots // TOP_K).to(tl.int64) * size_d
            for start in tl.range(0, size_d, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                inside = columns < size_d
                grad = tl.load(
                    grad_rows[:, None] + columns[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0
                )
                bias_part = tl.load(b + columns * bias.stride_n, mask=inside, other=0.0).to(tl.float32)
                total += tl.sum(grad.to(tl.float32) * bias_part[None, :], 1)
        tl.store(grad_weights + slots, total.to(grad_weights.dtype.element_ty), mask=row_mask)


def d_router_weights(
    shares: Tensor,
    grad_out: Tensor,
    source: Tensor,
    tiles: TileTables,
    bias: PerExpert | None,
    like: Tensor,
) -> Tensor:
    """dw [T, K] in the dtype of `like`, the router weights; 0 where a choice has no row.

    `shares` come from `d_hidden`; `bias` is the down projection's, per expert [d].
    """
    grad_weights = torch.zeros_like(like, memory_format=torch.contiguous_format)
    block_m = tiles.places.block_sizes[0]
    table, max_tiles = tiles.select(block_m)
    d_router_weights_kernel[(max_tiles,)](
        shares,
        grad_out,
        source,
        None if bias is None else bias.bias(),
        grad_weights,
        table,
        shares.shape[0],
        grad_out.shape[1],
        shares.shape[1],
        TOP_K=like.shape[1],
        BLOCK_M=block_m,
        BLOCK_D=128,
    )
    return grad_weights
