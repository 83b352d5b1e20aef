"""Rows times a narrow matrix of every expert: an adapter's side of the rank (`lora`)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.configs import bucket_of
from moe_triton_kernels.fp8 import Scales
from moe_triton_kernels.grouped_gemm import rows_times_weight, tile_order
from moe_triton_kernels.heuristics import narrow_tile
from moe_triton_kernels.launch import launch_options, persistent_grid, target_of
from moe_triton_kernels.lora import Added, rank_block
from moe_triton_kernels.operands import Columns, PerExpert, Rows, in_units, sizes_argument
from moe_triton_kernels.tiles import TileTables, load_tile


@triton.jit
def narrow_kernel(
    x,  # [T, k] where there is a source, else [S, k]
    source,  # [S], or None
    weight,  # per expert [k, r]
    out,  # [S, width]
    tiles,
    sizes,  # k by r
    scaling,
    TOP_K: tl.constexpr,
    TILE,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    size_k, rank = in_units(sizes.k, sizes.UNIT), in_units(sizes.columns, sizes.UNIT)
    num_m = tl.load(tiles.num_tiles)
    num_n = tl.cdiv(rank, TILE.BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, num_m, num_n, TILE.GROUP)
        expert, first_row, end_row = load_tile(tiles.table, tiles.offsets, tile_m, TILE.BLOCK_M)
        rows = first_row + tl.arange(0, TILE.BLOCK_M)
        row_mask = rows < end_row
        if source is None:
            index = tl.minimum(rows, end_row - 1)
        else:
            index = tl.load(source + rows, mask=row_mask, other=0) // TOP_K
        n0 = tile_n * TILE.BLOCK_N
        acc = rows_times_weight(
            Rows(x + index.to(tl.int64) * size_k, None, None),
            Columns(weight, None, expert, n0, rank, 1, TILE.BLOCK_N),
            Added(None, rows, row_mask, False),
            Scales(None, rows, False),
            size_k,
            DTYPE,
            sizes.EVEN_K,
            TILE,
        )
        columns = n0 + tl.arange(0, TILE.BLOCK_N)  # those past the rank came out as 0
        out_rows = out + rows.to(tl.int64) * (num_n * TILE.BLOCK_N)
        tl.store(out_rows[:, None] + columns[None, :], (acc * scaling).to(DTYPE), mask=row_mask[:, None])


def narrow(
    x: Tensor,
    tiles: TileTables,
    weight: PerExpert,
    *,
    rank: int,
    scaling: float,
    num_rows: int,
    source: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """[S, width] = scaling * x[row] weight[e] for the rows of every expert e, in x's dtype; 0 past the rank.

    x contiguous: [S, k] with rows in expert order, or [T, k], read at source[row] // top_k. weight: per expert
    [k, rank], any strides. Rows past offsets[E] are not written.
    """
    size_k, block = x.shape[1], rank_block(rank)
    bucket = bucket_of(num_rows / max(tiles.offsets.shape[0] - 1, 1))
    config = narrow_tile(size_k, block, x.element_size(), target_of(x.device).architecture, bucket)
    out = x.new_empty((num_rows, cdiv(rank, block) * block))
    table, max_tiles = tiles.select(config.block_m)
    narrow_kernel[persistent_grid(x.device, max_tiles * cdiv(rank, block), config)](
        x,
        source,
        weight.weight(),
        out,
        table,
        sizes_argument(x, size_k, rank, config),
        scaling,
        TOP_K=top_k,
        **launch_options(x.device, config),
    )
    return out
