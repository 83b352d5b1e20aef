"""How many rows travel: exchanged on the device, and read by the host once, for all chunks and all levels.

What an exchange inside another one will count follows from the ids alone, so that the host need not wait for its rows.
Shapes: C chunks, P ranks of the group; inside a node its M ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_triton.distributed.errors import ExpertParallelError
from moe_triton.distributed.exchange.channel import Channel


class Counts(NamedTuple):
    """The rows of one call of an exchange, as the host knows them.

    sent             rows by chunk and destination
    received         rows by chunk and source
    assignments      most (row, id) pairs that arrive, by chunk
    sent_bounds      the first sent row of each chunk, and the end
    received_bounds  the first received row of each chunk, and the end
    """

    sent: Sequence[list[int]]
    received: Sequence[list[int]]
    assignments: Sequence[int]
    sent_bounds: list[int]
    received_bounds: list[int]


def counts_of(sent: Sequence[list[int]], received: Sequence[list[int]], assignments: Sequence[int]) -> Counts:
    """Return the Counts of these rows and assignments, with the bounds of the chunks."""
    return Counts(sent, received, assignments, _bounds(sent), _bounds(received))


def _bounds(rows: Sequence[list[int]]) -> list[int]:
    bounds = [0]
    for rows_P in rows:
        bounds.append(bounds[-1] + sum(rows_P))
    return bounds


class StartedCounts(NamedTuple):
    """An exchange of counts under way; what has come is on the device.

    first    [P, 3], from each rank: its schedule, and the rows and assignments of the first chunk
    further  [P, 2(C - 1) + X] where there is more: those of the further chunks, and X numbers that it sent along
    chunks   C
    read     waits for the counts on the host
    """

    first: Tensor
    further: Tensor | None
    chunks: int
    read: Callable[[], Counts]

    @property
    def arriving(self) -> Tensor:
        """Return the rows and assignments that each rank sends here, [P, C, 2]."""
        first = self.first[:, None, 1:]
        if self.further is None or self.chunks == 1:
            return first
        return torch.cat([first, self.further[:, : 2 * (self.chunks - 1)].unflatten(1, (-1, 2))], dim=1)

    @property
    def carried(self) -> Tensor:
        """Return what each rank sent along, [P, X]."""
        assert self.further is not None
        return self.further[:, 2 * (self.chunks - 1) :]


def start_counts(
    channel: Channel, counts_CP2: Tensor, schedule: int, most: int, carried_PX: Tensor | None = None
) -> StartedCounts:
    """Start to exchange the rows and assignments for each rank, int32, and what travels with them.

    The first message to each rank is [3]: the schedule, and the counts of the first chunk. It has this size whatever
    the ranks are about to do, so that they can find out that they differ. The counts of further chunks and what is
    carried follow it. `most` assignments a row may have.
    """
    chunks, num_ranks, _ = counts_CP2.shape
    phase, more, ones = "exchange of counts", "exchange of further counts", [1] * num_ranks
    both = counts_CP2.new_full((2, num_ranks, 3), schedule)  # what is sent, and what arrives: one copy to the host
    leaving, arrived = both.unbind()
    leaving[:, 1:] = counts_CP2[0]
    channel.all_to_all(arrived, leaving, ones, ones, phase)()  # on a GPU this only queues
    read_first, arrived_more, read_more = channel.to_host(phase, both), None, None
    if chunks > 1 or carried_PX is not None:
        step = 2 * (chunks - 1)
        further = counts_CP2[1:].transpose(0, 1).reshape(num_ranks, step)
        further = further if carried_PX is None else torch.cat([further, carried_PX], dim=1)
        both_more = further.new_empty(2, *further.shape)
        leaving_more, arrived_more = both_more.unbind()
        leaving_more.copy_(further)
        channel.all_to_all(arrived_more, leaving_more, ones, ones, more)()
        if chunks > 1:
            read_more = channel.to_host(more, both_more[:, :, :step])

    def read() -> Counts:
        flat, end = read_first(), 3 * num_ranks
        if flat[end::3].count(schedule) != num_ranks:
            raise channel.mismatch(phase, channel.calls())
        sent, rows, assigned = [flat[1:end:3]], [flat[end + 1 :: 3]], [flat[end + 2 :: 3]]
        if read_more is not None:
            flat, step, end = read_more(), 2 * (chunks - 1), 2 * (chunks - 1) * num_ranks
            for i in range(0, step, 2):
                sent.append(flat[i:end:step])
                rows.append(flat[end + i :: step])
                assigned.append(flat[end + i + 1 :: step])
        for chunk in range(chunks):
            _check(channel, rows[chunk], assigned[chunk], most)
        return counts_of(sent, rows, [sum(assigned_P) for assigned_P in assigned])

    return StartedCounts(arrived, arrived_more, chunks, read)


def _check(channel: Channel, rows: Sequence[int], assigned: Sequence[int], most: int) -> None:
    """Every announced row has one to `most` assignments: rows that do not come would be whatever was in the memory."""
    for num_rows, num_assigned in zip(rows, assigned, strict=True):
        if not 0 <= num_rows <= num_assigned <= num_rows * most:
            first = list(zip(rows, assigned, strict=True)).index((num_rows, num_assigned))
            raise ExpertParallelError(
                f"{channel.where('exchange of counts')}: rank {channel.group.ranks[first]} announced {num_rows} rows "
                f"for {num_assigned} assignments"
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
            flat = read()
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
                counts_of([sent], [received], [assignments])
                for sent, received, assignments in zip(found.sent, found.received, found.assignments, strict=True)
            )
            if read_slices is not None:
                read_slices()

        return finish

    def next(self) -> Counts:
        """Return those of the next call."""
        return self.known.popleft()
