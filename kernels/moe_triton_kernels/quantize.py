"""Kernels that make the operands of products in fp8; what they are, `fp8` says."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv, next_power_of_2
from moe_triton_kernels.fp8 import CODES, GROUP, TRITON_TYPES, ColumnCodes, RowCodes, WeightCodes, padded
from moe_triton_kernels.operands import PerExpert, expert_base, per_expert
from moe_triton_kernels.tiles import TileTables, load_tile

LARGEST, INVERSE = tl.constexpr(448.0), tl.constexpr(1 / 448)
TINY = tl.constexpr(2.0**-126)  # the smallest normal number of fp32
BLOCK_ROWS, BLOCK_COLUMNS = 32, 64  # of a program of quantize_rows and of quantize_columns


@triton.jit
def divide(x, y, inverse):
    """x / y in fp32 by their product with 1 / y and its remainder, rounded as a division rounds.

    (Markstein, IBM Journal of Research and Development 34, 1990.) Three instructions, where a division takes ten and a
    branch.
    """
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, y, x), inverse, quotient)


@triton.jit
def group_scale(largest):
    """The scale of a group, from the bits of its largest |x|: as integers, the largest of all is a NaN."""
    scale = divide(largest.to(tl.float32, bitcast=True), LARGEST, INVERSE)
    return tl.where(scale < TINY, 1.0, scale)


@triton.jit
def magnitude(x):
    """The bits of |x|, x in fp32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode(x, scale):
    """The codes of x in fp32, whose groups have these scales, [rows, 1] or [1, columns].

    No quotient exceeds LARGEST by more than the conversion rounds off. A zero loses its sign.
    """
    inverse = 1.0 / scale  # as the hardware approximates it
    inverse = tl.fma(tl.fma(-inverse, scale, 1.0), inverse, inverse)
    return divide(x, scale, inverse).to(tl.float8e4nv)


@triton.jit
def quantize(x, AXIS: tl.constexpr):
    """Codes of x in fp32, and a scale for each of its lines along AXIS, which are groups."""
    scale = group_scale(tl.max(magnitude(x), AXIS))
    return encode(x, tl.expand_dims(scale, AXIS)), scale


@triton.jit
def largest_of(x):
    """The bits of the largest |x| in each row."""
    return tl.max(magnitude(x.to(tl.float32)), 1)


@triton.jit
def only_if(condition, mask):
    """`mask & condition`, which the interpreter of Triton 3.9 makes a block of integers where one side is a number."""
    return tl.where(condition, mask, False)


@triton.jit
def store_scales(largest, out, rows, row_mask, group):
    """The scales of the group of this number, from `largest_of` it, written as those of RowCodes; see `store_codes`."""
    scale = group_scale(largest)
    num_groups = out.width // GROUP
    tl.store(out.scales + rows.to(tl.int64) * num_groups + group, scale, mask=only_if(group < num_groups, row_mask))
    return scale


@triton.jit
def store_codes(x, scale, out, rows, row_mask, group, first):
    """Write the codes of x [rows, .], from column `first` of a group on; nothing for a group past the last one.

    What lies past the rows' size has to be 0.
    """
    mask = only_if(group < out.width // GROUP, row_mask)
    columns = group * GROUP + first + tl.arange(0, x.shape[1])
    cells = out.codes + rows.to(tl.int64)[:, None] * out.width + columns[None, :]
    tl.store(cells, encode(x.to(tl.float32), scale[:, None]), mask=mask[:, None])


@triton.jit
def store_rows(x, out, rows, row_mask, group):
    """Write the codes and scales of x [rows, 128], the group of this number of RowCodes."""
    scale = store_scales(largest_of(x), out, rows, row_mask, group)
    store_codes(x, scale, out, rows, row_mask, group, 0)


@triton.jit
def store_columns(x, out, columns, inside, size, tile):
    """Write codes and scales of x [128, columns] in fp32, these columns of a tile of an expert's rows, as ColumnCodes.

    size: columns in all. Rows past the expert's last one have to be 0.
    """
    values, scale = quantize(x, 0)
    at = out.codes + columns.to(tl.int64)[:, None] * out.width + tile * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(at, tl.trans(values), mask=inside[:, None])
    tl.store(out.scales + tile.to(tl.int64) * size + columns, scale, mask=inside)


@triton.jit
def store_sums(x, out, columns, inside, size, tile):
    """Write the sums over the rows of x, as `store_columns` takes it, as those of ColumnCodes that have sums."""
    if out.sums is not None:
        tl.store(out.sums + tile.to(tl.int64) * size + columns, tl.sum(x, 0), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows_kernel(x, out, num_rows, size, BLOCK_R: tl.constexpr):
    """One program per block of rows and group."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1)
    columns = group * GROUP + tl.arange(0, GROUP)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    value = tl.load(x + rows.to(tl.int64)[:, None] * size + columns[None, :], mask=mask, other=0.0)
    store_rows(value, out, rows, rows < num_rows, group)


def quantize_rows(x: Tensor) -> RowCodes:
    """Codes of rows x [R, size], contiguous.

    A row is quantized once, however many experts it goes to: products gather its codes.
    """
    num_rows, size = x.shape
    found = RowCodes.empty(num_rows, size, x.dtype, x.device)
    if x.numel():
        quantize_rows_kernel[(cdiv(num_rows, BLOCK_ROWS), cdiv(size, GROUP.value))](
            x, found.argument(), num_rows, size, BLOCK_R=BLOCK_ROWS
        )
    return found


@triton.jit
def first_of_token(slots, row_mask, position, TOP_K: tl.constexpr, CHOICES: tl.constexpr):
    """Which rows are the first kept choice of their token; CHOICES: TOP_K or the next power of two."""
    choices = tl.arange(0, CHOICES)
    before = (choices[None, :] < (slots % TOP_K)[:, None]) & row_mask[:, None]
    cells = position + (slots // TOP_K).to(tl.int64)[:, None] * TOP_K + choices[None, :]
    return row_mask & (tl.max(tl.load(cells, mask=before, other=-1), 1) < 0)


@triton.jit
def quantize_columns_kernel(
    x,  # [S, size], or [T, size] where there is a source
    source,  # [S], or None
    position,  # [T, TOP_K], or None
    router_weights,  # [T * TOP_K], or None
    columns_out,  # ColumnCodes of the rows
    rows_out,  # RowCodes of x, or None
    tiles,
    size,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per tile of 128 rows and block of columns; those past the number of tiles have nothing to do."""
    tile = tl.program_id(0)
    if tile < tl.load(tiles.num_tiles):
        _, first_row, end_row = load_tile(tiles.table, tiles.offsets, tile, GROUP)
        rows = first_row + tl.arange(0, GROUP)
        row_mask = rows < end_row
        slots = rows * TOP_K if source is None else tl.load(source + rows, mask=row_mask, other=0)
        index = slots // TOP_K
        columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = columns < size
        cells = x + index.to(tl.int64)[:, None] * size + columns[None, :]
        value = tl.load(cells, mask=row_mask[:, None] & inside[None, :], other=0.0)
        store_columns(value.to(tl.float32), columns_out, columns, inside, size, tile)
        if router_weights is not None:
            scale = tl.load(router_weights + slots, mask=row_mask, other=0.0).to(tl.float32)
            store_sums(value.to(tl.float32) * scale[:, None], columns_out, columns, inside, size, tile)
        if rows_out is not None:
            is_first = first_of_token(slots, row_mask, position, TOP_K, CHOICES)
            store_rows(value, rows_out, index, is_first, tl.program_id(1))


def quantize_columns(x: Tensor, tiles: TileTables, *, source: Tensor | None = None, top_k: int = 1) -> ColumnCodes:
    """Codes of each expert's rows along the rows.

    x contiguous: [S, size] with rows in expert order, or [T, size], read at source[row] // top_k. Rows past offsets[E]
    are not read.
    """
    return _quantize_columns(x, tiles, source, top_k, BLOCK_COLUMNS)


def quantize_both(
    x: Tensor, tiles: TileTables, *, source: Tensor, position: Tensor, router_weights: Tensor | None = None
) -> tuple[RowCodes, ColumnCodes]:
    """`quantize_rows` of x [T, size] and `quantize_columns` of the gathered rows, reading x once.

    position [T, K]: the row of each choice, or -1. The codes of a token without a row are not written. router_weights
    [T, K] contiguous: where they are given, the columns have the sums of the rows times their weights.
    """
    num_rows, size = x.shape
    rows = RowCodes.empty(num_rows, size, x.dtype, x.device)
    top_k = position.shape[1]
    return rows, _quantize_columns(x, tiles, source, top_k, GROUP.value, position, rows, router_weights)


def _quantize_columns(
    x: Tensor,
    tiles: TileTables,
    source: Tensor | None,
    top_k: int,
    block_columns: int,
    position: Tensor | None = None,
    rows: RowCodes | None = None,
    router_weights: Tensor | None = None,
) -> ColumnCodes:
    size = x.shape[1]
    table, max_tiles = tiles.select(GROUP.value)
    found = ColumnCodes.empty(size, max_tiles, x.dtype, x.device, sums=router_weights is not None)
    if found.codes.numel():
        quantize_columns_kernel[(max_tiles, cdiv(size, block_columns))](
            x,
            source,
            position,
            router_weights,
            found.argument(),
            None if rows is None else rows.argument(),
            table,
            size,
            TOP_K=top_k,
            CHOICES=next_power_of_2(top_k),
            BLOCK_C=block_columns,
            num_warps=block_columns // 16,
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
    codes = encode(value, scale)
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
