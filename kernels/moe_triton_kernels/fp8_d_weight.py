"""Gradients of the experts' matrices from codes of 8 bits: `d_weight` in fp8.

Both operands are `ColumnCodes`: transposed, in whole tiles of 128 rows of an expert, with a scale for each column of a
tile. So nothing is gathered or masked, a step of the contraction is a tile, and an expert's rows are split at tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv, next_power_of_2
from moe_triton_kernels.d_weight import WEIGHT_UNITS, store_gradient, take_unit
from moe_triton_kernels.descriptors import rows_descriptor
from moe_triton_kernels.fp8 import GROUP, ColumnCodes
from moe_triton_kernels.grouped_gemm import proxy_fence, tile_order
from moe_triton_kernels.launch import Config, launch_options, persistent_grid, target_of
from moe_triton_kernels.operands import Rows, load_rows, start_rows
from moe_triton_kernels.row_pieces import (
    NUM_PIECES,
    NUM_SPLIT_PIECES,
    load_piece,
    piece_rows_for,
    row_pieces,
    sum_pieces,
)
from moe_triton_kernels.tiles import TileTables


@triton.jit
def tile_offsets_kernel(offsets, tile_offsets, num_experts, BLOCK_E: tl.constexpr):
    experts = tl.arange(0, BLOCK_E)
    inside = experts < num_experts
    counts = tl.load(offsets + experts + 1, mask=inside, other=0) - tl.load(offsets + experts, mask=inside, other=0)
    tiles = counts // GROUP + (counts % GROUP != 0).to(tl.int32)
    tl.store(tile_offsets + experts + 1, tl.cumsum(tiles, 0), mask=inside)
    tl.store(tile_offsets, 0)


def tile_offsets(offsets: Tensor) -> Tensor:
    """[E+1] int32: the experts' ranges of tiles of 128 rows, from their ranges of rows."""
    found, num_experts = torch.empty_like(offsets), offsets.shape[0] - 1
    tile_offsets_kernel[(1,)](offsets, found, num_experts, BLOCK_E=next_power_of_2(num_experts))
    return found


@triton.jit
def fp8_d_weight_kernel(
    left,  # codes [size_i, size_k]
    left_scales,  # [tiles, size_i]
    left_descriptor,  # of left, or None
    right,  # codes [size_j, size_k]
    right_scales,  # [tiles, size_j]
    right_descriptor,  # of right, or None
    out,  # [E, size_i, size_j]
    partials,  # [slots, size_i, size_j] fp32
    pieces,  # of tiles
    state,
    size_i,
    size_j,
    size_k,  # 128 times the tiles that there can be
    TILE,
):
    tl.static_assert(TILE.BLOCK_K == GROUP)
    num_i = tl.cdiv(size_i, TILE.BLOCK_M)
    num_j = tl.cdiv(size_j, TILE.BLOCK_N)
    per_piece = num_i * num_j
    num_units = tl.load(state + NUM_PIECES) * per_piece
    num_split = tl.load(state + NUM_SPLIT_PIECES)
    unit = tl.program_id(0)
    while unit < num_units:
        next_unit = take_unit(state, unit, num_split)
        piece = unit // per_piece
        tile_i, tile_j = tile_order(unit % per_piece, num_i, num_j, TILE.GROUP)
        expert, first_tile, end_tile = load_piece(pieces, piece)
        i0, j0 = tile_i * TILE.BLOCK_M, tile_j * TILE.BLOCK_N
        i, j = i0 + tl.arange(0, TILE.BLOCK_M), j0 + tl.arange(0, TILE.BLOCK_N)
        x_rows = Rows(left + tl.minimum(i, size_i - 1).to(tl.int64) * size_k, left_descriptor, i0)
        y_rows = Rows(right + tl.minimum(j, size_j - 1).to(tl.int64) * size_k, right_descriptor, j0)
        x_at = start_rows(x_rows, GROUP) + first_tile * GROUP
        y_at = start_rows(y_rows, GROUP) + first_tile * GROUP
        x_scales = left_scales + first_tile.to(tl.int64) * size_i + i
        y_scales = right_scales + first_tile.to(tl.int64) * size_j + j
        acc = tl.zeros((TILE.BLOCK_M, TILE.BLOCK_N), dtype=tl.float32)
        for _ in tl.range(first_tile, end_tile):
            x = load_rows(x_rows, x_at, None, True)
            y = load_rows(y_rows, y_at, None, True)
            x_scale = tl.load(x_scales, mask=i < size_i, other=0.0)
            y_scale = tl.load(y_scales, mask=j < size_j, other=0.0)
            proxy_fence(TILE.FENCE and left_descriptor is None)
            acc += tl.dot(x, tl.trans(y)) * (x_scale[:, None] * y_scale[None, :])
            x_at += GROUP
            y_at += GROUP
            x_scales += size_i
            y_scales += size_j
        store_gradient(acc, out, partials, expert, piece, num_split, i0, j0, size_i, size_j, TILE)
        unit = next_unit


def fp8_d_weight(
    left: ColumnCodes, right: ColumnCodes, tiles: TileTables, *, config: Config, piece_rows: int | None = None
) -> Tensor:
    """[E, size_i, size_j] = left^T right over each expert's rows, in the rows' dtype; zeros for one without rows.

    left [S, size_i] and right [S, size_j] of `quantize_columns` with these tiles. An expert with twice `piece_rows`
    rows is split (None: chosen from the sizes).
    """
    (size_i, size_k), size_j, device = left.codes.shape, right.codes.shape[0], left.codes.device
    num_experts, num_tiles = tiles.offsets.shape[0] - 1, size_k // GROUP.value
    out = torch.empty((num_experts, size_i, size_j), dtype=left.dtype, device=device)
    units = cdiv(size_i, config.block_m) * cdiv(size_j, config.block_n)
    piece_rows = piece_rows or piece_rows_for(size_k, units, WEIGHT_UNITS)
    pieces = row_pieces(tile_offsets(tiles.offsets), num_tiles, max(1, piece_rows // GROUP.value))
    partials = torch.empty((pieces.num_slots, size_i, size_j), dtype=torch.float32, device=device)
    fp8_d_weight_kernel[persistent_grid(device, pieces.pieces.shape[0] * units, config)](
        left.codes,
        left.scales,
        rows_descriptor(left.codes, config, block=(config.block_m, config.block_k)),
        right.codes,
        right.scales,
        rows_descriptor(right.codes, config, block=(config.block_n, config.block_k)),
        out,
        partials,
        pieces.pieces,
        pieces.state,
        size_i,
        size_j,
        size_k,
        **launch_options(device, config),
    )
    sum_pieces(partials, out, pieces, target_of(device).num_sms * 4)
    return out
