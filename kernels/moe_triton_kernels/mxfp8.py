"""A grouped product in MXFP8 for Blackwell: e4m3 codes, 32 of which along the contraction share a power of two.

The matrix unit applies the scales (E8M0: the exponent plus 127 in one byte), so that sums need no promotion
(Open Compute Project, Microscaling Formats 1.0). `quantize_mx` makes the operands, with the smallest power of two by
which none of 32 numbers is larger than 448. The product is compiled for Blackwell only, and no backend calls it yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.fp8 import CODES, padded
from moe_triton_kernels.grouped_gemm import tile_order
from moe_triton_kernels.launch import Config, launch_options, persistent_grid
from moe_triton_kernels.quantize import magnitude
from moe_triton_kernels.tiles import TileTables, load_tile

GROUP = tl.constexpr(32)
TOP, FRACTION = tl.constexpr(8), tl.constexpr(0x600000)  # 448 is 2^8 times 1.75: the bits of the fraction
BLOCK_ROWS, BLOCK_K = 32, 128  # of a program of quantize_mx


@dataclass(frozen=True, kw_only=True)
class MxCodes:
    """Matrices that are contracted along their last dimension k, a multiple of 128.

    codes   [..., k] float8_e4m3fn
    scales  [..., k / 32] uint8: 2^(scale - 127)
    """

    codes: Tensor
    scales: Tensor


@triton.jit(do_not_specialize=["num_rows"])
def quantize_mx_kernel(
    x,  # [matrices, rows, k]
    codes,  # [matrices, rows, padded k]
    scales,  # [matrices, rows, padded k / 32]
    num_rows,
    size_k,
    stride_m,
    stride_r,
    stride_k,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per block of rows, 128 of k and matrix."""
    SCALES: tl.constexpr = BLOCK_K // GROUP
    rows, k = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    matrix, inside = tl.program_id(2).to(tl.int64), rows < num_rows
    cells = x + matrix * stride_m + rows.to(tl.int64)[:, None] * stride_r + k.to(tl.int64)[None, :] * stride_k
    value = tl.load(cells, mask=inside[:, None] & (k < size_k)[None, :], other=0.0).to(tl.float32)
    groups = tl.reshape(value, (BLOCK_R * SCALES, GROUP))
    largest = tl.max(magnitude(groups), 1)
    exponent = largest >> 23  # biased by 127; 255 of a NaN and of an infinity
    above = ((largest & 0x7FFFFF) > FRACTION).to(tl.int32)
    byte = tl.where(exponent == 255, 255, tl.maximum(exponent - TOP + above, 0))
    # 2^(127 - byte), of which the bytes of finite numbers give no subnormal one
    factor = tl.where(byte == 255, 0x7FC00000, (254 - byte) << 23).to(tl.float32, bitcast=True)
    code = tl.reshape((groups * factor[:, None]).to(tl.float8e4nv), (BLOCK_R, BLOCK_K))
    row = matrix * num_rows + rows
    blocks = tl.cdiv(size_k, BLOCK_K)
    tl.store(codes + row[:, None] * (blocks * BLOCK_K) + k[None, :], code, mask=inside[:, None])
    byte = tl.reshape(byte, (BLOCK_R, SCALES)).to(tl.uint8)
    group = tl.program_id(1) * SCALES + tl.arange(0, SCALES)
    tl.store(scales + row[:, None] * (blocks * SCALES) + group[None, :], byte, mask=inside[:, None])


def quantize_mx(x: Tensor) -> MxCodes:
    """Codes of rows [R, k], or of matrices [E, R, k], along k; of any strides, so also of a projection's transpose."""
    matrices = x if x.dim() == 3 else x[None]
    num_matrices, num_rows, size_k = matrices.shape
    width = padded(size_k)
    codes = torch.empty((*x.shape[:-1], width), dtype=CODES, device=x.device)
    scales = torch.empty((*x.shape[:-1], width // GROUP.value), dtype=torch.uint8, device=x.device)
    if x.numel():
        quantize_mx_kernel[(cdiv(num_rows, BLOCK_ROWS), cdiv(size_k, BLOCK_K), num_matrices)](
            matrices, codes, scales, num_rows, size_k, *matrices.stride(), BLOCK_R=BLOCK_ROWS, BLOCK_K=BLOCK_K
        )
    return MxCodes(codes=codes, scales=scales)


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
