"""Tile tables for persistent grouped kernels: which rows, of which expert, a program's tile covers.

The tables are derived from the experts' row offsets on the device, for several block sizes in one launch, so that
dispatch does not depend on a kernel's block size. Tiles never straddle experts; an expert's last tile may be partial;
an expert without rows has no tile.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import next_power_of_2
from moe_triton_kernels.launch import Launch, prepare

BLOCK_SIZES = (16, 32, 64, 128)
CHUNK = 128  # table entries that a program writes at a time


def max_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """The most tiles that `num_rows` rows spread over `num_experts` experts can need: exact, not a bound.

    The worst spread gives every expert one row first, each a tile of its own; then every `block_m` rows add a tile.
    """
    return min(num_rows, num_experts) + max(num_rows - num_experts, 0) // block_m


def spaced(num_tiles: int) -> int:
    """Entries from one table to the next: even, so that every table begins at a multiple of 16 bytes.

    Triton compiles a kernel anew for a pointer that is aligned otherwise, so it must not depend on the number of rows.
    """
    return num_tiles + num_tiles % 2


class Places(NamedTuple):
    """Where the tables of several block sizes lie among their entries.

    most    the most tiles of each table
    starts  the first entry of each
    size    entries of all of them
    """

    block_sizes: tuple[int, ...]
    most: tuple[int, ...]
    starts: tuple[int, ...]
    size: int


@lru_cache(maxsize=4096)
def places_of(num_rows: int, num_experts: int, block_sizes: tuple[int, ...]) -> Places:
    """The tables for so many rows."""
    most = tuple(max_tiles(num_rows, num_experts, block_m) for block_m in block_sizes)
    *starts, size = accumulate(map(spaced, most), initial=0)
    return Places(block_sizes, most, tuple(starts), size)


class TilesArgument(NamedTuple):
    """The tiles of one block size among a kernel's arguments: a table, its tile count [1] and the rows' offsets."""

    table: Any
    num_tiles: Any
    offsets: Any


class TileTables(NamedTuple):
    """Tile tables of one dispatch, one per block size.

    offsets    [E+1] int32 on the device: the experts' row ranges
    places     where the table of each block size is
    num_tiles  [number of block sizes] int32 on the device: how many entries of each table are filled
    table      [entries, 2] int32, all tables: (expert, first row); none is written past its num_tiles
    selected   block size -> what `select` has returned: views take microseconds
    """

    offsets: Tensor
    places: Places
    num_tiles: Tensor
    table: Tensor
    selected: dict[int, tuple[TilesArgument, int]]

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """One [max_tiles, 2] table per block size."""
        places = self.places
        return tuple(self.table[start : start + most] for start, most in zip(places.starts, places.most, strict=True))

    def select(self, block_m: int) -> tuple[TilesArgument, int]:
        """For tiles of `block_m` rows: what a kernel takes, and the most tiles there can be."""
        found = self.selected.get(block_m)
        if found is None:
            found = self.selected[block_m] = self._select(block_m)
        return found

    def _select(self, block_m: int) -> tuple[TilesArgument, int]:
        offsets, places, num_tiles, table, _ = self
        if block_m not in places.block_sizes:
            raise ValueError(f"block_m must be one of {places.block_sizes}, got {block_m}")
        index = places.block_sizes.index(block_m)
        if index:  # the first one begins where all of them do
            table, num_tiles = table[places.starts[index] :], num_tiles[index:]
        return TilesArgument(table, num_tiles, offsets), places.most[index]


@triton.jit
def load_tile(table, offsets, tile, BLOCK_M: tl.constexpr):
    """Tile number -> (expert, first row, end row), as int32 scalars; end row is exclusive and within the expert."""
    expert = tl.load(table + 2 * tile)
    row = tl.load(table + 2 * tile + 1)
    return expert, row, row + tl.minimum(BLOCK_M, tl.load(offsets + expert + 1) - row)


@triton.jit(do_not_specialize=["num_rows"])
def tile_tables_kernel(
    offsets, table, num_tiles, num_experts, num_rows, SIZES: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr
):
    """One program per expert: it writes the expert's tiles into every table, at the places of `spaced`."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    inside = experts < num_experts
    counts = tl.load(offsets + experts + 1, mask=inside, other=0) - tl.load(offsets + experts, mask=inside, other=0)
    first_row = tl.load(offsets + expert)
    my_count = tl.load(offsets + expert + 1) - first_row
    for i in tl.static_range(len(SIZES)):
        size = SIZES[i]
        tiles = counts // size + (counts % size != 0).to(tl.int32)  # cdiv, without the overflow of counts + size
        if expert == 0:
            tl.store(num_tiles + i, tl.sum(tiles))
        my_tiles = my_count // size + (my_count % size != 0).to(tl.int32)
        entries = table + 2 * tl.sum(tl.where(experts < expert, tiles, 0))
        for start in range(0, my_tiles, CHUNK):
            tile = start + tl.arange(0, CHUNK)
            tl.store(entries + 2 * tile, expert, mask=tile < my_tiles)
            tl.store(entries + 2 * tile + 1, first_row + tile * size, mask=tile < my_tiles)
        most = tl.minimum(num_rows, num_experts) + tl.maximum(num_rows - num_experts, 0) // size  # max_tiles
        table += 2 * (most + most % 2)  # spaced


def tile_tables(offsets: Tensor, num_rows: int, block_sizes: tuple[int, ...] = BLOCK_SIZES) -> TileTables:
    """Tile tables of `offsets` [E+1] int32, the experts' row ranges, for every block size; one launch, no host sync.

    `num_rows` is the most rows that offsets can hold: S of the dispatch.
    """
    num_experts = offsets.shape[0] - 1
    places = places_of(num_rows, num_experts, block_sizes)
    table, num_tiles = offsets.new_empty(places.size, 2), offsets.new_empty(len(block_sizes))
    _launch(num_experts, block_sizes)(offsets, table, num_tiles, num_experts, num_rows)
    return TileTables(offsets, places, num_tiles, table, {})


@lru_cache(maxsize=1024)
def _launch(num_experts: int, block_sizes: tuple[int, ...]) -> Launch:
    constants = {"SIZES": block_sizes, "BLOCK_E": next_power_of_2(num_experts), "CHUNK": CHUNK}
    return prepare(tile_tables_kernel, (num_experts,), **constants)
