"""How a CPU cuts the dispatched rows into blocks, and the index from rows to places."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_triton.backends.torch import blocks
from moe_triton.backends.torch.cpu import CpuPolicy


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.one_of(st.integers(0, 16), st.integers(0, 300)), min_size=1, max_size=60))
def test_blocks_cover_every_row_once(sizes: list[int]) -> None:
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    for policy in (CpuPolicy(shapes_recur=False, num_threads=2), CpuPolicy(shapes_recur=True)):
        for most_batched_rows in (0, 32, 320):
            check_blocks(blocks.cut(bounds, policy, most_batched_rows), policy, sizes, bounds)
            check_layout(blocks.Layout(torch.tensor(bounds), policy, most_batched_rows))


def check_blocks(found: list[blocks.Block], policy: CpuPolicy, sizes: list[int], bounds: list[int]) -> None:
    rows_of = {e: range(bounds[e], bounds[e + 1]) for e, size in enumerate(sizes) if size > 0}
    place = 0
    for block in found:
        assert block.places.start == place
        place = block.places.stop
        row = block.rows.start
        for e, part in block.parts:
            assert rows_of.pop(e) == range(row, row + sizes[e])
            row += sizes[e]
            assert part.stop <= block.size
            assert part.stop - part.start == (sizes[e] if block.batch else policy.padded(sizes[e]))
            if block.batch:
                each, rest = divmod(block.size, block.batch.stop - block.batch.start)
                assert rest == 0
                assert part.start == (e - block.batch.start) * each
                assert part.stop <= part.start + each
        assert row == block.rows.stop
        if block.batch is None and len(block.parts) > 1:
            assert not block.is_padded
            assert block.size <= policy.shared_block_rows
        if block.batch and not policy.shapes_recur:
            fewest, most = policy.batched_block_rows
            assert fewest <= block.size <= most
            assert block.batch.stop - block.batch.start >= policy.threads
        if block.batch and policy.shapes_recur:
            assert (block.batch.start, block.batch.stop, len(found)) == (0, len(sizes), 1)
    assert not rows_of
    for first, second in pairwise(found):  # whatever may share a block does
        if not (first.batch or second.batch or first.is_padded or second.is_padded):
            assert first.size + second.parts[0][1].stop > policy.shared_block_rows


def check_layout(layout: blocks.Layout) -> None:
    kept = layout.num_rows
    if layout.place_of_row is not None and layout.row_of_place is not None:
        assert torch.equal(layout.row_of_place[layout.place_of_row], torch.arange(kept))
    else:
        assert layout.num_places == kept
    place_of_row = layout.rows(torch.arange(layout.num_places))
    assert torch.equal(place_of_row.unique(), place_of_row)
    assert len(place_of_row) == kept
    values = torch.randn(kept, 3)
    there_and_back = torch.full_like(values, float("nan"))
    for index, block in enumerate(layout.blocks):
        at_places = layout.spread(index, values)
        assert at_places.shape == (block.size, 3)
        layout.collect(index, at_places, there_and_back)
        if layout.policy.shapes_recur:
            assert int((at_places != 0).any(1).sum()) == block.rows.stop - block.rows.start
    assert torch.equal(values, there_and_back)
    assert layout.places(torch.tensor([[-1]], dtype=torch.int32)).item() == layout.num_places


@pytest.mark.parametrize("recurring", [False, True])
def test_experts_with_few_rows_share_a_block(recurring: bool) -> None:
    policy = CpuPolicy(shapes_recur=recurring)
    found = blocks.cut([0, 3, 3, 19, 36, 40], policy, 0)
    assert [(b.rows.start, b.rows.stop, b.size) for b in found] == (
        [(0, 19, 19), (19, 36, 32), (36, 40, 4)] if recurring else [(0, 40, 40)]
    )
    assert len(blocks.cut([16 * i for i in range(33)], policy, 0)) == 2
    assert len(blocks.cut([0, 200, 400], policy, 0)) == 2


def batches(sizes: list[int], policy: CpuPolicy, most_batched_rows: int = 320) -> list[tuple[int, int]]:
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    found = blocks.cut(bounds, policy, most_batched_rows)
    return [(b.batch.start, b.batch.stop) for b in found if b.batch]


def test_which_experts_share_a_batched_product() -> None:
    two_threads = CpuPolicy(shapes_recur=False, num_threads=2)
    assert batches([8] * 64, two_threads) == [(0, 64)]
    assert batches([256] * 8, two_threads) == [(0, 5), (5, 8)]  # as many as stay in cache
    assert batches([256] * 8, two_threads, most_batched_rows=255) == []
    # not where the padding costs more than it gains
    assert batches([100, 110, 1, 300, 300], two_threads) == [(0, 2), (3, 5)]
    assert batches([0, 32, 32, 0, 0, 32, 0], two_threads) == [(1, 3)]  # an idle expert costs reading its weights
    assert batches([3, 3, 3], two_threads) == []  # fewer rows share a block anyway
    four_threads = replace(two_threads, num_threads=4)
    assert batches([256] * 8, four_threads) == [(0, 5)]  # a product of its own for every thread
    recurring = CpuPolicy(shapes_recur=True)
    assert batches([5, 0, 32, 1], recurring, 32) == [(0, 4)]
    assert batches([5, 0, 33, 1], recurring, 32) == []
    assert batches([5, 0, 0, 1], recurring, 32) == []
