"""How rows travel to their experts' ranks and back: one Transport per call, in four modes.

Shapes: T tokens here, K choices, E experts over P ranks, L = ceil(E / P) experts per rank (the last rank may have
fewer), R rows sent from here. Rows lie by chunk, then by destination; what arrives lies by chunk, then by source.
A row carries J ids (local to the receiver, -1 for none) and J weights in its tail: J = K where a token travels once per
rank, or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe_triton.dispatch import dispatch
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.exchange.counts import Counts, NodeCounts, SliceSizes, start_counts
from moe_triton.distributed.exchange.tails import parts_of, tail_of, tail_width

Wait = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What every rank of the group knows before a call: E experts in runs of L, and how the exchange is cut up."""

    num_experts: int
    per_rank: int
    chunks: int
    deduplicate: bool
    backend: str
    schedule: int  # hash of all that this rank has done, compared with every variable-size exchange


@dataclass(frozen=True, kw_only=True)
class Transport:
    """Where every row goes, and what comes back.

    tokens       [R] int64, the token of each row that is sent; 0 where a row is padding
    ids          [R, J] int32
    weights      [R, J] fp32 or fp64
    position     [T, .] int32, the rows that are summed into each token once they are back; -1 for none
    counts       how many rows travel
    by_choice    a row per (token, choice), and position [T, K] is each choice's; J = 1
    gathers      every rank gets all rows, and the ids are global
    """

    channel: Channel
    tokens: Tensor
    ids: Tensor
    weights: Tensor
    position: Tensor
    counts: Counts
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
        bounds = self.counts.received_bounds
        arriving = out[bounds[chunk] : bounds[chunk + 1]]
        if self.gathers:
            size = rows.shape[0] // self.chunks
            return self.channel.all_gather(arriving, rows[chunk * size : (chunk + 1) * size], phase)
        bounds = self.home_bounds
        leaving = rows[bounds[chunk] : bounds[chunk + 1]]
        return self.channel.all_to_all(arriving, leaving, self.counts.received[chunk], self.counts.sent[chunk], phase)

    def start_back(self, rows: Tensor, home: Tensor, chunk: int, phase: str) -> Wait:
        """Send a chunk's results back to where the rows came from, into their part of `home`."""
        bounds = self.home_bounds
        arriving = home[bounds[chunk] : bounds[chunk + 1]]
        received = self.counts.received[chunk]
        sizes = received if self.gathers else self.counts.sent[chunk]
        return self.channel.all_to_all(arriving, rows.contiguous(), sizes, received, phase)

    def message(self, x_Td: Tensor) -> Tensor:
        """Return the rows to send with their ids and weights as tails, [R, d + t]."""
        d, parts = x_Td.shape[1], (self.ids, self.weights)
        out = x_Td.new_empty(self.tokens.shape[0], d + tail_width(parts, x_Td.dtype))
        if x_Td.shape[0] > 0:
            torch.index_select(x_Td, 0, self.tokens, out=out[:, :d])
        else:
            out[:, :d] = 0
        out[:, d:] = tail_of(parts, x_Td.dtype)
        return out

    def ids_and_weights(self, arrived: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
        """Return the ids and weights of arrived messages."""
        ids, weights = parts_of(arrived[:, hidden_size:], (self.ids, self.weights))
        return ids, weights

    def without_tensors(self) -> Transport:
        """Return the host's part of it, which alone may outlive the forward pass: autograd keeps the tensors."""
        nothing = self.weights.new_empty(0, self.weights.shape[1])
        return replace(self, tokens=nothing, ids=nothing, weights=nothing, position=nothing)

    def choice_gradients(self, home_RJ: Tensor, position: Tensor) -> Tensor:
        """Return the router weights' gradients [T, K], from those of the returned rows' slots, by `position`."""
        padded = torch.cat([home_RJ, home_RJ.new_zeros(1, home_RJ.shape[1])])
        slots = padded[position.long()]  # [T, ., J]; position -1 is the row of zeros
        return slots[:, :, 0] if self.by_choice else slots.sum(1)  # a choice's slot is zero in all rows but one


def expand(x_Td: Tensor, tokens: Tensor) -> Tensor:
    """Return the rows [R, d] of the tokens [R], which are padding where there is no token."""
    if x_Td.shape[0] == 0:
        return x_Td.new_zeros(tokens.shape[0], *x_Td.shape[1:])
    return x_Td.index_select(0, tokens)


def plan_dropless(
    channel: Channel,
    ids: Tensor,
    weights: Tensor,
    shape: Shape,
    slices: SliceSizes | None = None,
    node: NodeCounts | None = None,
) -> Callable[[Callable[[], None]], Transport]:
    """Plan exactly the rows that are wanted. Starts the exchange of counts, and prepares what needs none.

    What is returned calls its argument, a computation to make meanwhile, and then waits for the counts on the host.

    ids [T, K]: global, -1 where nothing is to be computed. slices, node: learn what arrives here, of all chunks.
    """
    most = ids.shape[1] if shape.deduplicate else 1
    buckets = _buckets(ids, _chunks(ids, shape), channel.group.size, shape)
    counts_CP2 = _count(buckets, shape.chunks, channel.group.size)
    read_inner = _nothing
    if node is not None:
        in_node = replace(shape, per_rank=shape.per_rank // node.channel.group.size)
        num_ranks = channel.group.size * node.channel.group.size
        counts_of_ranks = _count(_buckets(ids, _chunks(ids, shape), num_ranks, in_node), shape.chunks, num_ranks)
        started = start_counts(channel, counts_CP2, shape.schedule, most, node.to_carry(counts_of_ranks))
        read_inner = node.start(started.carried, most)
    else:
        started = start_counts(channel, counts_CP2, shape.schedule, most)
        if slices is not None:
            read_inner = slices.start(started.arriving.sum(0))
    transport_of = _dropless_rows(channel, ids, weights, buckets, shape)

    def finish(meanwhile: Callable[[], None]) -> Transport:
        meanwhile()
        counts = started.read()
        read_inner()
        return transport_of(counts)

    return finish


def plan_counted(channel: Channel, ids: Tensor, weights: Tensor, shape: Shape, counts: Counts) -> Transport:
    """Plan exactly the rows that are wanted, in one chunk, where the host knows already how many they are."""
    return _dropless_rows(channel, ids, weights, _buckets(ids, None, channel.group.size, shape), shape)(counts)


def _nothing() -> None:
    pass


def plan_bounded(
    channel: Channel, ids: Tensor, weights: Tensor, shape: Shape, *, max_tokens: int, max_rows: int | None
) -> tuple[Transport, Tensor]:
    """Plan room for whatever `max_tokens` tokens can want: nothing is counted, nothing is dropped, no host sync.

    `max_rows` makes the room of each (chunk, pair of ranks) smaller. The second result is 1 [] where a row found no
    room and was left out, else 0; it stays on the device.
    """
    num_ranks, chunks, top_k = channel.group.size, shape.chunks, ids.shape[1]
    tokens_per_chunk = -(-max_tokens // chunks)
    most_ids = min(top_k, shape.per_rank)
    room = tokens_per_chunk * (1 if shape.deduplicate else most_ids)
    room = room if max_rows is None else min(room, max_rows)
    chunk_T1 = (torch.arange(ids.shape[0], device=ids.device) // max(tokens_per_chunk, 1))[:, None]
    buckets = _buckets(ids, chunk_T1, num_ranks, shape)
    dispatched = dispatch(buckets.sent.int(), chunks * num_ranks, backend=shape.backend)
    bucket_TK = torch.where(dispatched.position >= 0, buckets.sent, 0)
    within = dispatched.position - dispatched.offsets[bucket_TK.long()]
    fits = (dispatched.position >= 0) & (within < room)
    row_TK = torch.where(fits, bucket_TK * room + within, -1)
    overflow = ((dispatched.position >= 0) & ~fits).any().int()
    transport = _fixed_rows(
        channel, ids, weights, row_TK, buckets.owner, shape,
        room_per_pair=room, assignments=num_ranks * room * (most_ids if shape.deduplicate else 1),
    )  # fmt: skip
    return transport, overflow


def plan_capacity(channel: Channel, ids: Tensor, weights: Tensor, shape: Shape, *, capacity: int) -> Transport:
    """Plan an even exchange of [E, C, d], as GShard's: every expert has `capacity` places in what each rank sends.

    The ids hold what survived the capacity already; `capacity` must be the same on all ranks. Chunks cut up the places.
    """
    num_ranks = channel.group.size
    places = -(-capacity // shape.chunks)  # of an expert in each chunk
    experts = num_ranks * shape.per_rank
    dispatched = dispatch(ids, experts, backend=shape.backend)
    expert_TK = torch.where(dispatched.position >= 0, ids, 0)
    place = dispatched.position - dispatched.offsets[expert_TK.long()]
    chunk_TK = place // max(places, 1)
    row = (chunk_TK * experts + expert_TK) * places + place % max(places, 1)
    row_TK = torch.where((dispatched.position >= 0) & (place < capacity), row, -1)
    by_choice = replace(shape, deduplicate=False)
    rows = shape.per_rank * places
    return _fixed_rows(
        channel, ids, weights, row_TK, _owner(ids, shape), by_choice, room_per_pair=rows, assignments=num_ranks * rows
    )


def plan_allgather(
    channel: Channel, ids: Tensor, weights: Tensor, shape: Shape, *, max_tokens: int, assignments: int | None = None
) -> Transport:
    """Plan to send all tokens to all ranks, each skipping what is not its own; partial sums are added at home.

    `assignments` bounds what one rank's tokens can want of another, where that is known better than from the sizes.
    """
    num_ranks, chunks, (num_tokens, top_k) = channel.group.size, shape.chunks, ids.shape
    room = -(-max_tokens // chunks)
    most = num_ranks * room * min(top_k, shape.per_rank)
    most = most if assignments is None else min(most, num_ranks * assignments)
    padding = chunks * room - num_tokens
    token_T = torch.arange(num_tokens, device=ids.device)
    source_P = torch.arange(num_ranks, device=ids.device)
    first = (token_T // max(room, 1)) * num_ranks * room + token_T % max(room, 1)
    return Transport(
        channel=channel,
        tokens=torch.cat([token_T, token_T.new_zeros(padding)]),
        ids=torch.cat([ids.int(), ids.new_full((padding, top_k), -1, dtype=torch.int32)]),
        weights=torch.cat([weights, weights.new_zeros(padding, top_k)]),
        position=(first[:, None] + source_P * room).int(),
        counts=_fixed_counts(
            num_ranks, chunks, room, most if assignments is None else min(most, num_ranks * assignments)
        ),
        gathers=True,
    )


def _fixed_counts(num_ranks: int, chunks: int, room: int, assignments: int) -> Counts:
    """The counts of `room` rows for each (chunk, pair of ranks)."""
    rows = [[room] * num_ranks] * chunks
    return Counts(sent=rows, received=rows, assignments=[assignments] * chunks)


def _owner(ids: Tensor, shape: Shape) -> Tensor:
    """The rank of every choice's expert, [T, K]; -1 where there is none, whose id is -1."""
    return ids // shape.per_rank


def _chunks(ids: Tensor, shape: Shape) -> Tensor | None:
    """The chunk of each token, [T, 1], of runs as equal as can be; None where there is one."""
    if shape.chunks == 1:
        return None
    return (torch.arange(ids.shape[0], device=ids.device) * shape.chunks // max(ids.shape[0], 1))[:, None]


class _Buckets(NamedTuple):
    """Where every choice goes, [T, K]: a bucket is a (chunk, destination).

    owner   the rank of its expert, -1 where there is none
    wanted  its bucket, -1 where there is no expert
    sent    its bucket, -1 also where another choice of the token has sent the row
    """

    owner: Tensor
    wanted: Tensor
    sent: Tensor


def _buckets(ids: Tensor, chunk_T1: Tensor | None, num_ranks: int, shape: Shape) -> _Buckets:
    owner_TK = wanted = _owner(ids, shape)
    if chunk_T1 is not None:
        wanted = torch.where(owner_TK >= 0, chunk_T1 * num_ranks + owner_TK, -1)
    if not shape.deduplicate:
        return _Buckets(owner_TK, wanted, wanted)
    repeats = (owner_TK[:, :, None] == owner_TK[:, None, :]).tril(-1).any(-1)
    return _Buckets(owner_TK, wanted, wanted.masked_fill(repeats, -1))


def _count(buckets: _Buckets, chunks: int, num_ranks: int) -> Tensor:
    """The rows and assignments for each rank, by chunk: [C, P, 2] int32."""
    both_S2 = torch.stack([buckets.sent >= 0, buckets.wanted >= 0], dim=-1).view(-1, 2).int()
    found = both_S2.new_zeros(chunks * num_ranks, 2)
    found.index_add_(0, buckets.wanted.reshape(-1).clamp_min(0), both_S2)
    return found.view(chunks, num_ranks, 2)


def _dropless_rows(
    channel: Channel, ids: Tensor, weights: Tensor, buckets: _Buckets, shape: Shape
) -> Callable[[Counts], Transport]:
    """All of a transport of exactly the wanted rows that needs no counts; what is returned takes them.

    The rows are sorted by bucket: our own stable sort, with buckets in the place of experts.
    """
    dispatched = dispatch(buckets.sent.int(), shape.chunks * channel.group.size, backend=shape.backend)
    slots = dispatched.source.clamp_min(0).long()
    row_ids, row_weights, tokens = _row_slots(ids, weights, buckets.owner, slots, shape)

    def transport_of(counts: Counts) -> Transport:
        num_rows = counts.sent_bounds[-1]
        return Transport(
            channel=channel, tokens=tokens[:num_rows], ids=row_ids[:num_rows], weights=row_weights[:num_rows],
            position=dispatched.position, counts=counts, by_choice=not shape.deduplicate,
        )  # fmt: skip

    return transport_of


def _row_slots(
    ids: Tensor, weights: Tensor, owner_TK: Tensor, slots: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """The ids, local to their receiver, the weights, and the tokens of the rows of these slots, token*K + choice."""
    tokens = slots // ids.shape[1]
    if not shape.deduplicate:
        row_ids, row_weights = (x.reshape(-1).index_select(0, slots)[:, None] for x in (ids, weights))
        return (row_ids % shape.per_rank).int(), row_weights, tokens
    destination = owner_TK.view(-1).index_select(0, slots)[:, None]
    row_ids, row_weights, owners = (x.index_select(0, tokens) for x in (ids, weights, owner_TK))
    is_elsewhere = owners != destination
    row_ids = (row_ids - destination * shape.per_rank).masked_fill(is_elsewhere, -1)
    return row_ids.int(), row_weights.masked_fill(is_elsewhere, 0), tokens


def _fixed_rows(
    channel: Channel,
    ids: Tensor,
    weights: Tensor,
    row_TK: Tensor,
    owner_TK: Tensor,
    shape: Shape,
    *,
    room_per_pair: int,
    assignments: int,
) -> Transport:
    """A transport of fixed sizes, given the row of every choice that travels, -1 elsewhere."""
    num_ranks, chunks, (num_tokens, top_k) = channel.group.size, shape.chunks, ids.shape
    num_rows = chunks * num_ranks * room_per_pair
    slot_S = torch.arange(num_tokens * top_k, device=ids.device)
    slot_of_row = slot_S.new_full((num_rows + 1,), -1)
    row_S = row_TK.reshape(-1).long()
    slot_of_row[torch.where(row_S >= 0, row_S, num_rows)] = slot_S
    slot_R = slot_of_row[:-1]
    width = top_k if shape.deduplicate else 1
    if num_tokens == 0:
        row_ids = torch.full((num_rows, width), -1, dtype=torch.int32, device=ids.device)
        row_weights = weights.new_zeros(num_rows, width)
    else:
        row_ids, row_weights, _ = _row_slots(ids, weights, owner_TK, slot_R.clamp_min(0), shape)
        row_ids = torch.where((slot_R >= 0)[:, None], row_ids, -1)
        row_weights = torch.where((slot_R >= 0)[:, None], row_weights, 0)
    return Transport(
        channel=channel, tokens=slot_R.clamp_min(0) // max(top_k, 1), ids=row_ids, weights=row_weights,
        position=row_TK.int(), counts=_fixed_counts(num_ranks, chunks, room_per_pair, assignments),
        by_choice=not shape.deduplicate,
    )  # fmt: skip
