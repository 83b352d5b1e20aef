"""The up projection: A = activation(X W1^T + b1), with the token rows gathered inside the product.

The activation is computed from H = X W1^T + b1 rounded to the hidden states' dtype, whether or not H is kept: backward
(and a recomputation) has the rounded H only, so both directions evaluate the same function at the same point.
A gated activation takes gate and up columns of one tile into one accumulator, [gate | up] or g0, u0, g1, u1, ...,
in the order of the weights' columns, which is also H's.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.activations import Activation, is_gated
from moe_triton_kernels.descriptors import at
from moe_triton_kernels.fp8 import Operand, RowCodes, Scales, new_rows, operand_of
from moe_triton_kernels.gluon.schedules import why_unsupported
from moe_triton_kernels.grouped_gemm import rows_times_weight, tile_order
from moe_triton_kernels.launch import Config
from moe_triton_kernels.lora import Added
from moe_triton_kernels.operands import (
    Columns,
    PerExpert,
    Rows,
    expert_base,
    in_units,
)
from moe_triton_kernels.preactivation import activate, part_blocks, round_parts, split_pair
from moe_triton_kernels.products import prepare_product
from moe_triton_kernels.quantize import store_rows
from moe_triton_kernels.tiles import TileTables, load_tile


@triton.jit
def up_kernel(
    x,  # [T, d], or its codes [T, padded d]
    source,  # [S]
    weight,  # per expert [d, n] or [d, 2n]
    descriptor,  # of weight, or None
    bias,  # per expert [n] or [2n], or None
    adapter,  # of weight, or None
    scales,  # of x and weight, or None
    a,  # [S, n], or None
    a_codes,  # its RowCodes, or None
    h,  # [S, n] or [S, 2n], or None
    tiles,
    sizes,  # d, or padded d, by n
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CONCATENATED: tl.constexpr,
    TILE,
):
    DTYPE: tl.constexpr = x.dtype.element_ty if scales is None else scales.DTYPE.value
    GATED: tl.constexpr = is_gated(ACTIVATION)
    HALVES: tl.constexpr = 2 if GATED and CONCATENATED else 1
    COLUMNS_PER_HALF: tl.constexpr = 2 if GATED and not CONCATENATED else 1  # of H, side by side, for one column of A
    PARTS: tl.constexpr = TILE.PARTS
    PART: tl.constexpr = TILE.BLOCK_N // PARTS
    size_d, size_n = in_units(sizes.k, sizes.UNIT), in_units(sizes.columns, sizes.UNIT)
    num_m = tl.load(tiles.num_tiles)
    num_n = tl.cdiv(size_n, TILE.BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, num_m, num_n, TILE.GROUP)
        expert, first_row, end_row = load_tile(tiles.table, tiles.offsets, tile_m, TILE.BLOCK_M)
        rows = first_row + tl.arange(0, TILE.BLOCK_M)
        row_mask = rows < end_row
        # rows past the end compute token 0 and store nothing
        tokens = tl.load(source + rows, mask=row_mask, other=0) // TOP_K
        n0 = tile_n * TILE.BLOCK_N
        acc = rows_times_weight(
            Rows(x + tokens.to(tl.int64) * size_d, None, None),
            Columns(
                weight,
                descriptor,
                expert,
                n0 * COLUMNS_PER_HALF,
                size_n * COLUMNS_PER_HALF,
                HALVES,
                TILE.BLOCK_N * COLUMNS_PER_HALF,
            ),
            Added(adapter, rows, row_mask, adapter is not None),
            Scales(scales, tokens, scales is not None),
            size_d,
            DTYPE,
            sizes.EVEN_K,
            TILE,
        )
        b = None if bias is None else expert_base(bias, expert, DTYPE)
        blocks = part_blocks(acc, HALVES, PARTS)
        for i in tl.static_range(PARTS):
            columns = COLUMNS_PER_HALF * (n0 + i * PART) + tl.arange(0, COLUMNS_PER_HALF * PART)
            inside = columns < COLUMNS_PER_HALF * size_n
            mask = row_mask[:, None] & inside[None, :]
            parts = round_parts(blocks, bias, b, columns, inside, size_n, i, DTYPE, HALVES)
            if h is not None:
                h_rows = h + rows.to(tl.int64) * (HALVES * COLUMNS_PER_HALF * size_n)
                tl.store(h_rows[:, None] + columns[None, :], parts[0], mask=mask)
                if HALVES == 2:
                    tl.store(h_rows[:, None] + (size_n + columns)[None, :], parts[1], mask=mask)
            if a is not None or a_codes is not None:
                value = activate(split_pair(parts, ACTIVATION, HALVES), ACTIVATION)
                inner = n0 + i * PART + tl.arange(0, PART)
                if a_codes is None:
                    a_mask = row_mask[:, None] & (inner < size_n)[None, :]
                    a_rows = a + rows.to(tl.int64) * size_n
                    tl.store(a_rows[:, None] + inner[None, :], value.to(DTYPE), mask=a_mask)
                else:
                    value = tl.where((inner < size_n)[None, :], value, 0.0)
                    store_rows(value, a_codes, rows, row_mask, tile_n)


class Up:
    """The up projection of operands that lie like these: what they and the arguments decide is computed once.

    The arguments are those of `up`. No tensor is kept.
    """

    def __init__(
        self,
        x: Tensor | RowCodes,
        tiles: TileTables,
        weight: PerExpert,
        *,
        size_n: int,
        top_k: int,
        activation: Activation,
        is_concatenated: bool,
        config: Config,
    ) -> None:
        values, _ = operand_of(x, weight, size_n)
        self.size_n, self.top_k, self.activation, self.config = size_n, top_k, activation, config
        self.is_concatenated, self.projections = is_concatenated, 2 if activation.is_gated else 1
        self.product = prepare_product(
            up_kernel,
            values,
            tiles,
            weight,
            config,
            size_columns=size_n,
            halves=self.projections if is_concatenated else 1,
            pairs=1 if is_concatenated else self.projections,
            TOP_K=top_k,
            ACTIVATION=activation,
            CONCATENATED=is_concatenated,
        )

    def __call__(
        self,
        x: Operand,
        source: Tensor,
        tiles: TileTables,
        weight: PerExpert,
        bias: PerExpert | None,
        *,
        keep_activation: bool,
        keep_preactivation: bool,
    ) -> tuple[Operand, Tensor]:
        config, product, size_n = self.config, self.product, self.size_n
        values: Any = x
        scales = None
        if weight.scales is not None:  # of codes
            values, scales = operand_of(x, weight, size_n)
        if (
            config.gluon is not None
            and isinstance(x, Tensor)
            and why_unsupported(config.gluon, values, weight, bias, size_columns=size_n, projections=self.projections)
            is None
        ):
            from moe_triton_kernels.gluon import up as warp_specialized  # imports Gluon, which is experimental

            return warp_specialized.up(
                x,
                source,
                tiles,
                weight,
                bias,
                size_n=size_n,
                top_k=self.top_k,
                activation=self.activation,
                is_concatenated=self.is_concatenated or not self.activation.is_gated,
                keep_activation=keep_activation,
                keep_preactivation=keep_preactivation,
                config=config,
            )
        num_rows = source.shape[0]
        a: Any
        a_codes = None
        if scales is None:
            a = a_values = values.new_empty(num_rows, size_n) if keep_activation else values.new_empty(0)
        else:
            a, a_values = new_rows(x, num_rows, size_n, keep=keep_activation), None
            a_codes = a.argument()
        h = values.new_empty(*(num_rows, self.projections * size_n) if keep_preactivation else (0,), dtype=x.dtype)
        product.launch(
            values,
            source,
            weight.weight(),
            at(weight.data, product.descriptor),
            None if bias is None else bias.bias(),
            None if weight.adapter is None else weight.adapter.argument(),
            scales,
            a_values if keep_activation else None,
            a_codes if keep_activation else None,
            h if keep_preactivation else None,
            tiles.select(config.block_m)[0],
            product.sizes,
        )
        return a, h


def up(
    x: Operand,
    source: Tensor,
    tiles: TileTables,
    weight: PerExpert,
    bias: PerExpert | None,
    *,
    size_n: int,
    top_k: int,
    activation: Activation,
    is_concatenated: bool,
    keep_activation: bool,
    keep_preactivation: bool,
    config: Config,
) -> tuple[Operand, Tensor]:
    """A [S, n] and the pre-activation H [S, 2n] ([S, n] ungated), in x's dtype; an empty [0] tensor for one not kept.

    x [T, d] contiguous; source [S] int32, row -> token*top_k + choice; weight: per expert [d, 2n] or [d, n], any
    strides. H's columns lie as the weight's do: [gate | up], or g0, u0, g1, u1, ... where not `is_concatenated`.
    Rows past offsets[E] are not written. With codes of x and of the weight, A is codes too, of the activation in fp32;
    block_n and block_k are then 128, and parts 1.
    """
    prepared = Up(
        x,
        tiles,
        weight,
        size_n=size_n,
        top_k=top_k,
        activation=activation,
        is_concatenated=is_concatenated,
        config=config,
    )
    return prepared(
        x, source, tiles, weight, bias, keep_activation=keep_activation, keep_preactivation=keep_preactivation
    )
