"""Row pieces: how products that contract over an expert's rows are shared out when one expert has very many of them.

An expert with at least twice `piece_rows` rows is split into pieces of about that many; every other expert is one
piece. The decision is made on the device, from the offsets. Pieces go by their expert's number of rows, most first:
long work then starts early, and what ends a kernel is short. So the pieces of split experts also come first, and a
split piece's number is its slot among the fp32 partial results, which a second kernel adds in the order of the rows:
same input, same bits.

Where routing is balanced no expert is split and no partial result is written; the second kernel finds nothing to do.
Otherwise the cost is 8 bytes per element of a split expert's gradient and piece, written and read once. `piece_rows`
bounds them by `units` tiles in all: at most 384 of 128 x 256 (50 MB written, 50 MB read) for a bf16 weight gradient,
half of that where one expert has half of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv, next_power_of_2

# what `state` holds where
NUM_PIECES, NUM_SPLIT_PIECES = tl.constexpr(0), tl.constexpr(1)
NUM_SPLIT_EXPERTS, NEXT_UNIT = tl.constexpr(2), tl.constexpr(3)
MIN_PIECE_ROWS = 1024  # a tile's partial result moves as many bytes as some hundred rows of its operands
CHUNK = 128  # table entries that a program writes at a time
BLOCK_SUM = 2048


@dataclass(frozen=True, kw_only=True)
class RowPieces:
    """The pieces of one dispatch's rows, on the device.

    state      [4] int32: at NUM_PIECES how many pieces there are, at NUM_SPLIT_PIECES how many of them belong to split
               experts, at NUM_SPLIT_EXPERTS how many experts are split; at NEXT_UNIT 0, from which the programs of a
               kernel count the tiles that they take
    pieces     [E + slots, 3] int32 (expert, first row, end row); not written past the number of pieces
    splits     [slots // 2, 3] int32 (expert, first slot, slots); not written past the number of split experts
    num_slots  the most pieces of split experts that there can be
    """

    state: Tensor
    pieces: Tensor
    splits: Tensor
    num_slots: int


def piece_rows_for(num_rows: int, tiles: int, units: int) -> int:
    """Rows of a piece, where an expert's result is `tiles` tiles and all the work is to be cut into `units` tiles.

    `units` is a constant of the kernel and not the number of processors: sums have the same order on every GPU.
    """
    return max(MIN_PIECE_ROWS, cdiv(num_rows * tiles, units))


@triton.jit(do_not_specialize=["num_experts", "piece_rows"])
def row_pieces_kernel(
    offsets, pieces, splits, state, num_experts, piece_rows, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr
):
    """One program per expert: it writes the expert's pieces behind those of the experts that have more rows."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    inside = experts < num_experts
    counts = tl.load(offsets + experts + 1, mask=inside, other=0) - tl.load(offsets + experts, mask=inside, other=0)
    parts = tl.where(inside, tl.maximum(counts // piece_rows, 1), 0)
    first_row = tl.load(offsets + expert)
    my_count = tl.load(offsets + expert + 1) - first_row
    my_parts = tl.maximum(my_count // piece_rows, 1)
    before = inside & ((counts > my_count) | ((counts == my_count) & (experts < expert)))
    first_piece = tl.sum(tl.where(before, parts, 0))
    for start in range(0, my_parts, CHUNK):
        part = start + tl.arange(0, CHUNK)
        mask = part < my_parts
        entries = pieces + 3 * (first_piece + part)
        wide = part.to(tl.int64)
        tl.store(entries, expert, mask=mask)
        tl.store(entries + 1, first_row + (wide * my_count // my_parts).to(tl.int32), mask=mask)
        tl.store(entries + 2, first_row + ((wide + 1) * my_count // my_parts).to(tl.int32), mask=mask)
    if my_parts > 1:
        entry = splits + 3 * tl.sum(before.to(tl.int32))
        tl.store(entry, expert)
        tl.store(entry + 1, first_piece)
        tl.store(entry + 2, my_parts)
    if expert == 0:
        is_split = parts > 1
        tl.store(state + NUM_PIECES, tl.sum(parts))
        tl.store(state + NUM_SPLIT_PIECES, tl.sum(tl.where(is_split, parts, 0)))
        tl.store(state + NUM_SPLIT_EXPERTS, tl.sum(is_split.to(tl.int32)))
        tl.store(state + NEXT_UNIT, 0)


def row_pieces(offsets: Tensor, num_rows: int, piece_rows: int) -> RowPieces:
    """The pieces of `offsets` [E+1] int32, the experts' row ranges; one launch, no host sync.

    `num_rows` is the most rows that offsets can hold: S of the dispatch.
    """
    num_experts, num_slots = offsets.shape[0] - 1, num_rows // piece_rows
    # three tensors: in one, their alignment would change with the sizes, and with it what is compiled
    sizes = (4, 3 * (num_experts + num_slots), 3 * (num_slots // 2))
    state, pieces, splits = (torch.empty(size, dtype=torch.int32, device=offsets.device) for size in sizes)
    row_pieces_kernel[(num_experts,)](
        offsets,
        pieces,
        splits,
        state,
        num_experts,
        piece_rows,
        BLOCK_E=next_power_of_2(num_experts),
        CHUNK=CHUNK,
    )
    return RowPieces(state=state, pieces=pieces.view(-1, 3), splits=splits.view(-1, 3), num_slots=num_slots)


@triton.jit
def load_piece(pieces, piece):
    """Piece number -> (expert, first row, end row), as int32 scalars."""
    entry = pieces + 3 * piece
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def sum_pieces_kernel(partials, out, splits, state, size, BLOCK: tl.constexpr):
    """out[e] = the sum of the split expert's slots, in their order, for every split expert e; `size` elements each."""
    num_blocks = tl.cdiv(size, BLOCK)
    num_units = tl.load(state + NUM_SPLIT_EXPERTS) * num_blocks
    for block in tl.range(tl.program_id(0), num_units, tl.num_programs(0)):
        expert, first_slot, slots = load_piece(splits, block // num_blocks)
        at = block % num_blocks * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        partial = partials + first_slot.to(tl.int64) * size + at
        for _ in tl.range(0, slots):
            total += tl.load(partial, mask=at < size, other=0.0)
            partial += size
        tl.store(out + expert.to(tl.int64) * size + at, total.to(out.dtype.element_ty), mask=at < size)


def sum_pieces(partials: Tensor, out: Tensor, pieces: RowPieces, num_programs: int) -> None:
    """Write out[e] for the experts that are split, from fp32 partials [slots, ...]; out [E, ...] is contiguous."""
    size = out[0].numel()  # launched even where nothing can be split: a first launch later would compile then
    sum_pieces_kernel[(num_programs,)](partials, out, pieces.splits, pieces.state, size, BLOCK=BLOCK_SUM)
