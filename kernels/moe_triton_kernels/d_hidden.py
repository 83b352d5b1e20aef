"""The gradient of the hidden rows: dA = dO W2, then everything that follows from it per row, in one kernel.

With w the row's router weight and A = activation(H) recomputed from the kept pre-activation H:
    wA = w * A                    for dW2 = dO^T (w A)
    dH = w * dA * activation'(H)  for dW1 = dH^T X and dX = dH W1
    dw = <dA, A> + <dO, b2>       the router weight's gradient
Each tile writes its share of <dA, A>; a second kernel adds the shares in column order. No float atomics: same input,
same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.activations import Activation, is_gated
from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.descriptors import at
from moe_triton_kernels.fp8 import RowCodes, Scales, operand_of
from moe_triton_kernels.gluon.schedules import why_unsupported
from moe_triton_kernels.grouped_gemm import rows_times_weight, split_columns, tile_order
from moe_triton_kernels.launch import Config
from moe_triton_kernels.lora import Added
from moe_triton_kernels.operands import (
    Columns,
    PerExpert,
    Rows,
    expert_base,
    in_units,
)
from moe_triton_kernels.preactivation import d_activate, join_pair, load_parts, split_pair
from moe_triton_kernels.products import prepare_product
from moe_triton_kernels.tiles import TileTables, load_tile


@triton.jit
def h_cells(
    rows, row_mask, n0, size_n, NUMBER: tl.constexpr, PART: tl.constexpr, HALVES: tl.constexpr, PAIRS: tl.constexpr
):
    """Where part NUMBER of a tile lies in H, and a mask; PAIRS: columns of H, side by side, for one of A."""
    columns = PAIRS * (n0 + NUMBER * PART) + tl.arange(0, PAIRS * PART)
    offsets = rows.to(tl.int64) * (HALVES * PAIRS * size_n)
    return offsets[:, None] + columns[None, :], row_mask[:, None] & (columns < PAIRS * size_n)[None, :]


@triton.jit(do_not_specialize=["num_slots"])
def d_hidden_kernel(
    grad_out,  # [T, d], or its codes [T, padded d]
    source,  # [S]
    weight,  # per expert [d, n]
    descriptor,  # of weight, or None
    adapter,  # of weight, or None
    scales,  # of grad_out and weight, or None
    h,  # [S, n] or [S, 2n]
    router_weights,  # [T * K]
    weighted_a,  # [S, n]
    grad_h,  # like h
    shares,  # [num_n, S] fp32
    tiles,
    sizes,  # d, or padded d, by n
    num_slots,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CONCATENATED: tl.constexpr,
    TILE,
):
    DTYPE: tl.constexpr = grad_h.dtype.element_ty
    GATED: tl.constexpr = is_gated(ACTIVATION)
    HALVES: tl.constexpr = 2 if GATED and CONCATENATED else 1
    COLUMNS_PER_HALF: tl.constexpr = 2 if GATED and not CONCATENATED else 1  # of H, side by side, for one column of A
    PARTS: tl.constexpr = TILE.PARTS
    PART: tl.constexpr = TILE.BLOCK_N // PARTS
    # H comes a part ahead, the first one during the product, in large tiles that hold no addresses of weights
    AHEAD: tl.constexpr = TILE.BLOCK_M >= 128 and descriptor is not None
    size_d, size_n = in_units(sizes.k, sizes.UNIT), in_units(sizes.columns, sizes.UNIT)
    num_m = tl.load(tiles.num_tiles)
    num_n = tl.cdiv(size_n, TILE.BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, num_m, num_n, TILE.GROUP)
        expert, first_row, end_row = load_tile(tiles.table, tiles.offsets, tile_m, TILE.BLOCK_M)
        rows = first_row + tl.arange(0, TILE.BLOCK_M)
        row_mask = rows < end_row
        slots = tl.load(source + rows, mask=row_mask, other=0)  # rows past the end compute token 0 and store nothing
        tokens = slots // TOP_K
        n0 = tile_n * TILE.BLOCK_N
        if AHEAD:
            h_at, h_mask = h_cells(rows, row_mask, n0, size_n, 0, PART, HALVES, COLUMNS_PER_HALF)
            next_parts = load_parts(h + h_at, size_n, h_mask, HALVES)
        acc = rows_times_weight(
            Rows(grad_out + tokens.to(tl.int64) * size_d, None, None),
            Columns(weight, descriptor, expert, n0, size_n, 1, TILE.BLOCK_N),
            Added(adapter, rows, row_mask, adapter is not None),
            Scales(scales, tokens, scales is not None),
            size_d,
            DTYPE,
            sizes.EVEN_K,
            TILE,
        )
        scale = tl.load(router_weights + slots, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        a_rows = weighted_a + rows.to(tl.int64) * size_n
        share = tl.zeros((TILE.BLOCK_M,), dtype=tl.float32)
        blocks = split_columns(acc, PARTS)
        for i in tl.static_range(PARTS):
            h_at, h_mask = h_cells(rows, row_mask, n0, size_n, i, PART, HALVES, COLUMNS_PER_HALF)
            if AHEAD:
                parts = next_parts
            else:
                parts = load_parts(h + h_at, size_n, h_mask, HALVES)
            if AHEAD and i + 1 < PARTS:
                next_at, next_mask = h_cells(rows, row_mask, n0, size_n, i + 1, PART, HALVES, COLUMNS_PER_HALF)
                next_parts = load_parts(h + next_at, size_n, next_mask, HALVES)
            inner = n0 + i * PART + tl.arange(0, PART)
            mask = row_mask[:, None] & (inner < size_n)[None, :]
            grad_at = grad_h + h_at
            value, grad_pair = d_activate(blocks[i], scale, split_pair(parts, ACTIVATION, HALVES), ACTIVATION)
            grad_parts = join_pair(grad_pair, ACTIVATION, HALVES, DTYPE)
            tl.store(grad_at, grad_parts[0], mask=h_mask)
            if HALVES == 2:
                tl.store(grad_at + size_n, grad_parts[1], mask=h_mask)
            if scales is None:
                value = value.to(DTYPE).to(tl.float32)  # forward multiplied the rounded A by W2
            share += tl.sum(blocks[i] * value, 1)
            tl.store(a_rows[:, None] + inner[None, :], (value * scale).to(DTYPE), mask=mask)
        tl.store(shares + tile_n.to(tl.int64) * num_slots + rows, share, mask=row_mask)


class DHidden:
    """`d_hidden` of operands that lie like these: what they and the arguments decide is computed once.

    The arguments are those of `d_hidden`. No tensor is kept.
    """

    def __init__(
        self,
        grad_out: Tensor | RowCodes,
        tiles: TileTables,
        weight: PerExpert,
        *,
        size_n: int,
        top_k: int,
        activation: Activation,
        is_concatenated: bool,
        config: Config,
    ) -> None:
        values, _ = operand_of(grad_out, weight, size_n)
        self.size_n, self.activation, self.is_concatenated = size_n, activation, is_concatenated
        self.config, self.num_shares = config, cdiv(size_n, config.block_n)
        self.product = prepare_product(
            d_hidden_kernel,
            values,
            tiles,
            weight,
            config,
            size_columns=size_n,
            TOP_K=top_k,
            ACTIVATION=activation,
            CONCATENATED=is_concatenated,
        )

    def __call__(
        self,
        grad_out: Tensor | RowCodes,
        source: Tensor,
        tiles: TileTables,
        weight: PerExpert,
        h: Tensor,
        router_weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, product = self.config, self.product
        values: Any = grad_out
        scales = None
        if weight.scales is not None:  # of codes
            values, scales = operand_of(grad_out, weight, self.size_n)
        if (
            config.gluon is not None
            and isinstance(grad_out, Tensor)
            and why_unsupported(
                config.gluon, values, weight, None, size_columns=self.size_n, derivative=self.activation
            )
            is None
        ):
            from moe_triton_kernels.gluon import d_hidden as warp_specialized  # imports Gluon, which is experimental

            return warp_specialized.d_hidden(
                grad_out,
                source,
                tiles,
                weight,
                h,
                router_weights,
                size_n=self.size_n,
                activation=self.activation,
                is_concatenated=self.is_concatenated or not self.activation.is_gated,
                config=config,
            )
        num_slots = source.shape[0]
        weighted_a = h.new_empty((num_slots, self.size_n))
        grad_h = torch.empty_like(h)
        shares = h.new_empty((self.num_shares, num_slots), dtype=torch.float32)
        product.launch(
            values,
            source,
            weight.weight(),
            at(weight.data, product.descriptor),
            None if weight.adapter is None else weight.adapter.argument(),
            scales,
            h,
            router_weights,
            weighted_a,
            grad_h,
            shares,
            tiles.select(config.block_m)[0],
            product.sizes,
            num_slots,
        )
        return weighted_a, grad_h, shares


def d_hidden(
    grad_out: Tensor | RowCodes,
    source: Tensor,
    tiles: TileTables,
    weight: PerExpert,
    h: Tensor,
    router_weights: Tensor,
    *,
    size_n: int,
    activation: Activation,
    is_concatenated: bool,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor]:
    """w*A [S, n] and dH (like h) in grad_out's dtype, and the shares of <dA, A>, [column tiles, S] fp32.

    grad_out [T, d] contiguous, or its codes where weight is codes; weight: the down projection per expert as [d, n],
    any strides; h [S, 2n] or [S, n] as `up` made it; router_weights [T, K] contiguous. Rows past offsets[E] are neither
    read nor written.
    """
    prepared = DHidden(
        grad_out,
        tiles,
        weight,
        size_n=size_n,
        top_k=router_weights.shape[1],
        activation=activation,
        is_concatenated=is_concatenated,
        config=config,
    )
    return prepared(grad_out, source, tiles, weight, h, router_weights)


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
