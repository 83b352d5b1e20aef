"""Tile tables against a loop over experts."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_triton_kernels.tiles import BLOCK_SIZES, CHUNK, load_tile, max_tiles, tile_tables

device = "cuda" if torch.cuda.is_available() else "cpu"


def make_offsets(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int().to(device)


def expected_tiles(counts: list[int], block_m: int) -> list[list[int]]:
    tiles, row = [], 0
    for expert, count in enumerate(counts):
        tiles += [[expert, start] for start in range(row, row + count, block_m)]
        row += count
    return tiles


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 15, 16, 17, 128, 300]), min_size=1, max_size=9), spare=st.integers(0, 40)
)
def test_tables_match_a_loop_over_experts(counts: list[int], spare: int) -> None:
    num_rows = sum(counts) + spare
    tables = tile_tables(make_offsets(counts), num_rows)
    assert tables.places.block_sizes == BLOCK_SIZES
    for block_m in BLOCK_SIZES:
        (table, num_tiles, _), most = tables.select(block_m)
        assert tables.select(block_m)[0].table is table  # no second view of it
        expected = expected_tiles(counts, block_m)
        assert num_tiles[0].item() == len(expected)
        assert table[: len(expected)].tolist() == expected
        assert table.shape[0] >= most == max_tiles(num_rows, len(counts), block_m)


def test_an_expert_with_more_tiles_than_a_program_writes_at_a_time() -> None:
    counts = [3, 300 * 16, 17]  # 300 tiles of 16 rows: three rounds of CHUNK
    tiles, _ = tile_tables(make_offsets(counts), sum(counts)).select(16)
    assert 2 * CHUNK < 300
    assert tiles.table[: tiles.num_tiles[0].item()].tolist() == expected_tiles(counts, 16)


@pytest.mark.parametrize("block_m", [1, 3, 16])
@pytest.mark.parametrize("num_experts", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 15, 16, 17, 18, 19, 33])
def test_max_tiles_is_reached_and_never_passed(num_rows: int, num_experts: int, block_m: int) -> None:
    def most(rows: int, experts: int) -> int:  # by trying every spread of the rows over the experts
        if experts == 1:
            return -(-rows // block_m)
        return max(-(-first // block_m) + most(rows - first, experts - 1) for first in range(rows + 1))

    assert max_tiles(num_rows, num_experts, block_m) == most(num_rows, num_experts)


@pytest.mark.parametrize("num_rows", [1, 8, 29, 36, 43, 50])
def test_every_table_is_aligned_whatever_the_number_of_rows(num_rows: int) -> None:
    """Triton compiles a kernel again for another alignment: a new number of tokens would then compile everything."""
    tables = tile_tables(make_offsets([num_rows // 2, num_rows - num_rows // 2]), num_rows)
    assert all(table.data_ptr() % 16 == 0 for table in tables.tables)


def test_other_block_sizes_and_an_unknown_one() -> None:
    counts = [70, 0, 1]
    tables = tile_tables(make_offsets(counts), 71, block_sizes=(64, 8))
    for block_m in (8, 64):
        (table, num_tiles, _), _ = tables.select(block_m)
        assert table[: num_tiles[0].item()].tolist() == expected_tiles(counts, block_m)
    with pytest.raises(ValueError, match=r"block_m must be one of \(64, 8\), got 16"):
        tables.select(16)


@triton.jit
def claim_rows(table, num_tiles, offsets, owner, BLOCK_M: tl.constexpr):
    for tile in range(tl.program_id(0), tl.load(num_tiles), tl.num_programs(0)):
        expert, row, end = load_tile(table, offsets, tile, BLOCK_M)
        rows = row + tl.arange(0, BLOCK_M)
        tl.store(owner + rows, expert, mask=rows < end)


@pytest.mark.parametrize("counts", [[0, 5, 0, 40, 16, 33], [94], [0, 0], [3] * 20])
@pytest.mark.parametrize("block_m", [16, 32])
def test_a_persistent_kernel_covers_every_row_once(counts: list[int], block_m: int) -> None:
    offsets = make_offsets(counts)
    num_rows = sum(counts) + 7
    (table, num_tiles, _), _ = tile_tables(offsets, num_rows).select(block_m)
    owner = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
    claim_rows[(3,)](table, num_tiles, offsets, owner, BLOCK_M=block_m)
    expected = [expert for expert, count in enumerate(counts) for _ in range(count)] + [-1] * 7
    assert owner.tolist() == expected
