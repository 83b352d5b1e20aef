"""How a CPU cuts the dispatched rows into blocks, which go through all of their products one after another.

A block is one expert's rows; or those of neighbours that are alike enough in size to go through one batched product,
each padded to the fullest; or those of neighbours with few rows, one after the other, whose products are made one by
one and who share the cost of all other calls. Rows are computed at their places in the blocks, padding included;
`Layout` leads from the dispatch's rows to these places and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moe_triton.backends.torch.cpu import CpuPolicy


@dataclass(slots=True)
class Block:
    """Some consecutive experts' rows.

    rows       of the dispatch
    places     of the layout: where those rows are computed, padding included
    parts      the experts that have rows, each with the places of these, counted from the block's first; with the
               padding where a part is a product of its own
    batch      the experts, if they go through one batched product: all have equally many places then
    """

    rows: slice
    places: slice
    parts: list[tuple[int, slice]]
    batch: slice | None = None

    @property
    def size(self) -> int:
        """The number of places."""
        return self.places.stop - self.places.start

    @property
    def filled(self) -> int:
        """The number of places from the first on behind which there is padding only."""
        return self.size if self.batch is not None else self.rows.stop - self.rows.start

    @property
    def is_padded(self) -> bool:
        return self.size > self.rows.stop - self.rows.start


class Layout:
    """All blocks, and the index from rows to places.

    blocks         in the dispatch's order
    num_rows       kept
    num_places     of all blocks together
    most_places    of a block
    place_of_row   [num_rows]; None where every row is at the place of its number
    row_of_place   [num_places]; row 0 in the padding; None as above
    groups         whether `F.grouped_mm` takes the weights
    is_looped      whether `looped` makes the products
    """

    def __init__(
        self,
        offsets: Tensor,
        policy: CpuPolicy,
        most_batched_rows: int,
        flops_per_row: float = math.inf,
        *,
        shared_rows: int = 0,
        groups: bool = False,
        is_looped: bool = False,
    ) -> None:
        """offsets: [E+1]. most_batched_rows: the policy's; 0 also where the weights are not stacked.

        flops_per_row: of the larger product; for `CpuPolicy.padded`. shared_rows: see `cut`.
        """
        bounds: list[int] = offsets.tolist()
        self.offsets, self.policy = offsets, policy
        self.blocks = cut(bounds, policy, most_batched_rows, flops_per_row, shared_rows)
        self.num_rows = bounds[-1]
        self.num_places = self.blocks[-1].places.stop if self.blocks else 0
        self.most_places = max((block.size for block in self.blocks), default=0)
        self.place_of_row: Tensor | None = None
        self.row_of_place: Tensor | None = None
        self.groups, self.is_looped = groups, is_looped
        self._padding_of: dict[int, Tensor] = {}
        if self.num_places > self.num_rows:
            shift = [0] * (len(bounds) - 1)
            for block in self.blocks:
                for e, part in block.parts:
                    shift[e] = block.places.start + part.start - bounds[e]
            rows = torch.arange(self.num_rows)
            self.place_of_row = rows + torch.tensor(shift).repeat_interleave(torch.tensor(bounds).diff())
            self.row_of_place = rows.new_zeros(self.num_places)
            self.row_of_place[self.place_of_row] = rows

    @property
    def is_one_block(self) -> bool:
        """Whether there is one block, without padding."""
        return len(self.blocks) == 1 and self.place_of_row is None

    def clear(self, index: int, values: Tensor) -> Tensor:
        """Zeros, in place, in the padding of block `index`, if a product over all places will read it.

        `values` has a row for every place of the block.
        """
        block = self.blocks[index]
        if block.is_padded and self.policy.shapes_recur:
            filled = block.rows.stop - block.rows.start
            if block.batch is None:
                values[filled:].zero_()
            else:
                values.index_fill_(0, self._padding(index), 0)
        return values

    def _padding(self, index: int) -> Tensor:
        """The places of block `index` that no row has, counted from its first."""
        if index not in self._padding_of:
            assert self.place_of_row is not None
            block = self.blocks[index]
            is_padding = torch.ones(block.size, dtype=torch.bool)
            is_padding[self.place_of_row[block.rows] - block.places.start] = False
            self._padding_of[index] = is_padding.nonzero().squeeze(1)
        return self._padding_of[index]

    def room(self, index: int, out: Tensor) -> Tensor | None:
        """Return where a product over all places of block `index` may write its rows of `out` [num_rows, ...]; or None.

        Its padding is written behind them, where the blocks that follow write their rows later.
        """
        block = self.blocks[index]
        if (block.batch is not None and block.is_padded) or block.rows.start + block.size > out.shape[0]:
            return None
        return out[block.rows.start : block.rows.start + block.size]

    def at_filled(self, index: int, row_values: Tensor) -> Tensor:
        """The values of block `index` at its first `filled` places; in a batch, padding is cleared."""
        block = self.blocks[index]
        return row_values[block.rows] if block.batch is None else self.spread(index, row_values)

    def spread(self, index: int, row_values: Tensor) -> Tensor:
        """The values of block `index` at its places, its padding cleared; a view where there is none."""
        block = self.blocks[index]
        if not block.is_padded:
            return row_values[block.rows]
        assert self.row_of_place is not None
        return self.clear(index, row_values.index_select(0, self.row_of_place[block.places]))

    def collect(self, index: int, place_values: Tensor, out: Tensor) -> None:
        """Writes to the rows of `out` what is at the places of block `index`."""
        block = self.blocks[index]
        if block.is_padded:
            assert self.place_of_row is not None
            place = self.place_of_row[block.rows] - block.places.start
            torch.index_select(place_values, 0, place, out=out[block.rows])
        else:
            out[block.rows] = place_values

    def rows(self, place_values: Tensor) -> Tensor:
        """Return the values of all rows, of those at all places."""
        return place_values if self.place_of_row is None else place_values.index_select(0, self.place_of_row)

    def places(self, position: Tensor) -> Tensor:
        """A dispatch's position [T, K] with places instead of rows; -1 finds the place after the last."""
        if self.place_of_row is None:
            return position.remainder(self.num_places + 1)
        return torch.cat([self.place_of_row, self.place_of_row.new_tensor([self.num_places])])[position]


def cut(
    bounds: Sequence[int],
    policy: CpuPolicy,
    most_batched_rows: int,
    flops_per_row: float = math.inf,
    shared_rows: int = 0,
) -> list[Block]:
    """Return the blocks; every row is in one, and all of an expert's rows are in the same.

    shared_rows: of a block whose experts have products of their own at most, where that is more than the policy's.
    """
    shared_rows = max(shared_rows, policy.shared_block_rows)
    sizes = [end - start for start, end in pairwise(bounds)]
    blocks: list[Block] = []
    e = 0
    while e < len(sizes):
        stop = _batch_end(sizes, e, policy, most_batched_rows) if most_batched_rows else e + 1
        if stop > e + 1:
            place = blocks[-1].places.stop if blocks else 0
            blocks.append(_batched(bounds, range(e, stop), place, policy))
        elif sizes[e] > 0:
            rows = slice(bounds[e], bounds[e + 1])
            _add_alone(blocks, rows, policy.padded(sizes[e], flops_per_row=flops_per_row), e, shared_rows)
        e = stop
    return blocks


def _add_alone(blocks: list[Block], rows: slice, size: int, expert: int, shared_rows: int) -> None:
    """Add an expert with products of its own over `size` places: to the last block if it may share it, else alone."""
    last = blocks[-1] if blocks else None
    if last is not None and size == rows.stop - rows.start and _may_share(last, size, shared_rows):
        last.parts.append((expert, slice(last.size, last.size + size)))
        last.rows = slice(last.rows.start, rows.stop)
        last.places = slice(last.places.start, last.places.stop + size)
    else:
        place = 0 if last is None else last.places.stop
        blocks.append(Block(rows, slice(place, place + size), [(expert, slice(0, size))]))


def _may_share(last: Block, size: int, shared_rows: int) -> bool:
    """Whether an expert that needs no padding may join the block."""
    return last.batch is None and not last.is_padded and last.size + size <= shared_rows


def _batched(bounds: Sequence[int], experts: range, place: int, policy: CpuPolicy) -> Block:
    """Return the block of experts that go through one batched product, each padded to the fullest."""
    sizes = [bounds[e + 1] - bounds[e] for e in experts]
    each = policy.padded(max(sizes), batched=True)
    starts = range(0, each * len(sizes), each)
    parts = [(e, slice(start, start + n)) for e, start, n in zip(experts, starts, sizes, strict=True) if n > 0]
    rows, batch = slice(bounds[experts.start], bounds[experts.stop]), slice(experts.start, experts.stop)
    return Block(rows, slice(place, place + each * len(sizes)), parts, batch)


def _batch_end(sizes: Sequence[int], first: int, policy: CpuPolicy, most_rows: int) -> int:
    """Return where the experts end that go with `first` into one batched product; first + 1 if none does."""
    if policy.shapes_recur:  # a batch of some experts would be a new shape in every call: all of them, or none
        return len(sizes) if first == 0 and _may_go_together(sizes, most_rows) else first + 1
    if sizes[first] == 0:
        return first + 1
    fewest_places, most_places = policy.batched_block_rows
    num_threads = policy.threads  # each gets at least one product of its own
    end = first + 1
    most, alone = 0, 0.0
    for e in range(first, len(sizes)):
        most = max(most, sizes[e])
        count = e + 1 - first
        if sizes[e] == 0:  # goes with the others if one behind it pays for it
            one_more = policy.alone_per_row * most
            if (count + 1) * (most + policy.batched_overhead) > alone + one_more + policy.alone_overhead:
                break
            continue
        alone += policy.alone_per_row * sizes[e] + policy.alone_overhead
        if most > most_rows or count * most > most_places or count * (most + policy.batched_overhead) > alone:
            break
        if count * most >= fewest_places and count >= num_threads:
            end = e + 1
    return end


def _may_go_together(sizes: Sequence[int], most_rows: int) -> bool:
    """Return whether all experts are one batch: the fullest has few rows, and most have some."""
    return max(sizes) <= most_rows and 4 * sum(size > 0 for size in sizes) >= 3 * len(sizes)
