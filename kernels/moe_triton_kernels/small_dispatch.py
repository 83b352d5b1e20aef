"""The permutation and its tile tables in one launch, by one program, for a few assignments: decoding.

What `permutation` and `tiles` compute in four launches, in the same order and with the same device functions. With few
tokens the kernels of a layer take as long as their launches, and one program is done before a second one has begun.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.permutation import block_experts, count_block, earlier_equals, load_block
from moe_triton_kernels.tiles import BLOCK_SIZES, TileTables, places_of

MAX_SLOTS = 1024  # S up to which one program sorts in less time than further launches take [estimated, not measured]
BLOCK = 128  # slots compared with each other at a time
CHUNK = 32  # table entries that are compared with all experts at a time
NUM_WARPS = 8
NUM_SIZES = len(BLOCK_SIZES)


class FewRows(NamedTuple):
    """What a small dispatch writes beside the counts: offsets, source, position, and the tables of all tile sizes."""

    offsets: Any
    source: Any
    position: Any
    table: Any
    num_tiles: Any


@triton.jit
def place_few(
    experts, total, rows, num_slots,
    NUM_EXPERTS: tl.constexpr, SIZES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Every slot's row, every row's slot and the tile tables, by one program, given each expert's `total` [BLOCK_E]."""
    e = tl.arange(0, BLOCK_E)
    ends = tl.cumsum(total)
    num_rows = tl.sum(total)
    tl.store(rows.offsets, 0)
    tl.store(rows.offsets + 1 + e, ends, mask=e < NUM_EXPERTS)

    next_row = ends - total
    for i in range(tl.cdiv(num_slots, BLOCK)):
        slot, expert, exists = load_block(experts, None, 0, i, num_slots, 1, NUM_EXPERTS, False, BLOCK)
        row = tl.gather(next_row, tl.maximum(expert, 0), 0) + earlier_equals(expert, BLOCK)
        tl.store(rows.position + slot, tl.where(expert >= 0, row, -1), mask=exists)
        tl.store(rows.source + row, slot.to(tl.int32), mask=expert >= 0)
        tl.store(rows.source + slot, -1, mask=exists & (slot >= num_rows))
        next_row += count_block(expert, BLOCK_E)

    table = rows.table
    for i in tl.static_range(len(SIZES)):
        size = SIZES[i]
        tiles = tl.cdiv(total, size)
        last = tl.cumsum(tiles)
        here = tl.sum(tiles)
        tl.store(rows.num_tiles + i, here)
        for start in range(0, here, CHUNK):
            tile = start + tl.arange(0, CHUNK)
            # as many have all their tiles before; of a sum of comparisons Triton 3.9 counts bits, by way of the stack
            expert = -tl.sum((last[None, :] - tile[:, None] - 1) >> 31, 1)
            expert = tl.minimum(expert, NUM_EXPERTS - 1)  # past the end
            first_row = tl.gather(ends - total, expert, 0)
            first_tile = tl.gather(last - tiles, expert, 0)
            tl.store(table + 2 * tile, expert, mask=tile < here)
            tl.store(table + 2 * tile + 1, first_row + (tile - first_tile) * size, mask=tile < here)
        most = tl.minimum(num_slots, NUM_EXPERTS) + tl.maximum(num_slots - NUM_EXPERTS, 0) // size  # max_tiles
        table += 2 * (most + most % 2)  # spaced


@triton.jit(do_not_specialize=["num_slots"])
def small_dispatch_kernel(
    experts, counts, rows, num_slots,
    NUM_EXPERTS: tl.constexpr, SIZES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """See `small_dispatch`."""
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for i in range(tl.cdiv(num_slots, BLOCK)):
        _, expert, _ = load_block(experts, None, 0, i, num_slots, 1, NUM_EXPERTS, False, BLOCK)
        total += count_block(expert, BLOCK_E)
    tl.store(counts + e, total, mask=e < NUM_EXPERTS)
    place_few(experts, total, rows, num_slots, NUM_EXPERTS, SIZES, BLOCK, BLOCK_E, CHUNK)


def few_rows(shape: tuple[int, int], num_experts: int, device: torch.device) -> tuple[FewRows, TileTables]:
    """Memory for the rows of choices of this shape [T, K], and their tile tables as they will be."""
    num_tokens, top_k = shape
    places = places_of(num_tokens * top_k, num_experts, BLOCK_SIZES)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    new = offsets.new_empty  # sizes one by one, and no dtype: half a microsecond less
    table, num_tiles = new(places.size, 2), new(NUM_SIZES)
    rows = FewRows(offsets, new(num_tokens * top_k), new(num_tokens, top_k), table, num_tiles)
    return rows, TileTables(offsets, places, num_tiles, table, {})


def small_dispatch(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, TileTables]:
    """Compute `permutation.permute` without a capacity, and `tiles.tile_tables` of its offsets, in one launch.

    experts [T, K] with 1 to MAX_SLOTS assignments -> counts [E], offsets [E+1], source [S], position [T, K] and tables.
    """
    num_tokens, top_k = experts.shape
    rows, tiles = few_rows((num_tokens, top_k), num_experts, experts.device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=experts.device)
    small_dispatch_kernel[(1,)](
        experts.contiguous(), counts, rows, num_tokens * top_k,
        NUM_EXPERTS=num_experts, SIZES=BLOCK_SIZES, BLOCK=BLOCK, BLOCK_E=block_experts(num_experts), CHUNK=CHUNK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return counts, rows.offsets, rows.source, rows.position, tiles
