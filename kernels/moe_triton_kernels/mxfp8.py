"""A grouped product in MXFP8 for Blackwell: e4m3 codes, 32 of which along the contraction share a power of two.

The matrix unit applies the scales (E8M0: the exponent plus 127 in one byte), so that sums need no promotion
(Open Compute Project, Microscaling Formats 1.0). It is compiled for Blackwell only, and no backend calls it yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.grouped_gemm import tile_order
from moe_triton_kernels.launch import Config, launch_options, persistent_grid
from moe_triton_kernels.tiles import TileTables, load_tile

GROUP = tl.constexpr(32)


@dataclass(frozen=True, kw_only=True)
class MxCodes:
    """Matrices that are contracted along their last dimension k, a multiple of 128.

    codes   [..., k] float8_e4m3fn
    scales  [..., k / 32] uint8: 2^(scale - 127)
    """

    codes: Tensor
    scales: Tensor


@triton.jit
def mxfp8_rows_kernel(
    rows,  # [S, k]
    row_scales,  # [S, k / 32]
    weight,  # [E, columns, k]
    weight_scales,  # [E, columns, k / 32]
    out,  # [S, columns]
    tiles,
    size_k,
    size_columns,
    TILE,
):
    SCALES: tl.constexpr = TILE.BLOCK_K // GROUP
    num_m = tl.load(tiles.num_tiles)
    num_n = tl.cdiv(size_columns, TILE.BLOCK_N)
    k, group = tl.arange(0, TILE.BLOCK_K), tl.arange(0, SCALES)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, num_m, num_n, TILE.GROUP)
        expert, first_row, end_row = load_tile(tiles.table, tiles.offsets, tile_m, TILE.BLOCK_M)
        row = first_row + tl.arange(0, TILE.BLOCK_M)
        column = tile_n * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
        m = tl.minimum(row, end_row - 1).to(tl.int64)[:, None]
        n = expert.to(tl.int64) * size_columns + tl.minimum(column, size_columns - 1)[:, None]
        x_at, x_scales = rows + m * size_k + k[None, :], row_scales + m * (size_k // GROUP) + group[None, :]
        y_at, y_scales = weight + n * size_k + k[None, :], weight_scales + n * (size_k // GROUP) + group[None, :]
        acc = tl.zeros((TILE.BLOCK_M, TILE.BLOCK_N), dtype=tl.float32)
        for _ in tl.range(0, size_k // TILE.BLOCK_K):
            x, y = tl.load(x_at), tl.load(y_at)
            acc = tl.dot_scaled(x, tl.load(x_scales), "e4m3", tl.trans(y), tl.load(y_scales), "e4m3", acc)
            x_at += TILE.BLOCK_K
            y_at += TILE.BLOCK_K
            x_scales += SCALES
            y_scales += SCALES
        cells = out + row.to(tl.int64)[:, None] * size_columns + column[None, :]
        mask = (row < end_row)[:, None] & (column < size_columns)[None, :]
        tl.store(cells, acc.to(out.dtype.element_ty), mask=mask)


def mxfp8_rows(rows: MxCodes, tiles: TileTables, weight: MxCodes, *, dtype: torch.dtype, config: Config) -> Tensor:
    """out[row] = rows[row] weight[e]^T for the rows of every expert e: [S, columns] in `dtype`.

    rows [S, k] in expert order, weight [E, columns, k], all contiguous. Rows past offsets[E] are not written.
    """
    (num_rows, size_k), size_columns = rows.codes.shape, weight.codes.shape[1]
    out = torch.empty((num_rows, size_columns), dtype=dtype, device=rows.codes.device)
    table, max_tiles = tiles.select(config.block_m)
    mxfp8_rows_kernel[persistent_grid(out.device, max_tiles * cdiv(size_columns, config.block_n), config)](
        rows.codes,
        rows.scales,
        weight.codes,
        weight.scales,
        out,
        table,
        size_k,
        size_columns,
        **launch_options(out.device, config),
    )
    return out
