"""How a CPU cuts the dispatched rows into blocks that stay in cache through all of their products.

A block is one expert's rows; or those of neighbours that are alike enough in size to go through one batched product,
each padded to the fullest; or those of neighbours with few rows, one after the other, whose products are made one by
one and who share the cost of all other calls. Rows are computed at their places in the blocks, padding included;
`Layout` leads from the dispatch's rows to these places and back.
"""

from __future__ import annotations

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
    def is_padded(self) -> bool:
        return self.size > self.rows.stop - self.rows.start


class Layout:
    """All blocks, and the index from rows to places.

    blocks         in the dispatch's order
    num_places     of all blocks together
    place_of_row   [kept]
    row_of_place   [num_places]; row 0 in the padding
    """

    def __init__(self, bounds: Sequence[int], policy: CpuPolicy, most_batched_rows: int) -> None:
        """bounds: the offsets [E+1]. most_batched_rows: the policy's; 0 also where the weights are not stacked."""
        self.policy = policy
        self.blocks = cut(bounds, policy, most_batched_rows)
        self.num_places = self.blocks[-1].places.stop if self.blocks else 0
        self.place_of_row = self.row_of_place = torch.arange(bounds[-1])
        self._padding_of: dict[int, Tensor] = {}
        if self.num_places > bounds[-1]:
            shift = [0] * (len(bounds) - 1)
            for block in self.blocks:
                for e, part in block.parts:
                    shift[e] = block.places.start + part.start - bounds[e]
            rows = self.row_of_place
            self.place_of_row = rows + torch.tensor(shift).repeat_interleave(torch.tensor(bounds).diff())
            self.row_of_place = rows.new_zeros(self.num_places)
            self.row_of_place[self.place_of_row] = rows

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
            block = self.blocks[index]
            is_padding = torch.ones(block.size, dtype=torch.bool)
            is_padding[self.place_of_row[block.rows] - block.places.start] = False
            self._padding_of[index] = is_padding.nonzero().squeeze(1)
        return self._padding_of[index]

    def spread(self, index: int, row_values: Tensor) -> Tensor:
        """The values of block `index` at its places, its padding cleared; a view where there is none."""
        block = self.blocks[index]
        if not block.is_padded:
            return row_values[block.rows]
        return self.clear(index, row_values.index_select(0, self.row_of_place[block.places]))

    def collect(self, index: int, place_values: Tensor, out: Tensor) -> None:
        """Writes to the rows of `out` what is at the places of block `index`."""
        block = self.blocks[index]
        if block.is_padded:
            place = self.place_of_row[block.rows] - block.places.start
            torch.index_select(place_values, 0, place, out=out[block.rows])
        else:
            out[block.rows] = place_values

    def places(self, position: Tensor) -> Tensor:
        """A dispatch's position [T, K] with places instead of rows; -1 finds the place after the last."""
        if self.num_places == len(self.place_of_row):
            return position.remainder(self.num_places + 1)
        return torch.cat([self.place_of_row, self.place_of_row.new_tensor([self.num_places])])[position]


def cut(bounds: Sequence[int], policy: CpuPolicy, most_batched_rows: int) -> list[Block]:
    """The blocks; every row is in one, and all of an expert's rows are in the same."""
    sizes = [end - start for start, end in pairwise(bounds)]
    together = policy.shapes_recur and _may_go_together(sizes, most_batched_rows)
    blocks: list[Block] = []
    e = place = 0
    while e < len(sizes):
        if sizes[e] == 0 and not together:
            e += 1
            continue
        stop = len(sizes) if together else _batch_end(sizes, e, policy, most_batched_rows)
        rows = slice(bounds[e], bounds[stop])
        last = blocks[-1] if blocks and blocks[-1].batch is None else None
        most_shared = policy.shared_block_rows - (0 if last is None else last.size)
        if stop > e + 1:
            each = policy.padded(max(sizes[e:stop]), batched=True)
            parts = [(i, slice((i - e) * each, (i - e) * each + sizes[i])) for i in range(e, stop) if sizes[i] > 0]
            blocks.append(Block(rows, slice(place, place + (stop - e) * each), parts, batch=slice(e, stop)))
        elif last is not None and not last.is_padded and policy.padded(sizes[e]) == sizes[e] <= most_shared:
            parts = [*last.parts, (e, slice(last.size, last.size + sizes[e]))]
            blocks[-1] = Block(slice(last.rows.start, rows.stop), slice(last.places.start, place + sizes[e]), parts)
        else:
            each = policy.padded(sizes[e])
            blocks.append(Block(rows, slice(place, place + each), [(e, slice(0, each))]))
        place = blocks[-1].places.stop
        e = stop
    return blocks


def _may_go_together(sizes: Sequence[int], most_rows: int) -> bool:
    """Whether all experts are one batch: the fullest has few rows, and most have some."""
    return max(sizes) <= most_rows and 4 * sum(size > 0 for size in sizes) >= 3 * len(sizes)


def _batch_end(sizes: Sequence[int], first: int, policy: CpuPolicy, most_rows: int) -> int:
    """Where the experts end that go with `first` into one batched product, since that costs less; first + 1 if none."""
    if policy.shapes_recur:  # a batch of some experts would be a new shape in every call
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
