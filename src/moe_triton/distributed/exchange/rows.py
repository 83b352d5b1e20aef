"""The exchange of rows between ranks around an inner stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_triton import runtime
from moe_triton.dispatch import chosen_experts, sorted_dispatch
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.exchange.fp8_rows import pack_rows, unpack_rows
from moe_triton.distributed.exchange.overlap import Deferred
from moe_triton.distributed.exchange.stages import InnerStage, Saved
from moe_triton.distributed.exchange.transport import Transport

# ids, weights and the most (row, id) pairs -> the wait for the transport
Planner = Callable[[Tensor, Tensor, int], Callable[[], Transport]]


@dataclass
class ExchangeCall:
    """One forward of an exchange: its transport, and which calls of the inner stage its chunks were."""

    transport: Transport
    inner_calls: range


@dataclass
class Exchange:
    """Sends rows to where their experts are, lets the inner stage compute there, and sums what comes back.

    The exchange of chunk i+1 is issued before chunk i is computed, and in backward a chunk's results leave before the
    next chunk is computed. `overlap_with` is computed once, while the first chunk travels. With a `dispatch_dtype` of
    fp8 the rows of forward travel as codes and scales; results and gradients travel as they are.
    """

    planner: Planner
    inner: InnerStage
    channel: Channel
    backend: str
    dispatch_dtype: torch.dtype | None = None
    overlap_with: Deferred | None = None
    calls: list[ExchangeCall] = field(default_factory=list)
    inner_calls: int = 0

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        transport = self.planner(ids, weights, assignments)()
        chunks, bounds = transport.chunks, transport.received_bounds
        rows, packed = transport.expand(x if self.dispatch_dtype is None else pack_rows(x)), transport.packed()
        arrived = rows.new_empty(bounds[-1], rows.shape[1])
        arrived_packed = packed.new_empty(bounds[-1], packed.shape[1])
        home = x.new_empty(transport.home_bounds[-1], x.shape[1])

        def start(chunk: int) -> list[Callable[[], None]]:
            return [
                transport.start(packed, arrived_packed, chunk, f"ids of chunk {chunk}"),
                transport.start(rows, arrived, chunk, f"rows of chunk {chunk}"),
            ]

        pending, returning = [start(0)], []
        if self.overlap_with is not None:
            self.overlap_with.compute()
        for chunk in range(chunks):
            if chunk + 1 < chunks:
                pending.append(start(chunk + 1))
            for wait in pending[chunk]:
                wait()
            here = slice(bounds[chunk], bounds[chunk + 1])
            row_ids, row_weights = transport.unpacked(arrived_packed[here])
            row_x = arrived[here]
            row_x = row_x if self.dispatch_dtype is None else unpack_rows(row_x, x.shape[1], x.dtype)
            y = self.inner.forward(row_x, row_ids, row_weights, transport.assignments[chunk], saved)
            returning.append(transport.start_back(y, home, chunk, f"results of chunk {chunk}"))
        for wait in returning:
            wait()
        first, self.inner_calls = self.inner_calls, self.inner_calls + chunks
        self.calls.append(ExchangeCall(transport=transport, inner_calls=range(first, self.inner_calls)))
        return self._combine(home, transport)

    def forward_sorted(self, x: Tensor, weights: Tensor, counts: Tensor, starts: Tensor | None, saved: Saved) -> Tensor:
        ids = chosen_experts(sorted_dispatch(counts, x.shape[0], starts))
        return self.forward(x, ids, weights, x.shape[0], saved)

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        """Issue all of backward's exchanges; what is returned waits for the last ones and sums up."""
        here, transport = self.calls[call], self.calls[call].transport
        chunks, bounds, home_rows = transport.chunks, transport.received_bounds, transport.home_bounds[-1]
        rows = transport.expand(grad)
        arrived = grad.new_empty(bounds[-1], grad.shape[1])
        home = grad.new_empty(home_rows, grad.shape[1])
        home_weights = transport.weights.new_empty(home_rows, transport.weights.shape[1])

        def start(chunk: int) -> Callable[[], None]:
            return transport.start(rows, arrived, chunk, f"output gradients of chunk {chunk}")

        pending, returning = [start(0)], []
        for chunk in range(chunks):
            if chunk + 1 < chunks:
                pending.append(start(chunk + 1))
            pending[chunk]()
            part = arrived[bounds[chunk] : bounds[chunk + 1]]
            grad_x, grad_weights = self.inner.start_backward(here.inner_calls[chunk], part, saved)()
            returning += [
                transport.start_back(grad_x, home, chunk, f"row gradients of chunk {chunk}"),
                transport.start_back(grad_weights, home_weights, chunk, f"router weights' gradients of chunk {chunk}"),
            ]

        def finish() -> tuple[Tensor, Tensor]:
            for wait in returning:
                wait()
            return self._combine(home, transport), transport.choice_gradients(home_weights)

        return finish

    def _combine(self, rows: Tensor, transport: Transport) -> Tensor:
        return runtime.experts_backend(self.backend, rows.device).combine_rows(rows, transport.position)
