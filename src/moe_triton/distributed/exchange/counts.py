"""How many rows travel: exchanged on the device, and read by the host once, for all chunks and all levels.

What an exchange inside another one will count follows from the ids alone, so that the host need not wait for its rows.
Shapes: C chunks, P ranks of the group; inside a node its M ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_triton.distributed.errors import ExpertParallelError
from moe_triton.distributed.exchange.channel import Channel


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The rows of one call of an exchange, as the host knows them.

    sent         rows by chunk and destination
    received     rows by chunk and source
    assignments  most (row, id) pairs that arrive, by chunk
    """

    sent: list[list[int]]
    received: list[list[int]]
    assignments: list[int]

    @cached_property
    def received_bounds(self) -> list[int]:
        """The first received row of each chunk, and the end."""
        return [0, *accumulate(map(sum, self.received))]

    @cached_property
    def sent_bounds(self) -> list[int]:
        """The first sent row of each chunk, and the end."""
        return [0, *accumulate(map(sum, self.sent))]


class StartedCounts(NamedTuple):
    """An exchange of counts under way.

    arriving  [P, C, 2], the rows and assignments that each rank sends here, on the device
    carried   [P, X], what each rank sent along
    read      waits for the counts on the host
    """

    arriving: Tensor
    carried: Tensor
    read: Callable[[], Counts]


def start_counts(
    channel: Channel, counts_CP2: Tensor, schedule: int, most: int, carried_PX: Tensor | None = None
) -> StartedCounts:
    """Start to exchange the rows and assignments for each rank, int32, and what travels with them.

    The first message to each rank is [4]: the schedule, the number of chunks, and the counts of the first chunk. It has
    this size whatever the ranks are about to do, so that they can find out that they differ. The counts of further
    chunks and what is carried follow it. `most` assignments a row may have.
    """
    chunks, num_ranks, _ = counts_CP2.shape
    phase, more, ones = "exchange of counts", "exchange of further counts", [1] * num_ranks
    first = counts_CP2[0]
    header = first.new_full((num_ranks, 4), chunks)
    header.select(1, 0).fill_(schedule)
    header.narrow(1, 2, 2).copy_(first)
    headers = torch.empty_like(header)
    channel.all_to_all(headers, header, ones, ones, phase)()  # on a GPU this only queues
    read_headers = channel.to_host(phase, headers, counts_CP2)
    arriving, carried, read_further = headers[:, None, 2:], headers[:, 4:], _nothing
    if chunks > 1 or carried_PX is not None:
        further = counts_CP2[1:].transpose(0, 1).reshape(num_ranks, -1)
        width = further.shape[1]
        leaving = further if carried_PX is None else torch.cat([further, carried_PX], dim=1)
        arrived = torch.empty_like(leaving)
        channel.all_to_all(arrived, leaving, ones, ones, more)()
        if chunks > 1:
            read_further = channel.to_host(more, arrived[:, :width])
            arriving = torch.cat([arriving, arrived[:, :width].view(num_ranks, -1, 2)], dim=1)
        carried = arrived[:, width:]

    def read() -> Counts:
        flat, mine = read_headers()
        if flat[::4] != [schedule] * num_ranks or flat[1::4] != [chunks] * num_ranks:
            raise channel.mismatch(phase, channel.calls())
        (further,) = read_further()
        found = [flat[2::4], flat[3::4]]  # rows and assignments of the first chunk, by source
        step = 2 * (chunks - 1)
        found += [further[i::step] for i in range(step)]
        rows, assigned = found[::2], found[1::2]
        _check(channel, rows, assigned, most)
        return Counts(
            sent=[mine[i : i + 2 * num_ranks : 2] for i in range(0, len(mine), 2 * num_ranks)],
            received=rows,
            assignments=[sum(counts) for counts in assigned],
        )

    return StartedCounts(arriving, carried, read)


def _nothing() -> list[list[int]]:
    return [[]]


def _check(channel: Channel, rows: Sequence[list[int]], assigned: Sequence[list[int]], most: int) -> None:
    """Every announced row has one to `most` assignments: rows that do not come would be whatever was in the memory."""
    for rows_P, assigned_P in zip(rows, assigned, strict=True):
        for rank, num_rows, num_assigned in zip(channel.group.ranks, rows_P, assigned_P, strict=True):
            if not 0 <= num_rows <= num_assigned <= num_rows * most:
                where = channel.where("exchange of counts")
                raise ExpertParallelError(
                    f"{where}: rank {rank} announced {num_rows} rows for {num_assigned} assignments"
                )


@dataclass
class SliceSizes:
    """The most rows and assignments that any of the ranks with slices of the same experts has, for each call in turn.

    channel  of these ranks
    """

    channel: Channel
    known: deque[tuple[int, int]] = field(default_factory=deque)

    def start(self, sizes: Tensor) -> Callable[[], None]:
        """Start to compare this rank's sizes [calls, 2] with the others'; what is returned waits on the host."""
        phase = "exchange of the row counts"
        self.channel.all_reduce(sizes, phase, dist.ReduceOp.MAX)  # on a GPU this only queues
        read = self.channel.to_host(phase, sizes)

        def finish() -> None:
            (flat,) = read()
            self.known.extend(zip(flat[::2], flat[1::2], strict=True))

        return finish

    def next(self, rows: int, assignments: int, device: torch.device) -> tuple[int, int]:
        """Return those of the next call, which has so many here; asks the others where nobody has done so before."""
        if not self.known:
            self.start(torch.tensor([[rows, assignments]], device=device))()
        return self.known.popleft()


@dataclass
class NodeCounts:
    """The counts of the exchange inside a node, for each of its calls in turn: one for each chunk between the nodes.

    A rank learns with the counts between the nodes what it will pass on to each rank of its node.

    channel   of the node's ranks
    schedule  as `start_counts` compares it
    slices    where ranks hold slices of the same experts: learn the sizes of what arrives in the end
    """

    channel: Channel
    schedule: int
    slices: SliceSizes | None = None
    known: deque[Counts] = field(default_factory=deque)

    def to_carry(self, counts_CP2: Tensor) -> Tensor:
        """Return what each node is sent, [N, C*M*2], of the counts for every rank of every node, [C, N*M, 2]."""
        chunks, size = counts_CP2.shape[0], self.channel.group.size
        counts_CNM2 = counts_CP2.view(chunks, -1, size, 2)
        return counts_CNM2.transpose(0, 1).reshape(-1, chunks * size * 2)

    def start(self, carried: Tensor, most: int) -> Callable[[], None]:
        """Start to exchange the counts inside the node; what is returned waits on the host.

        carried [N, C*M*2]: what has come of `to_carry`.
        """
        counts_CM2 = carried.sum(0, dtype=carried.dtype).view(-1, self.channel.group.size, 2)
        started = start_counts(self.channel, counts_CM2, self.schedule, most)
        read_slices = None if self.slices is None else self.slices.start(started.arriving.sum(0))

        def finish() -> None:
            found = started.read()
            self.known.extend(
                Counts(sent=[sent], received=[received], assignments=[assignments])
                for sent, received, assignments in zip(found.sent, found.received, found.assignments, strict=True)
            )
            if read_slices is not None:
                read_slices()

        return finish

    def next(self) -> Counts:
        """Return those of the next call."""
        return self.known.popleft()
