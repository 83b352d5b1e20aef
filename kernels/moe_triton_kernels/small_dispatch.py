"""The permutation and its tile tables in one launch, by one program, for a few assignments: decoding.

What `permutation` and `tiles` compute in four launches, in the same order and with the same device functions. With few
tokens the kernels of a layer take as long as their launches, and one program is done before a second one has begun.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.permutation import block_experts, count_block, earlier_equals, load_block
from moe_triton_kernels.tiles import BLOCK_SIZES, TileTables, max_tiles, spaced

MAX_SLOTS = 1024  # S up to which one program sorts in less time than further launches take [estimated, not measured]
BLOCK = 128  # slots compared with each other at a time
CHUNK = 32  # table entries that are compared with all experts at a time
NUM_WARPS = 8


@triton.jit(do_not_specialize=["num_slots"])
def small_dispatch_kernel(
    experts, counts, offsets, source, position, table, num_tiles, num_slots,
    NUM_EXPERTS: tl.constexpr, SIZES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """See `small_dispatch`."""
    e = tl.arange(0, BLOCK_E)
    blocks = tl.cdiv(num_slots, BLOCK)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for i in range(blocks):
        _, expert, _ = load_block(experts, None, 0, i, num_slots, 1, NUM_EXPERTS, False, BLOCK)
        total += count_block(expert, BLOCK_E)
    ends = tl.cumsum(total)
    num_rows = tl.sum(total)
    tl.store(counts + e, total, mask=e < NUM_EXPERTS)
    tl.store(offsets, 0)
    tl.store(offsets + 1 + e, ends, mask=e < NUM_EXPERTS)

    next_row = ends - total
    for i in range(blocks):
        slot, expert, exists = load_block(experts, None, 0, i, num_slots, 1, NUM_EXPERTS, False, BLOCK)
        row = tl.gather(next_row, tl.maximum(expert, 0), 0) + earlier_equals(expert, BLOCK)
        tl.store(position + slot, tl.where(expert >= 0, row, -1), mask=exists)
        tl.store(source + row, slot.to(tl.int32), mask=expert >= 0)
        tl.store(source + slot, -1, mask=exists & (slot >= num_rows))
        next_row += count_block(expert, BLOCK_E)

    for i in tl.static_range(len(SIZES)):
        size = SIZES[i]
        tiles = tl.cdiv(total, size)
        last = tl.cumsum(tiles)
        here = tl.sum(tiles)
        tl.store(num_tiles + i, here)
        for start in range(0, here, CHUNK):
            tile = start + tl.arange(0, CHUNK)
            expert = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)  # as many have all their tiles before
            expert = tl.minimum(expert, NUM_EXPERTS - 1)  # past the end
            first_row = tl.gather(ends - total, expert, 0)
            first_tile = tl.gather(last - tiles, expert, 0)
            tl.store(table + 2 * tile, expert, mask=tile < here)
            tl.store(table + 2 * tile + 1, first_row + (tile - first_tile) * size, mask=tile < here)
        most = tl.minimum(num_slots, NUM_EXPERTS) + tl.maximum(num_slots - NUM_EXPERTS, 0) // size  # max_tiles
        table += 2 * (most + most % 2)  # spaced


def small_dispatch(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, TileTables]:
    """Compute `permutation.permute` without a capacity, and `tiles.tile_tables` of its offsets, in one launch.

    experts [T, K] with 1 to MAX_SLOTS assignments -> counts [E], offsets [E+1], source [S], position [T, K] and tables.
    """
    num_slots, device = experts.numel(), experts.device
    lengths = [max_tiles(num_slots, num_experts, block_m) for block_m in BLOCK_SIZES]
    places = [spaced(length) for length in lengths]
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    source = torch.empty(num_slots, dtype=torch.int32, device=device)
    position = torch.empty(experts.shape, dtype=torch.int32, device=device)
    table = torch.empty((sum(places), 2), dtype=torch.int32, device=device)
    num_tiles = torch.empty(len(BLOCK_SIZES), dtype=torch.int32, device=device)
    small_dispatch_kernel[(1,)](
        experts.contiguous(), counts, offsets, source, position, table, num_tiles, num_slots,
        NUM_EXPERTS=num_experts, SIZES=BLOCK_SIZES, BLOCK=BLOCK, BLOCK_E=block_experts(num_experts), CHUNK=CHUNK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    tables = tuple(part[:length] for part, length in zip(table.split(places), lengths, strict=True))
    tiles = TileTables(offsets=offsets, block_sizes=BLOCK_SIZES, num_tiles=num_tiles, tables=tables)
    return counts, offsets, source, position, tiles
