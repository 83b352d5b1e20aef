"""How rows travel to their experts' ranks and back: one Transport per call, in four modes.

Shapes: T tokens here, K choices, E experts over P ranks, L = ceil(E / P) experts per rank (the last rank may have
fewer), R rows sent from here. Rows lie by chunk, then by destination; what arrives lies by chunk, then by source.
A row carries J global ids (-1 for none) and J weights in its tail: J = K where a token travels once per rank, or 1. The
receiver skips those that are not for its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from moe_triton.dispatch import dropless_dispatch
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.exchange.counts import Counts, NodeCounts, SliceSizes, counts_of, start_counts
from moe_triton.distributed.exchange.tails import Part, parts_of, tail_of

Wait = Callable[[], None]
ROW, ASSIGNMENT = 1, 1 << 32  # both are counted in one int64, which is read as two int32


class Shape(NamedTuple):
    """What every rank of the group knows before a call: E experts in runs of L, and how the exchange is cut up."""

    num_experts: int
    per_rank: int
    chunks: int
    deduplicate: bool
    backend: str

    def runs_of(self, per_rank: int, chunks: int) -> Shape:
        """Return the same experts in other runs, exchanged in so many chunks."""
        return Shape(self.num_experts, per_rank, chunks, self.deduplicate, self.backend)


class SentRows(NamedTuple):
    """The rows that leave, on the device.

    tokens       [R] int32, the token of each row; any where a row is padding
    tails        [R] int32, which row of `ids` and `weights` each row takes along
    ids          [N, J] int32, of tokens or choices, and of padding where there is some
    weights      [N, J] fp32 or fp64
    position     [T, .] int32, the rows that are summed into each token once they are back; -1 for none
    """

    tokens: Tensor
    tails: Tensor
    ids: Tensor
    weights: Tensor
    position: Tensor

    @property
    def tail(self) -> tuple[Part, Part]:
        """Return what a row's tail consists of."""
        return Part(self.ids.shape[1], self.ids.dtype), Part(self.weights.shape[1], self.weights.dtype)

    def message(self, x_Td: Tensor) -> Tensor:
        """Return the rows to send with their ids and weights as tails, [R, d + t]."""
        d, tails = x_Td.shape[1], tail_of((self.ids, self.weights), x_Td.dtype)
        out = x_Td.new_empty(self.tokens.shape[0], d + tails.shape[1])
        if x_Td.shape[0] > 0:
            torch.index_select(x_Td, 0, self.tokens, out=out[:, :d])
        else:
            out[:, :d] = 0
        torch.index_select(tails, 0, self.tails, out=out[:, d:])
        return out


class Transport(NamedTuple):
    """How rows travel, as the host knows it; it outlives the forward pass.

    counts        how many rows travel
    first_expert  what the ids count from that arrive here, for the inner stage
    by_choice     a row per (token, choice), and position [T, K] is each choice's; J = 1
    gathers       every rank gets all rows
    """

    channel: Channel
    counts: Counts
    first_expert: int
    by_choice: bool = False
    gathers: bool = False

    @property
    def chunks(self) -> int:
        return len(self.counts.sent)

    @property
    def home_bounds(self) -> list[int]:
        """Return the first row of each chunk among those that come back, and the end."""
        return self.counts.received_bounds if self.gathers else self.counts.sent_bounds

    def start(self, rows: Tensor, out: Tensor, chunk: int, phase: str) -> Wait:
        """Send a chunk of rows [R, ...]; it arrives in its part of `out`, which has room for all chunks."""
        counts = self.counts
        arriving = rows_of_chunk(out, counts.received_bounds, chunk)
        if self.gathers:
            size = rows.shape[0] // self.chunks
            return self.channel.all_gather(arriving, rows[chunk * size : (chunk + 1) * size], phase)
        leaving = rows_of_chunk(rows, counts.sent_bounds, chunk)
        return self.channel.all_to_all(arriving, leaving, counts.received[chunk], counts.sent[chunk], phase)

    def start_back(self, rows: Tensor, home: Tensor, chunk: int, phase: str) -> Wait:
        """Send a chunk's results back to where the rows came from, into their part of `home`."""
        arriving, received = rows_of_chunk(home, self.home_bounds, chunk), self.counts.received[chunk]
        sizes = received if self.gathers else self.counts.sent[chunk]
        return self.channel.all_to_all(arriving, rows.contiguous(), sizes, received, phase)

    def ids_and_weights(self, tails: Tensor, parts: tuple[Part, Part]) -> tuple[Tensor, Tensor]:
        """Return the ids and weights in the tails of arrived rows; ids that are not for the inner stage are outside."""
        ids, weights = parts_of(tails, parts)
        return ids - self.first_expert if self.first_expert else ids, weights

    def choice_gradients(self, home_RJ: Tensor, position: Tensor) -> Tensor:
        """Return the router weights' gradients [T, K], from those of the returned rows' slots, by `position`."""
        padded = torch.constant_pad_nd(home_RJ, (0, 0, 0, 1))
        slots = padded[position]  # [T, ., J]; position -1 is the row of zeros
        return slots[:, :, 0] if self.by_choice else slots.sum(1)  # a choice's slot is zero in all rows but one


def rows_of_chunk(rows: Tensor, bounds: Sequence[int], chunk: int) -> Tensor:
    """Return the chunk's rows, of those of all chunks: all of them, without a view of their own, where there is one."""
    return rows if len(bounds) == 2 else rows[bounds[chunk] : bounds[chunk + 1]]


def expand(x_Td: Tensor, tokens: Tensor) -> Tensor:
    """Return the rows [R, d] of the tokens [R], which are padding where there is no token."""
    if x_Td.shape[0] == 0:
        return x_Td.new_zeros(tokens.shape[0], *x_Td.shape[1:])
    return x_Td.index_select(0, tokens)


Routed = tuple[Transport, SentRows]


def plan_dropless(
    channel: Channel,
    ids: Tensor,
    weights: Tensor,
    shape: Shape,
    schedule: int,
    slices: SliceSizes | None = None,
    node: NodeCounts | None = None,
) -> Callable[[Callable[[], None]], Routed]:
    """Plan exactly the rows that are wanted. Starts the exchange of counts, and prepares what needs none.

    What is returned calls its argument, a computation to make meanwhile, and then waits for the counts on the host.

    ids [T, K]: global, -1 where nothing is to be computed. slices, node: learn what arrives here, of all chunks.
    """
    most = ids.shape[1] if shape.deduplicate else 1
    buckets = _buckets(ids, _chunks(ids, shape), channel.group.size, shape)
    counts_CP2 = _count(buckets, shape.chunks, channel.group.size)
    read_inner = _nothing
    if node is not None:
        in_node = shape.runs_of(shape.per_rank // node.channel.group.size, shape.chunks)
        num_ranks = channel.group.size * node.channel.group.size
        counts_of_ranks = _count(_buckets(ids, _chunks(ids, shape), num_ranks, in_node), shape.chunks, num_ranks)
        started = start_counts(channel, counts_CP2, schedule, most, node.to_carry(counts_of_ranks))
        read_inner = node.start(started.carried, most)
    else:
        started = start_counts(channel, counts_CP2, schedule, most)
        if slices is not None:
            read_inner = slices.start(started.arriving.sum(0))
    rows = _dropless_rows(channel, ids, weights, buckets, shape)

    def finish(meanwhile: Callable[[], None]) -> Routed:
        meanwhile()
        counts = started.read()
        read_inner()
        return _counted(channel, counts, shape, rows)

    return finish


def plan_counted(channel: Channel, ids: Tensor, weights: Tensor, shape: Shape, counts: Counts) -> Routed:
    """Plan exactly the rows that are wanted, in one chunk, where the host knows already how many they are.

    ids [T, K]: those outside of the group's experts are for other groups, whose rows these are as well.
    """
    ids = ids.masked_fill(ids.floor_divide(channel.group.size * shape.per_rank) != 0, -1)
    rows = _dropless_rows(channel, ids, weights, _buckets(ids, None, channel.group.size, shape), shape)
    return _counted(channel, counts, shape, rows)


def _nothing() -> None:
    pass


def plan_bounded(
    channel: Channel, ids: Tensor, weights: Tensor, shape: Shape, *, max_tokens: int, max_rows: int | None
) -> tuple[Routed, Tensor | None]:
    """Plan room for whatever `max_tokens` tokens can want: nothing is counted, nothing is dropped, no host sync.

    `max_rows` makes the room of each (chunk, pair of ranks) smaller. Then the second result is 1 [] where a row found
    no room and was left out, else 0; it stays on the device.
    """
    num_ranks, chunks, top_k = channel.group.size, shape.chunks, ids.shape[1]
    tokens_per_chunk = -(-max_tokens // chunks)
    most_ids = min(top_k, shape.per_rank)
    room = tokens_per_chunk * (1 if shape.deduplicate else most_ids)
    room = room if max_rows is None else min(room, max_rows)
    chunk_T1 = None if chunks == 1 else (_indices(ids.shape[0], ids) // max(tokens_per_chunk, 1))[:, None]
    buckets = _buckets(ids, chunk_T1, num_ranks, shape)
    dispatched = dropless_dispatch(buckets.sent, chunks * num_ranks, shape.backend)
    within = dispatched.position - dispatched.offsets[buckets.sent]  # negative without a bucket, which reads the end
    row_TK, overflow = (buckets.sent * room + within).clamp_min(-1), None
    if max_rows is not None:
        has_no_room = within >= room
        row_TK, overflow = row_TK.masked_fill(has_no_room, -1), has_no_room.any().int()
    routed = _fixed_rows(
        channel, ids, weights, row_TK, shape,
        room_per_pair=room, assignments=num_ranks * room * (most_ids if shape.deduplicate else 1),
    )  # fmt: skip
    return routed, overflow


def plan_capacity(channel: Channel, ids: Tensor, weights: Tensor, shape: Shape, *, capacity: int) -> Routed:
    """Plan an even exchange of [E, C, d], as GShard's: every expert has `capacity` places in what each rank sends.

    The ids hold what survived the capacity already; `capacity` must be the same on all ranks. Chunks cut up the places.
    """
    num_ranks = channel.group.size
    places = -(-capacity // shape.chunks)  # of an expert in each chunk
    experts = num_ranks * shape.per_rank
    dispatched = dropless_dispatch(ids, experts, shape.backend)
    place = dispatched.position - dispatched.offsets[ids]  # negative without an expert, which reads the end
    row = ids * places + place
    if shape.chunks > 1:
        row = (place // max(places, 1) * experts + ids) * places + place % max(places, 1)
    row_TK = row.masked_fill((place < 0) | (place >= capacity), -1)
    rows = shape.per_rank * places
    by_choice = shape._replace(deduplicate=False)
    return _fixed_rows(channel, ids, weights, row_TK, by_choice, room_per_pair=rows, assignments=num_ranks * rows)


def plan_allgather(
    channel: Channel,
    ids: Tensor,
    weights: Tensor,
    shape: Shape,
    *,
    max_tokens: int,
    assignments: int | None = None,
    first_expert: int = 0,
) -> Routed:
    """Plan to send all tokens to all ranks, each skipping what is not its own; partial sums are added at home.

    `assignments` bounds what one rank's tokens can want of another, where that is known better than from the sizes.
    """
    num_ranks, chunks, (num_tokens, top_k) = channel.group.size, shape.chunks, ids.shape
    room = -(-max_tokens // chunks)
    most = room * min(top_k, shape.per_rank)
    most = num_ranks * (most if assignments is None else min(most, assignments))
    padding = chunks * room - num_tokens
    token_T = first = _indices(num_tokens, ids)
    tails = token_T
    if chunks > 1:
        first = token_T // max(room, 1) * (num_ranks * room) + token_T % max(room, 1)
    if padding > 0:
        tails = _indices(chunks * room, ids).clamp_max(num_tokens)
        ids, weights = _with_padding(ids, weights)
    sent = SentRows(
        tokens=tails.clamp_max(num_tokens - 1) if padding > 0 else tails, tails=tails, ids=ids, weights=weights,
        position=first[:, None] + _indices(num_ranks, ids) * room,
    )  # fmt: skip
    counts = _fixed_counts(num_ranks, chunks, room, most)
    return Transport(channel=channel, counts=counts, first_expert=first_expert, gathers=True), sent


@lru_cache(maxsize=64)  # layers have the same in every step
def _fixed_counts(num_ranks: int, chunks: int, room: int, assignments: int) -> Counts:
    """The counts of `room` rows for each (chunk, pair of ranks)."""
    rows = [[room] * num_ranks] * chunks
    return counts_of(rows, rows, [assignments] * chunks)


def _indices(number: int, like: Tensor) -> Tensor:
    """0, 1, ... [number] int32, where `like` is."""
    return torch.arange(number, dtype=torch.int32, device=like.device)


def _chunks(ids: Tensor, shape: Shape) -> Tensor | None:
    """The chunk of each token, [T, 1], of runs as equal as can be; None where there is one."""
    if shape.chunks == 1:
        return None
    return (_indices(ids.shape[0], ids) * shape.chunks // max(ids.shape[0], 1))[:, None]


class _Buckets(NamedTuple):
    """Where every choice goes, [T, K] int32: a bucket is a (chunk, destination).

    wanted   its bucket, -1 where there is no expert
    sent     its bucket, -1 also where another choice of the token has sent the row
    repeats  where one has; None where each choice has a row of its own
    """

    wanted: Tensor
    sent: Tensor
    repeats: Tensor | None


def _buckets(ids: Tensor, chunk_T1: Tensor | None, num_ranks: int, shape: Shape) -> _Buckets:
    # `//` of a tensor is a function in Python. -1 where there is none, whose id is -1
    owner_TK = wanted = ids.floor_divide(shape.per_rank)
    if chunk_T1 is not None:
        wanted = (chunk_T1 * num_ranks + owner_TK).masked_fill(owner_TK < 0, -1)
    if not shape.deduplicate:
        return _Buckets(wanted, wanted, None)
    repeats = (owner_TK.unsqueeze(2) == owner_TK.unsqueeze(1)).tril(-1).any(-1)
    return _Buckets(wanted, wanted.masked_fill(repeats, -1), repeats)


def _count(buckets: _Buckets, chunks: int, num_ranks: int) -> Tensor:
    """The rows and assignments for each rank, by chunk: [C, P, 2] int32."""
    wanted = buckets.wanted
    if buckets.repeats is None:
        both_TK = torch.full_like(wanted, ROW + ASSIGNMENT, dtype=torch.int64)
    else:
        both_TK = ~buckets.repeats + ASSIGNMENT  # and one row where the choice sends it
    found = both_TK.new_zeros(chunks * num_ranks + 1)  # the first is for what no rank gets
    found.index_add_(0, (wanted + 1).view(-1), both_TK.view(-1))
    return found[1:].view(torch.int32).view(chunks, num_ranks, 2)


def _dropless_rows(channel: Channel, ids: Tensor, weights: Tensor, buckets: _Buckets, shape: Shape) -> SentRows:
    """The exactly wanted rows, which are the first ones of as many as there are choices: that takes no counts.

    They are sorted by bucket: our own stable sort, with buckets in the place of experts.
    """
    dispatched = dropless_dispatch(buckets.sent, shape.chunks * channel.group.size, shape.backend)
    return SentRows(*_tails(dispatched.source, ids, weights, shape), dispatched.position)


def _counted(channel: Channel, counts: Counts, shape: Shape, rows: SentRows) -> Routed:
    """`_dropless_rows` once it is known how many they are."""
    num_rows, (tokens, tails, ids, weights, position) = counts.sent_bounds[-1], rows
    kept = tokens[:num_rows]
    kept_tails = kept if tails is tokens else tails[:num_rows]
    transport = Transport(channel, counts, channel.group.rank * shape.per_rank, not shape.deduplicate)
    return transport, SentRows(kept, kept_tails, ids, weights, position)


def _tails(slots: Tensor, ids: Tensor, weights: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`tokens`, `tails`, `ids` and `weights` of `SentRows` for the rows of these slots, token*K + choice."""
    tokens = slots.floor_divide(ids.shape[1])
    if shape.deduplicate:
        return tokens, tokens, ids, weights
    return tokens, slots, ids.reshape(-1, 1), weights.reshape(-1, 1)


def _with_padding(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both with one row more, for rows of padding to take along: no id, and weight 0."""
    return torch.constant_pad_nd(ids, (0, 0, 0, 1), -1), torch.constant_pad_nd(weights, (0, 0, 0, 1))


def _fixed_rows(
    channel: Channel,
    ids: Tensor,
    weights: Tensor,
    row_TK: Tensor,
    shape: Shape,
    *,
    room_per_pair: int,
    assignments: int,
) -> Routed:
    """Rows of fixed sizes, given the row of every choice that travels, -1 elsewhere."""
    num_ranks, chunks, num_tokens = channel.group.size, shape.chunks, ids.shape[0]
    num_rows, num_slots = chunks * num_ranks * room_per_pair, ids.numel()
    slots = row_TK.new_full((num_rows + 1,), num_slots)  # rows of padding are a slot past the last
    slots[row_TK.view(-1)] = _indices(num_slots, ids)  # no row is the last one
    tokens, tails, ids, weights = _tails(slots[:-1], ids, weights, shape)
    ids, weights = _with_padding(ids, weights)
    sent = SentRows(tokens.clamp_max(num_tokens - 1), tails, ids, weights, position=row_TK)
    counts = _fixed_counts(num_ranks, chunks, room_per_pair, assignments)
    return Transport(channel, counts, channel.group.rank * shape.per_rank, not shape.deduplicate), sent
