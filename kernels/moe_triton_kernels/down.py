"""Rows times the experts' matrices: the down projection, and the gradient of the up projection's input rows.

The rows lie in expert order already, so nothing is gathered. Down multiplies (row W2^T + b2) by the row's router
weight in fp32 before it rounds, so that combine is a plain sum.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.descriptors import at, describe_rows
from moe_triton_kernels.fp8 import RowCodes, Scales, operand_of
from moe_triton_kernels.gluon.schedules import why_unsupported
from moe_triton_kernels.grouped_gemm import rows_times_weight, split_columns, tile_order
from moe_triton_kernels.launch import Config
from moe_triton_kernels.lora import Added
from moe_triton_kernels.operands import (
    Columns,
    PerExpert,
    Rows,
    add_bias,
    expert_base,
    in_units,
)
from moe_triton_kernels.products import prepare_product
from moe_triton_kernels.tiles import TileTables, load_tile


@triton.jit
def down_kernel(
    a,  # [S, k], or its codes [S, padded k]
    a_descriptor,  # of a, or None
    weight,  # per expert [k, columns]
    descriptor,  # of weight, or None
    bias,  # per expert [columns], or None
    adapter,  # of weight, or None
    scales,  # of a and weight, or None
    router_weights,  # [T * K], or None
    source,  # [S], or None
    out,  # [S, columns]
    tiles,
    sizes,  # k, or padded k, by columns
    TILE,
):
    DTYPE: tl.constexpr = out.dtype.element_ty
    PARTS: tl.constexpr = TILE.PARTS
    PART: tl.constexpr = TILE.BLOCK_N // PARTS
    size_k, size_columns = in_units(sizes.k, sizes.UNIT), in_units(sizes.columns, sizes.UNIT)
    num_m = tl.load(tiles.num_tiles)
    num_n = tl.cdiv(size_columns, TILE.BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, num_m, num_n, TILE.GROUP)
        expert, first_row, end_row = load_tile(tiles.table, tiles.offsets, tile_m, TILE.BLOCK_M)
        rows = first_row + tl.arange(0, TILE.BLOCK_M)
        row_mask = rows < end_row
        n0 = tile_n * TILE.BLOCK_N
        inside_rows = tl.minimum(rows, end_row - 1)
        acc = rows_times_weight(
            Rows(a + inside_rows.to(tl.int64) * size_k, a_descriptor, first_row),
            Columns(weight, descriptor, expert, n0, size_columns, 1, TILE.BLOCK_N),
            Added(adapter, rows, row_mask, adapter is not None),
            Scales(scales, inside_rows, scales is not None),
            size_k,
            DTYPE,
            sizes.EVEN_K,
            TILE,
        )
        out_rows = out + rows.to(tl.int64) * size_columns
        b = None if bias is None else expert_base(bias, expert, DTYPE)
        if router_weights is not None:
            slots = tl.load(source + rows, mask=row_mask, other=0)
            scale = tl.load(router_weights + slots, mask=row_mask, other=0.0).to(tl.float32)
        blocks = split_columns(acc, PARTS)
        for i in tl.static_range(PARTS):
            columns = n0 + i * PART + tl.arange(0, PART)
            inside = columns < size_columns
            value = add_bias(blocks[i], bias, b, columns, inside)
            if router_weights is not None:
                value *= scale[:, None]
            tl.store(out_rows[:, None] + columns[None, :], value.to(DTYPE), mask=row_mask[:, None] & inside[None, :])


class Down:
    """`down` of operands that lie like these: what they and the configuration decide is computed once.

    No tensor is kept.
    """

    def __init__(
        self, a: Tensor | RowCodes, tiles: TileTables, weight: PerExpert, *, size_columns: int, config: Config
    ) -> None:
        values, _ = operand_of(a, weight, size_columns)
        self.size_columns, self.config = size_columns, config
        self.product = prepare_product(down_kernel, values, tiles, weight, config, size_columns=size_columns)
        block = (config.block_m, config.block_k)
        self.rows = describe_rows(values, config, block=block, size_k=values.shape[1])

    def __call__(
        self,
        a: Tensor | RowCodes,
        tiles: TileTables,
        weight: PerExpert,
        *,
        bias: PerExpert | None = None,
        router_weights: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        config, product, size_columns = self.config, self.product, self.size_columns
        values: Any = a
        scales = None
        if weight.scales is not None:  # of codes
            values, scales = operand_of(a, weight, size_columns)
        if (
            config.gluon is not None
            and isinstance(a, Tensor)
            and why_unsupported(config.gluon, values, weight, bias, size_columns=size_columns) is None
        ):
            from moe_triton_kernels.gluon import down as warp_specialized  # imports Gluon, which is experimental

            return warp_specialized.down(
                a,
                tiles,
                weight,
                size_columns=size_columns,
                config=config,
                bias=bias,
                router_weights=router_weights,
                source=source,
            )
        out = values.new_empty(values.shape[0], size_columns, dtype=a.dtype)
        product.launch(
            values,
            at(values, self.rows),
            weight.weight(),
            at(weight.data, product.descriptor),
            None if bias is None else bias.bias(),
            None if weight.adapter is None else weight.adapter.argument(),
            scales,
            router_weights,
            source,
            out,
            tiles.select(config.block_m)[0],
            product.sizes,
        )
        return out


def down(
    a: Tensor | RowCodes,
    tiles: TileTables,
    weight: PerExpert,
    *,
    size_columns: int,
    config: Config,
    bias: PerExpert | None = None,
    router_weights: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """out[row] = (a[row] weight[e] + bias[e]) * w[source[row]] for the rows of every expert e: [S, columns], a's dtype.

    a [S, k] contiguous, or its codes where weight is codes, rows in expert order; weight: per expert [k, columns], any
    strides; router_weights [T, K] contiguous, read at source[row] (None: no factor; `source` is then not needed). Rows
    past offsets[E] are not written, and change nothing.
    """
    prepared = Down(a, tiles, weight, size_columns=size_columns, config=config)
    return prepared(a, tiles, weight, bias=bias, router_weights=router_weights, source=source)
