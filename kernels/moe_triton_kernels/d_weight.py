"""Gradients of the experts' matrices and biases: products that contract over each expert's rows.

    out[e][i, j] = sum over e's rows r of left[r, i] * right[r, j]
One of the two operands is a token matrix gathered by row -> token (X for dW1, dO for dW2), the other lies in expert
order. Swapping them writes the transposed gradient, so either weight layout gets contiguous stores. An expert's rows
are summed in order, by one program or, where they are very many, by several whose results are added in order
(`row_pieces`): same input, same bits. An expert without rows gets zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_triton_kernels.arithmetic import cdiv, next_power_of_2
from moe_triton_kernels.descriptors import rows_descriptor
from moe_triton_kernels.grouped_gemm import proxy_fence, split_columns, tile_order
from moe_triton_kernels.launch import BLACKWELL, Config, launch_options, persistent_grid, target_of
from moe_triton_kernels.operands import in_units, unit_of
from moe_triton_kernels.row_pieces import (
    NEXT_UNIT,
    NUM_PIECES,
    NUM_SPLIT_PIECES,
    load_piece,
    piece_rows_for,
    row_pieces,
    sum_pieces,
)

# 3 per processor of a large GPU: fewer leave programs idle at the end, more write more partial results
WEIGHT_UNITS = 384
BIAS_UNITS = 4096  # its programs wait for memory: more of them run at once


class Contracted(NamedTuple):
    """An operand of a product over rows, in a kernel: BLOCK columns of a matrix whose rows are contiguous.

    data        pointer to the matrix
    descriptor  of the matrix, which brings as many columns, or None
    size        elements of a row
    first       the first column; EVEN: all of them are less than `size`
    GATHERED    read at the rows' tokens, not at the rows
    """

    data: Any
    descriptor: Any
    size: Any
    first: Any
    BLOCK: Any
    EVEN: Any
    GATHERED: Any


@triton.jit
def token_of(rows, row_mask, source, TOP_K: tl.constexpr):
    """The rows' tokens; 0 for a row that is not there. The rows themselves where nothing is gathered."""
    if source is None:
        return rows
    else:
        return tl.load(source + rows, mask=row_mask, other=0) // TOP_K


@triton.jit
def load_contracted(operand, rows, tokens, row_mask, MASKED: tl.constexpr, NARROW: tl.constexpr):
    """[rows, columns] of an operand; 0 for a column that is not there and, where MASKED, for a row that is not."""
    columns = operand.first + tl.arange(0, operand.BLOCK)
    if not operand.GATHERED:
        offsets = rows.to(tl.int64) * operand.size
    elif NARROW:
        offsets = (tokens * (operand.size // 8)).to(tl.uint32, bitcast=True).to(tl.int64) * 8
    else:
        offsets = tokens.to(tl.int64) * operand.size
    cells = operand.data + offsets[:, None] + columns[None, :]
    if MASKED and operand.EVEN:
        return tl.load(cells, mask=row_mask[:, None], other=0.0)
    elif MASKED:
        return tl.load(cells, mask=row_mask[:, None] & (columns < operand.size)[None, :], other=0.0)
    elif operand.EVEN:
        return tl.load(cells)
    else:
        return tl.load(cells, mask=(columns < operand.size)[None, :], other=0.0)


@triton.jit
def add_rows(acc, left, right, first, end_row, tokens, MASKED: tl.constexpr, NARROW: tl.constexpr, TILE):
    """acc + left^T right over BLOCK_K rows from `first` on. MASKED: some of them may lie past the end.

    Then both operands are masked: what lies there may be NaN, which a zero on the other side does not remove.
    """
    rows = first + tl.arange(0, TILE.BLOCK_K)
    row_mask = rows < end_row
    if left.descriptor is not None and not MASKED:
        x = left.descriptor.load([first, left.first])
    else:
        x = load_contracted(left, rows, tokens, row_mask, MASKED, NARROW)
    if right.descriptor is not None and not MASKED:
        y = right.descriptor.load([first, right.first])
    else:
        y = load_contracted(right, rows, tokens, row_mask, MASKED, NARROW)
    proxy_fence(TILE.FENCE and x.dtype.primitive_bitwidth == 16)
    return tl.dot(tl.trans(x), y, acc, input_precision="ieee")


@triton.jit
def sum_over_rows(left, right, source, first_row, end_row, TOP_K: tl.constexpr, NARROW: tl.constexpr, TILE):
    """fp32 [BLOCK_M, BLOCK_N]: left^T right over the rows, in their order, of two operands `Contracted`.

    A row's token is loaded one block ahead: loaded where it is used, it would take stages of the pipeline from the
    operands.
    """
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    block = tl.arange(0, BLOCK_K)
    tokens = token_of(first_row + block, first_row + block < end_row, source, TOP_K)
    acc = tl.zeros((TILE.BLOCK_M, TILE.BLOCK_N), dtype=tl.float32)
    if left.descriptor is None and right.descriptor is None:
        for first in tl.range(first_row, end_row, BLOCK_K):
            here = tokens
            ahead = first + BLOCK_K + block
            tokens = token_of(ahead, ahead < end_row, source, TOP_K)
            acc = add_rows(acc, left, right, first, end_row, here, True, NARROW, TILE)
    else:
        tail = end_row - (end_row - first_row) % BLOCK_K
        for first in tl.range(first_row, tail, BLOCK_K):
            here = tokens
            ahead = first + BLOCK_K + block
            tokens = token_of(ahead, ahead < end_row, source, TOP_K)
            acc = add_rows(acc, left, right, first, end_row, here, False, NARROW, TILE)
        if tail < end_row:
            acc = add_rows(acc, left, right, tail, end_row, tokens, True, NARROW, TILE)
    return acc


@triton.jit
def take_unit(state, unit, num_split):
    """The unit that a program does after this one."""
    if num_split > 0:  # units differ in length: whoever is free takes the next one
        next_unit = tl.num_programs(0) + tl.atomic_add(state + NEXT_UNIT, 1, sem="relaxed")
    else:
        next_unit = unit + tl.num_programs(0)
    return next_unit


@triton.jit
def store_gradient(acc, out, partials, expert, piece, num_split, i0, j0, size_i, size_j, TILE):
    """Write a tile of the expert's gradient, or of the partial result of this piece of a split expert."""
    PARTS: tl.constexpr = TILE.PARTS
    PART: tl.constexpr = TILE.BLOCK_N // PARTS
    i = i0 + tl.arange(0, TILE.BLOCK_M)
    blocks = split_columns(acc, PARTS)
    for part in tl.static_range(PARTS):
        columns = j0 + part * PART + tl.arange(0, PART)
        mask = (i < size_i)[:, None] & (columns < size_j)[None, :]
        cells = i.to(tl.int64)[:, None] * size_j + columns[None, :]
        if piece < num_split:
            tl.store(partials + piece.to(tl.int64) * size_i * size_j + cells, blocks[part], mask=mask)
        else:
            value = blocks[part].to(out.dtype.element_ty)
            tl.store(out + expert.to(tl.int64) * size_i * size_j + cells, value, mask=mask)


@triton.jit
def d_weight_kernel(
    left,  # [S, size_i], or [T, size_i] gathered
    right,  # [S, size_j], or [T, size_j] gathered
    ordered,  # descriptor of the one that is not gathered, or None
    source,  # [S], or None where neither is gathered
    out,  # [E, size_i, size_j]
    partials,  # [slots, size_i, size_j] fp32
    pieces,
    state,
    size_i,
    size_j,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,  # or else right is gathered
    EVEN_I: tl.constexpr,
    EVEN_J: tl.constexpr,
    UNIT: tl.constexpr,  # divides both sizes (see `unit_of`)
    NARROW: tl.constexpr,  # 8 divides both sizes, and the gathered matrix has less than 2^31 times 8 elements
    TILE,
):
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    size_i, size_j = in_units(size_i, UNIT), in_units(size_j, UNIT)
    num_i = tl.cdiv(size_i, BLOCK_M)
    num_j = tl.cdiv(size_j, BLOCK_N)
    per_piece = num_i * num_j
    num_units = tl.load(state + NUM_PIECES) * per_piece
    num_split = tl.load(state + NUM_SPLIT_PIECES)
    unit = tl.program_id(0)
    while unit < num_units:
        next_unit = take_unit(state, unit, num_split)
        piece = unit // per_piece
        tile_i, tile_j = tile_order(unit % per_piece, num_i, num_j, TILE.GROUP)
        expert, first_row, end_row = load_piece(pieces, piece)
        i0, j0 = tile_i * BLOCK_M, tile_j * BLOCK_N
        acc = sum_over_rows(
            Contracted(left, None if GATHER_LEFT else ordered, size_i, i0, BLOCK_M, EVEN_I, GATHER_LEFT),
            Contracted(
                right,
                ordered if GATHER_LEFT else None,
                size_j,
                j0,
                BLOCK_N,
                EVEN_J,
                not GATHER_LEFT and source is not None,
            ),
            source,
            first_row,
            end_row,
            TOP_K,
            NARROW,
            TILE,
        )
        store_gradient(acc, out, partials, expert, piece, num_split, i0, j0, size_i, size_j, TILE)
        unit = next_unit


def ordered_descriptor(rows: Tensor, config: Config, width: int) -> TensorDescriptor | None:
    """Rows in expert order as a descriptor, where whole blocks of them come by TMA.

    Not on Blackwell: the masked rest would be a second product into one accumulator (triton-lang/triton issue 10821).
    """
    if target_of(rows.device).architecture in BLACKWELL:
        return None
    return rows_descriptor(rows, config, block=(config.block_k, width))


def d_weight(
    left: Tensor,
    right: Tensor,
    source: Tensor,
    offsets: Tensor,
    *,
    top_k: int,
    gather_left: bool,
    config: Config,
    gathers: bool = True,
    piece_rows: int | None = None,
) -> Tensor:
    """[E, size_i, size_j] = left^T right over each expert's rows, in left's dtype.

    left [S, size_i] and right [S, size_j], contiguous, rows in expert order, except that one of them is a token matrix
    [T, ...] read at source[row] // top_k: `left` if `gather_left`, else `right`, unless `gathers` is False (with
    `gather_left` False). An expert with twice `piece_rows` rows is split (None: chosen from the sizes).
    """
    size_i, size_j, num_experts = left.shape[1], right.shape[1], offsets.shape[0] - 1
    out = left.new_empty((num_experts, size_i, size_j))
    tiles = cdiv(size_i, config.block_m) * cdiv(size_j, config.block_n)
    num_rows = source.shape[0]
    pieces = row_pieces(offsets, num_rows, piece_rows or piece_rows_for(num_rows, tiles, WEIGHT_UNITS))
    partials = left.new_empty((pieces.num_slots, size_i, size_j), dtype=torch.float32)
    gathered, rows = (left, right) if gather_left else (right, left)
    d_weight_kernel[persistent_grid(left.device, pieces.pieces.shape[0] * tiles, config)](
        left,
        right,
        ordered_descriptor(rows, config, config.block_n if gather_left else config.block_m),
        source if gathers else None,
        out,
        partials,
        pieces.pieces,
        pieces.state,
        size_i,
        size_j,
        TOP_K=top_k,
        GATHER_LEFT=gather_left,
        EVEN_I=size_i % config.block_m == 0,
        EVEN_J=size_j % config.block_n == 0,
        UNIT=unit_of(left.element_size(), size_i, size_j),
        NARROW=size_i % 8 == 0 and size_j % 8 == 0 and gathered.numel() < 2**34,
        **launch_options(left.device, config),
    )
    sum_pieces(partials, out, pieces, target_of(left.device).num_sms * 4)
    return out


@triton.jit
def d_bias_kernel(
    values,  # [S, size], or [T, size] gathered where there are router weights
    router_weights,  # [T * K], or None
    source,  # [S]
    out,  # [E, size]
    partials,  # [slots, size] fp32
    pieces,
    state,
    size,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per piece and column block; those past the number of pieces have nothing to do."""
    piece = tl.program_id(0)
    if piece >= tl.load(state + NUM_PIECES):
        return
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    expert, first_row, end_row = load_piece(pieces, piece)
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in tl.range(first_row, end_row, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        row_mask = rows < end_row
        index = rows if router_weights is None else token_of(rows, row_mask, source, TOP_K)
        at = values + index.to(tl.int64) * size
        value = tl.load(at[:, None] + columns[None, :], mask=row_mask[:, None] & (columns < size)[None, :], other=0.0)
        value = value.to(tl.float32)
        if router_weights is not None:
            slots = tl.load(source + rows, mask=row_mask, other=0)
            value *= tl.load(router_weights + slots, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(value, 0)
    if piece < tl.load(state + NUM_SPLIT_PIECES):
        tl.store(partials + piece.to(tl.int64) * size + columns, total, mask=columns < size)
    else:
        tl.store(out + expert.to(tl.int64) * size + columns, total.to(out.dtype.element_ty), mask=columns < size)


def d_bias(
    values: Tensor,
    source: Tensor,
    offsets: Tensor,
    *,
    top_k: int,
    router_weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
    piece_rows: int | None = None,
) -> Tensor:
    """[E, size]: the sum of each expert's rows, in `dtype` (None: values'); zeros for an expert without rows.

    Without `router_weights`, values [S, size] lie in expert order (db1 = sum dH), or are the sums of tiles, between
    whose `tile_offsets` each expert's lie. With them ([T, K] contiguous), values [T, size] are read at the row's token
    and multiplied by its weight (db2 = sum w dO). `piece_rows` as in `d_weight`.
    """
    num_experts, size = offsets.shape[0] - 1, values.shape[1]
    out = values.new_empty((num_experts, size), dtype=dtype)
    block_c = min(128, next_power_of_2(size))
    tiles, num_rows = cdiv(size, block_c), (values if router_weights is None else source).shape[0]
    pieces = row_pieces(offsets, num_rows, piece_rows or piece_rows_for(num_rows, tiles, BIAS_UNITS))
    partials = values.new_empty((pieces.num_slots, size), dtype=torch.float32)
    d_bias_kernel[(pieces.pieces.shape[0], tiles)](
        values,
        router_weights,
        source,
        out,
        partials,
        pieces.pieces,
        pieces.state,
        size,
        TOP_K=top_k,
        BLOCK_R=32,
        BLOCK_C=block_c,
    )
    sum_pieces(partials, out, pieces, target_of(values.device).num_sms)
    return out
