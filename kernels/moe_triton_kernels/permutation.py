"""The permutation that sorts assignments by expert, and the capacity that drops some of them first; no host sync.

Slots (token*K + choice) are cut into chunks. One kernel counts every chunk's assignments per expert, a second makes of
that, per expert, the number in all chunks before, and a third walks through each chunk again: a slot's rank is that
number plus its earlier equals within the chunk. All sums are of integers, so the result is bitwise deterministic.
Shapes: T tokens, K choices, E experts, S = T*K slots, G capacity groups, C chunks per group.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv, next_power_of_2
from moe_triton_kernels.launch import Launch, prepare

BLOCK = 128  # slots compared with each other at a time
MAX_CHUNKS = 4096  # bounds the table of counts, [G, E, C], however many slots there are
SCAN_ROWS, SCAN_CHUNKS = 4, 512  # the part of the table that a program of the scan holds at a time


@triton.jit
def load_block(experts, order, group, block, group_slots, TOP_K, NUM_EXPERTS, BY_CHOICE, BLOCK: tl.constexpr):
    """BLOCK places in a group's queue -> the slots in them, and their experts; expert -1 where there is none.

    The queue is `order` [G, S/G] if given, all first choices before all second ones with BY_CHOICE, else slot order.
    """
    place = block * BLOCK + tl.arange(0, BLOCK)
    exists = place < group_slots
    if order is not None:
        place = tl.load(order + group * group_slots + place, mask=exists, other=0).to(tl.int64)
    elif BY_CHOICE:
        tokens = group_slots // TOP_K
        place = place % tokens * TOP_K + place // tokens
    slot = group * group_slots + place
    expert = tl.load(experts + slot, mask=exists, other=-1)
    expert = tl.where((expert >= 0) & (expert < NUM_EXPERTS), expert, -1).to(tl.int32)
    return slot, expert, exists


@triton.jit
def earlier_equals(expert, BLOCK: tl.constexpr):
    """How many of the block's earlier slots have the same expert, [BLOCK]."""
    index = tl.arange(0, BLOCK)
    equal = (expert[:, None] == expert[None, :]) & (index[:, None] < index[None, :])
    return tl.sum(equal.to(tl.int32), 0)


@triton.jit
def count_block(expert, BLOCK_E: tl.constexpr):
    return tl.histogram(tl.maximum(expert, 0), BLOCK_E, mask=expert >= 0)


@triton.jit(do_not_specialize=["group_slots", "chunks", "blocks"])
def count_kernel(
    experts, order, table, group_slots, chunks, blocks,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BY_CHOICE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """table [G, E, C]: how many of a chunk's slots go to each expert. A chunk is `blocks` blocks of a group's queue."""
    group = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    count = tl.zeros((BLOCK_E,), tl.int32)
    for i in range(blocks):
        _, expert, _ = load_block(
            experts, order, group, chunk * blocks + i, group_slots, TOP_K, NUM_EXPERTS, BY_CHOICE, BLOCK
        )
        count += count_block(expert, BLOCK_E)
    e = tl.arange(0, BLOCK_E)
    tl.store(table + (group * NUM_EXPERTS + e) * chunks + chunk, count, mask=e < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_rows", "chunks"])
def scan_kernel(table, totals, num_rows, chunks, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Each row of table [G*E, C] -> its exclusive running sum, in place, and its total."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    start_of_row = row.to(tl.int64)[:, None] * chunks
    before = tl.zeros((BLOCK_R,), tl.int32)
    for start in range(0, chunks, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)[None, :]
        mask = (row < num_rows)[:, None] & (chunk < chunks)
        count = tl.load(table + start_of_row + chunk, mask=mask, other=0)
        tl.store(table + start_of_row + chunk, before[:, None] + tl.cumsum(count, 1) - count, mask=mask)
        before += tl.sum(count, 1)
    tl.store(totals + row, before, mask=row < num_rows)


@triton.jit(do_not_specialize=["group_slots", "chunks", "blocks", "capacity"])
def keep_kernel(
    experts, order, table, kept, group_slots, chunks, blocks, capacity,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BY_CHOICE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """kept [S]: the experts, with -1 for those that are not among the first `capacity` of their (group, expert)."""
    group = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    before = tl.load(table + (group * NUM_EXPERTS + e) * chunks + chunk, mask=e < NUM_EXPERTS, other=0)
    for i in range(blocks):
        slot, expert, exists = load_block(
            experts, order, group, chunk * blocks + i, group_slots, TOP_K, NUM_EXPERTS, BY_CHOICE, BLOCK
        )
        rank = tl.gather(before, tl.maximum(expert, 0), 0) + earlier_equals(expert, BLOCK)
        tl.store(kept + slot, tl.where(rank < capacity, expert, -1), mask=exists)
        before += count_block(expert, BLOCK_E)


@triton.jit(do_not_specialize=["num_slots", "chunks", "blocks"])
def place_kernel(
    experts, table, totals, offsets, source, position, num_slots, chunks, blocks,
    NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Every slot's row and every row's slot. A chunk also fills its share of the rows past the end."""
    chunk = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    total = tl.load(totals + e, mask=e < NUM_EXPERTS, other=0)
    ends = tl.cumsum(total)
    num_rows = tl.sum(total)
    if chunk == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + e, ends, mask=e < NUM_EXPERTS)
    next_row = ends - total + tl.load(table + e * chunks + chunk, mask=e < NUM_EXPERTS, other=0)
    for i in range(blocks):
        slot, expert, exists = load_block(experts, None, 0, chunk * blocks + i, num_slots, 1, NUM_EXPERTS, False, BLOCK)
        row = tl.gather(next_row, tl.maximum(expert, 0), 0) + earlier_equals(expert, BLOCK)
        tl.store(position + slot, tl.where(expert >= 0, row, -1), mask=exists)
        tl.store(source + row, slot.to(tl.int32), mask=expert >= 0)
        tl.store(source + slot, -1, mask=exists & (slot >= num_rows))
        next_row += count_block(expert, BLOCK_E)


def count_slots(
    experts: Tensor, order: Tensor | None, num_experts: int, groups: int, by_choice: bool
) -> tuple[Tensor, Tensor, int, int]:
    """The table [G, E, C] of assignments in the chunks before, the totals [G * E], and C and the blocks per chunk."""
    group_slots = experts.numel() // groups
    blocks, chunks = chunks_of(group_slots, groups)
    table = torch.empty(groups, num_experts, chunks, dtype=torch.int32, device=experts.device)
    totals = table.new_empty(groups * num_experts)
    count, scan = _count_launches(groups, chunks, num_experts, experts.shape[1], by_choice)
    count(experts, order, table, group_slots, chunks, blocks)
    scan(table, totals, groups * num_experts, chunks)
    return table, totals, chunks, blocks


@lru_cache(maxsize=4096)
def chunks_of(group_slots: int, groups: int) -> tuple[int, int]:
    """The blocks of a chunk, and the chunks of a group."""
    blocks = cdiv(cdiv(group_slots, BLOCK), max(1, MAX_CHUNKS // groups))
    return blocks, cdiv(group_slots, BLOCK * blocks)


@lru_cache(maxsize=4096)
def _count_launches(groups: int, chunks: int, num_experts: int, top_k: int, by_choice: bool) -> tuple[Launch, Launch]:
    constants = {"NUM_EXPERTS": num_experts, "BLOCK": BLOCK, "BLOCK_E": block_experts(num_experts)}
    count = prepare(count_kernel, (groups * chunks,), TOP_K=top_k, BY_CHOICE=by_choice, **constants)
    programs = cdiv(groups * num_experts, SCAN_ROWS)
    return count, prepare(scan_kernel, (programs,), BLOCK_R=SCAN_ROWS, BLOCK_C=SCAN_CHUNKS)


@lru_cache
def block_experts(num_experts: int) -> int:
    return max(64, next_power_of_2(num_experts))  # a histogram has at least as many bins as a warp has lanes


def keep_within_capacity(
    experts: Tensor, num_experts: int, capacity: int, groups: int, by_choice: bool, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The experts [T, K] with -1 at the dropped slots, and the assignments wanted per expert [E]."""
    order = None
    if keys is not None:
        order = keys.reshape(groups, -1).sort(dim=1, descending=True, stable=True).indices
    table, totals, chunks, blocks = count_slots(experts, order, num_experts, groups, by_choice)
    kept = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    keep_kernel[(groups * chunks,)](
        experts, order, table, kept, experts.numel() // groups, chunks, blocks, capacity,
        NUM_EXPERTS=num_experts, TOP_K=experts.shape[1], BY_CHOICE=by_choice,
        BLOCK=BLOCK, BLOCK_E=block_experts(num_experts),
    )  # fmt: skip
    return kept, totals.view(groups, num_experts).sum(0, dtype=torch.int32)


def permute(
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    capacity_groups: int = 1,
    by_choice: bool = False,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts [T, K] (int32 or int64) -> counts [E], offsets [E+1], source [S], position [T, K], all int32.

    Rows lie in expert order and, within an expert, in slot order; ids outside [0, num_experts) are skipped. source is
    -1 past the end, position -1 where dropped or skipped; counts are wanted, before dropping. With a `capacity`, an
    expert keeps that many of each of the `capacity_groups` runs of consecutive tokens: the highest `keys` [T, K] if
    given; else, with `by_choice`, first choices first; then the earliest. `capacity_groups` divides T. Three launches;
    seven with a capacity, and with keys a sort.
    """
    experts = experts.contiguous()
    (num_tokens, top_k), num_slots = experts.shape, experts.numel()
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device)
    source, position = offsets.new_empty(num_slots), offsets.new_empty(num_tokens, top_k)
    if num_slots == 0:
        return torch.zeros_like(offsets[1:]), offsets.zero_(), source, position
    counts = None
    if capacity is not None:
        experts, counts = keep_within_capacity(experts, num_experts, capacity, capacity_groups, by_choice, keys)
    table, totals, chunks, blocks = count_slots(experts, None, num_experts, 1, False)
    place = _place_launch(chunks, num_experts)
    place(experts, table, totals, offsets, source, position, num_slots, chunks, blocks)
    return totals if counts is None else counts, offsets, source, position


@lru_cache(maxsize=4096)
def _place_launch(chunks: int, num_experts: int) -> Launch:
    constants = {"NUM_EXPERTS": num_experts, "BLOCK": BLOCK, "BLOCK_E": block_experts(num_experts)}
    return prepare(place_kernel, (chunks,), **constants)
