"""The gradient of the hidden rows: dA = dO W2, then everything that follows from it per row, in one kernel.

With w the row's router weight and A = activation(H) recomputed from the kept pre-activation H:
    wA = w * A                    for dW2 = dO^T (w A)
    dH = w * dA * activation'(H)  for dW1 = dH^T X and dX = dH W1
    dw = <dA, A> + <dO, b2>       the router weight's gradient
Each tile writes its share of <dA, A>; a second kernel adds the shares in column order. No float atomics: same input,
same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.activations import Activation, is_gated
from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.descriptors import at
from moe_triton_kernels.fp8 import GROUP, CodedRows, RowCodes, Scales, operand_of
from moe_triton_kernels.gluon.schedules import why_unsupported
from moe_triton_kernels.grouped_gemm import rows_times_weight, split_columns, tile_order
from moe_triton_kernels.launch import Config
from moe_triton_kernels.lora import Added
from moe_triton_kernels.operands import (
    Columns,
    PerExpert,
    Rows,
    in_units,
)
from moe_triton_kernels.preactivation import d_activate, join_pair, load_parts, split_pair
from moe_triton_kernels.products import prepare_product
from moe_triton_kernels.quantize import largest_of, store_codes, store_columns, store_scales, store_sums
from moe_triton_kernels.tiles import TileTables, load_tile


@triton.jit
def h_columns(n0, size_n, NUMBER: tl.constexpr, PART: tl.constexpr, PAIRS: tl.constexpr):
    """The columns of part NUMBER of a tile in H, or in each half of it, and which of them there are."""
    columns = PAIRS * (n0 + NUMBER * PART) + tl.arange(0, PAIRS * PART)
    return columns, columns < PAIRS * size_n


@triton.jit
def h_cells(
    rows, row_mask, n0, size_n, NUMBER: tl.constexpr, PART: tl.constexpr, HALVES: tl.constexpr, PAIRS: tl.constexpr
):
    """Where part NUMBER of a tile lies in H, and a mask; PAIRS: columns of H, side by side, for one of A."""
    columns, inside = h_columns(n0, size_n, NUMBER, PART, PAIRS)
    offsets = rows.to(tl.int64) * (HALVES * PAIRS * size_n)
    return offsets[:, None] + columns[None, :], row_mask[:, None] & inside[None, :]


@triton.jit
def larger(largest, parts, IN_SECOND: tl.constexpr):
    """The bits of each row's largest |x| in two groups of columns, with one more part of each half, or of one group."""
    first = largest_of(parts[0])
    if len(parts) == 2:
        return tl.maximum(largest[0], first), tl.maximum(largest[1], largest_of(parts[1]))
    elif IN_SECOND:
        return largest[0], tl.maximum(largest[1], first)
    else:
        return tl.maximum(largest[0], first), largest[1]


@triton.jit
def pack(pair, shift, DTYPE: tl.constexpr):
    """A pair in DTYPE, two numbers of 16 bits in one register; shift: 16, as the compiler must not know.

    It would keep the numbers as well, in fp32, where it saw that they come out again.
    """
    if len(pair) == 2 and DTYPE.primitive_bitwidth == 16:
        first = pair[0].to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
        second = pair[1].to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
        return (first | (second << shift),)
    elif len(pair) == 2:
        return pair[0].to(DTYPE), pair[1].to(DTYPE)
    else:
        return (pair[0].to(DTYPE),)


@triton.jit
def unpack(packed, shift, IS_PAIR: tl.constexpr, DTYPE: tl.constexpr):
    """The pair that was packed."""
    if IS_PAIR and DTYPE.primitive_bitwidth == 16:
        first = packed[0].to(tl.uint16).to(DTYPE, bitcast=True)
        return first, (packed[0] >> shift).to(tl.uint16).to(DTYPE, bitcast=True)
    else:
        return packed


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
    weighted_a,  # [S, n] in the forms that are written (WrittenArgument)
    grad_h,  # like h, the same
    shares,  # [num_n, S] fp32
    tiles,
    sizes,  # d, or padded d, by n
    num_slots,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CONCATENATED: tl.constexpr,
    TILE,
):
    DTYPE: tl.constexpr = h.dtype.element_ty
    GATED: tl.constexpr = is_gated(ACTIVATION)
    HALVES: tl.constexpr = 2 if GATED and CONCATENATED else 1
    COLUMNS_PER_HALF: tl.constexpr = 2 if GATED and not CONCATENATED else 1  # of H, side by side, for one column of A
    GROUPS: tl.constexpr = HALVES * COLUMNS_PER_HALF  # of 128 columns of H in a tile of 128
    PARTS: tl.constexpr = TILE.PARTS
    PART: tl.constexpr = TILE.BLOCK_N // PARTS
    # H comes a part ahead, the first one during the product, in large tiles that hold no addresses of weights, nor both
    # scales and an adapter
    AHEAD: tl.constexpr = TILE.BLOCK_M >= 128 and descriptor is not None and (scales is None or adapter is None)
    size_d, size_n = in_units(sizes.k, sizes.UNIT), in_units(sizes.columns, sizes.UNIT)
    size_h = HALVES * COLUMNS_PER_HALF * size_n
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
        if grad_h.columns is not None or weighted_a.columns is not None:
            tl.static_assert(TILE.BLOCK_M == GROUP)
            acc = tl.where(row_mask[:, None], acc, 0.0)  # rows past the end must not count in a column's group
        share = tl.zeros((TILE.BLOCK_M,), dtype=tl.float32)
        largest = (tl.zeros((TILE.BLOCK_M,), dtype=tl.int32), tl.zeros((TILE.BLOCK_M,), dtype=tl.int32))
        held = ()
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
            inside = inner < size_n
            value, grad_pair = d_activate(blocks[i], scale, split_pair(parts, ACTIVATION, HALVES), ACTIVATION)
            grad_parts = join_pair(grad_pair, ACTIVATION, HALVES, DTYPE)
            if grad_h.numbers is not None:
                tl.store(grad_h.numbers + h_at, grad_parts[0], mask=h_mask)
                if HALVES == 2:
                    tl.store(grad_h.numbers + h_at + size_n, grad_parts[1], mask=h_mask)
            if grad_h.rows is not None:
                largest = larger(largest, grad_parts, GROUPS == 2 and HALVES == 1 and i >= PARTS // 2)
                held += (pack(grad_pair, 16 + tl.program_id(1), DTYPE),)  # type: ignore[assignment]
            if grad_h.columns is not None:
                columns, has_column = h_columns(n0, size_n, i, PART, COLUMNS_PER_HALF)
                for half in tl.static_range(HALVES):
                    numbers = grad_parts[half].to(tl.float32)
                    store_sums(numbers, grad_h.columns, half * size_n + columns, has_column, size_h, tile_m)
                    if grad_h.rows is None:  # else these codes would spill here, and the sums in the second loop
                        store_columns(numbers, grad_h.columns, half * size_n + columns, has_column, size_h, tile_m)
            if scales is None:
                value = value.to(DTYPE).to(tl.float32)  # forward multiplied the rounded A by W2
            share += tl.sum(blocks[i] * value, 1)
            weighted = (value * scale).to(DTYPE)
            if weighted_a.numbers is not None:
                a_cells = weighted_a.numbers + rows.to(tl.int64)[:, None] * size_n + inner[None, :]
                tl.store(a_cells, weighted, mask=row_mask[:, None] & inside[None, :])
            if weighted_a.columns is not None:
                store_columns(weighted.to(tl.float32), weighted_a.columns, inner, inside, size_n, tile_m)
        if grad_h.rows is not None:
            tl.static_assert(TILE.BLOCK_N == GROUP and PARTS >= COLUMNS_PER_HALF)
            groups = (tile_n * COLUMNS_PER_HALF, tile_n * COLUMNS_PER_HALF + (1 if HALVES == 1 else size_n // GROUP))
            row_scale = store_scales(largest[0], grad_h.rows, rows, row_mask, groups[0])
            if GROUPS == 2:
                row_scales = (row_scale, store_scales(largest[1], grad_h.rows, rows, row_mask, groups[1]))
            else:
                row_scales = (row_scale, row_scale)
            for i in tl.static_range(PARTS):
                pair = unpack(held[i], 16 + tl.program_id(1), GATED, DTYPE)
                parts = join_pair(pair, ACTIVATION, HALVES, DTYPE)
                columns, inside = h_columns(n0, size_n, i, PART, COLUMNS_PER_HALF)
                for half in tl.static_range(HALVES):
                    numbers = parts[half].to(tl.float32)
                    if grad_h.columns is not None:
                        store_columns(numbers, grad_h.columns, half * size_n + columns, inside, size_h, tile_m)
                    store_codes(
                        numbers,
                        row_scales[half if HALVES == 2 else COLUMNS_PER_HALF * i // PARTS],
                        grad_h.rows,
                        rows,
                        row_mask,
                        groups[half if HALVES == 2 else COLUMNS_PER_HALF * i // PARTS],
                        COLUMNS_PER_HALF * i * PART % GROUP,
                    )
        tl.store(shares + tile_n.to(tl.int64) * num_slots + rows, share, mask=row_mask)


class Into(NamedTuple):
    """What `d_hidden` writes, of products in fp8."""

    weighted_a: CodedRows
    grad_h: CodedRows


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
        into: Into | None = None,
    ) -> tuple[Any, Any, Tensor]:
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
        if into is None:
            weighted_a, grad_h = (
                CodedRows(numbers=h.new_empty((num_slots, self.size_n))),
                CodedRows(numbers=torch.empty_like(h)),
            )
        else:
            weighted_a, grad_h = into
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
            weighted_a.argument(),
            grad_h.argument(),
            shares,
            tiles.select(config.block_m)[0],
            product.sizes,
            num_slots,
        )
        return (weighted_a.numbers, grad_h.numbers, shares) if into is None else (weighted_a, grad_h, shares)


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
    into: Into | None = None,
) -> tuple[Any, Any, Tensor]:
    """w*A [S, n] and dH (like h) in grad_out's dtype, and the shares of <dA, A>, [column tiles, S] fp32.

    grad_out [T, d] contiguous, or its codes where weight is codes; weight: the down projection per expert as [d, n],
    any strides; h [S, 2n] or [S, n] as `up` made it; router_weights [T, K] contiguous. Rows past offsets[E] are neither
    read nor written. into: with codes, the forms of w*A and dH that are written, and are given back in their place; for
    any but numbers, block_m and block_n are 128, and for pairs there are two parts at least.
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
    return prepared(grad_out, source, tiles, weight, h, router_weights, into)
