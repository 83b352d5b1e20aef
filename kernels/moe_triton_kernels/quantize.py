"""Kernels that make the operands of products in fp8; what they are, `fp8` says."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.fp8 import CODES, GROUP, TRITON_TYPES, ColumnCodes, RowCodes, WeightCodes, padded
from moe_triton_kernels.operands import PerExpert, expert_base, per_expert
from moe_triton_kernels.tiles import TileTables, load_tile

LARGEST = tl.constexpr(448.0)
BLOCK_ROWS, BLOCK_COLUMNS = 32, 64  # of a program of quantize_rows and of quantize_columns


@triton.jit
def group_scale(largest):
    """The scale of a group, from the bits of its largest |x|: as integers, the largest of all is a NaN."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), LARGEST)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def magnitude(x):
    """The bits of |x|, x in fp32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode(x, scale):
    """The codes of x in fp32."""
    code = tl.div_rn(x, scale)
    code = tl.where(code > LARGEST, LARGEST, tl.where(code < -LARGEST, -LARGEST, code))  # a NaN stays one
    return code.to(tl.float8e4nv)


@triton.jit
def quantize(x, AXIS: tl.constexpr):
    """Codes of x in fp32, and a scale for each of its lines along AXIS, which are groups."""
    scale = group_scale(tl.max(magnitude(x), AXIS))
    wide = tl.expand_dims(scale, AXIS)
    return encode(x, tl.broadcast_to(wide, x.shape)), scale


@triton.jit
def store_group(x, codes, scales, rows, row_mask, group, size):
    """Write the codes and scales of x [rows, 128] in fp32, the group of this number of RowCodes.

    What lies past the size has to be 0.
    """
    values, scale = quantize(x, 1)
    num_groups = tl.cdiv(size, GROUP)
    cells = rows.to(tl.int64) * (num_groups * GROUP) + group * GROUP
    tl.store(codes + cells[:, None] + tl.arange(0, GROUP)[None, :], values, mask=row_mask[:, None])
    tl.store(scales + rows.to(tl.int64) * num_groups + group, scale, mask=row_mask)


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows_kernel(x, codes, scales, num_rows, size, BLOCK_R: tl.constexpr):
    """One program per block of rows and group."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1)
    columns = group * GROUP + tl.arange(0, GROUP)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    value = tl.load(x + rows.to(tl.int64)[:, None] * size + columns[None, :], mask=mask, other=0.0)
    store_group(value.to(tl.float32), codes, scales, rows, rows < num_rows, group, size)


def quantize_rows(x: Tensor) -> RowCodes:
    """Codes of rows x [R, size], contiguous.

    A row is quantized once, however many experts it goes to: products gather its codes.
    """
    num_rows, size = x.shape
    found = RowCodes.empty(num_rows, size, x.dtype, x.device)
    if x.numel():
        quantize_rows_kernel[(cdiv(num_rows, BLOCK_ROWS), cdiv(size, GROUP.value))](
            x, found.codes, found.scales, num_rows, size, BLOCK_R=BLOCK_ROWS
        )
    return found


@triton.jit
def quantize_columns_kernel(
    x,  # [S, size], or [T, size] where there is a source
    source,  # [S], or None
    codes,  # [size, width]
    scales,  # [tiles, size]
    tiles,
    size,
    width,
    TOP_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per tile of 128 rows and block of columns; those past the number of tiles have nothing to do."""
    tile = tl.program_id(0)
    if tile < tl.load(tiles.num_tiles):
        _, first_row, end_row = load_tile(tiles.table, tiles.offsets, tile, GROUP)
        rows = first_row + tl.arange(0, GROUP)
        row_mask = rows < end_row
        index = rows if source is None else tl.load(source + rows, mask=row_mask, other=0) // TOP_K
        columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = columns < size
        cells = x + index.to(tl.int64)[:, None] * size + columns[None, :]
        value = tl.load(cells, mask=row_mask[:, None] & inside[None, :], other=0.0)
        found, scale = quantize(value.to(tl.float32), 0)
        at = codes + columns.to(tl.int64)[:, None] * width + tile * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(at, tl.trans(found), mask=inside[:, None])
        tl.store(scales + tile.to(tl.int64) * size + columns, scale, mask=inside)


def quantize_columns(x: Tensor, tiles: TileTables, *, source: Tensor | None = None, top_k: int = 1) -> ColumnCodes:
    """Codes of each expert's rows along the rows.

    x contiguous: [S, size] with rows in expert order, or [T, size], read at source[row] // top_k. Rows past offsets[E]
    are not read.
    """
    size = x.shape[1]
    table, max_tiles = tiles.select(GROUP.value)
    found = ColumnCodes(
        codes=torch.empty((size, max_tiles * GROUP.value), dtype=CODES, device=x.device),
        scales=torch.empty((max_tiles, size), dtype=torch.float32, device=x.device),
        dtype=x.dtype,
    )
    if found.codes.numel():
        quantize_columns_kernel[(max_tiles, cdiv(size, BLOCK_COLUMNS))](
            x,
            source,
            found.codes,
            found.scales,
            table,
            size,
            max_tiles * GROUP.value,
            TOP_K=top_k,
            BLOCK_C=BLOCK_COLUMNS,
        )
    return found


@triton.jit
def quantize_weight_kernel(
    weight,  # per expert [k, columns]
    forward,  # [E, columns, padded k]
    backward,  # [E, k, padded columns]
    scales,  # [E, blocks of k, blocks of columns]
    size_k,
    size_columns,
    DTYPE: tl.constexpr,
):
    """One program per expert and block."""
    blocks_k, blocks_n = tl.cdiv(size_k, GROUP), tl.cdiv(size_columns, GROUP)
    block = tl.program_id(0)
    expert = block // (blocks_k * blocks_n)
    block_k, block_n = block // blocks_n % blocks_k, block % blocks_n
    k = (block_k * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    columns = (block_n * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    cells = expert_base(weight, expert, DTYPE) + k[:, None] * weight.stride_k + columns[None, :] * weight.stride_n
    value = tl.load(cells, mask=(k < size_k)[:, None] & (columns < size_columns)[None, :], other=0.0).to(tl.float32)
    scale = group_scale(tl.max(tl.max(magnitude(value), 1), 0))
    tl.store(scales + block, scale)
    codes = encode(value, tl.broadcast_to(scale, value.shape))
    across, down = blocks_n * GROUP, blocks_k * GROUP
    at = backward + expert.to(tl.int64) * size_k * across + k[:, None] * across + columns[None, :]
    tl.store(at, codes, mask=(k < size_k)[:, None])
    at = forward + expert.to(tl.int64) * size_columns * down + columns[:, None] * down + k[None, :]
    tl.store(at, tl.trans(codes), mask=(columns < size_columns)[:, None])


def quantize_weight(weight: PerExpert, *, size_k: int, size_columns: int) -> WeightCodes:
    """Codes of the experts' matrices [size_k, size_columns], for both directions; weight: any strides."""
    num_experts, device = weight.data.shape[0], weight.data.device
    forward = torch.empty((num_experts, size_columns, padded(size_k)), dtype=CODES, device=device)
    backward = torch.empty((num_experts, size_k, padded(size_columns)), dtype=CODES, device=device)
    blocks = (num_experts, cdiv(size_k, GROUP.value), cdiv(size_columns, GROUP.value))
    scales = torch.empty(blocks, dtype=torch.float32, device=device)
    if scales.numel():
        quantize_weight_kernel[(scales.numel(),)](
            weight.weight(),
            forward,
            backward,
            scales,
            size_k,
            size_columns,
            DTYPE=TRITON_TYPES[weight.held[0].dtype],
            num_warps=8,
        )
    return WeightCodes(
        forward=per_expert(forward).transposed()._replace(scales=scales),
        backward=per_expert(backward).transposed()._replace(scales=scales.mT),
    )
