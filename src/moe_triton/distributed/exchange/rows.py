"""The exchange of rows between ranks around an inner stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from moe_triton import runtime
from moe_triton.dispatch import chosen_experts, sorted_dispatch
from moe_triton.distributed.exchange.fp8_rows import pack_rows, unpack_rows
from moe_triton.distributed.exchange.overlap import Deferred
from moe_triton.distributed.exchange.stages import InnerStage, Saved
from moe_triton.distributed.exchange.tails import Part, parts_of, tail_of, tail_width
from moe_triton.distributed.exchange.transport import Routed, Transport, expand, rows_of_chunk

# ids, weights and the most (row, id) pairs -> the wait for what travels, which may compute something meanwhile
Planner = Callable[[Tensor, Tensor, int], Callable[[Callable[[], None]], Routed]]


class ExchangeCall(NamedTuple):
    """One forward of an exchange: how its rows travelled, and which calls of the inner stage its chunks were.

    tokens and position of its rows are in Saved, at these places; their choices' weights are `weights`.
    """

    transport: Transport
    tokens: int
    position: int
    weights: Part
    inner_calls: range


@dataclass(slots=True)
class Exchange:
    """Sends rows to where their experts are, lets the inner stage compute there, and sums what comes back.

    The exchange of chunk i+1 is issued before chunk i is computed, and in backward a chunk's results leave before the
    next chunk is computed. `overlap_with` is computed once: while the counts travel, where they do, else while the
    first chunk does. With a `dispatch_dtype` of fp8 the rows of forward travel as codes and scales; results and
    gradients travel as they are.
    """

    planner: Planner
    inner: InnerStage
    backend: str
    dispatch_dtype: torch.dtype | None = None
    overlap_with: Deferred | None = None
    calls: list[ExchangeCall] = field(default_factory=list)
    inner_calls: int = 0

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        transport, sent = self.planner(ids, weights, assignments)(self._compute_beside)
        counts, tail = transport.counts, sent.tail
        chunks = len(counts.sent)
        bounds, payload = counts.received_bounds, x if self.dispatch_dtype is None else pack_rows(x)
        width, message = payload.shape[1], sent.message(payload)
        arrived = message.new_empty(bounds[-1], message.shape[1])
        rows = x.new_empty(bounds[-1], x.shape[1])  # of all chunks in one buffer, so that nothing joins them later
        home = x.new_empty(transport.home_bounds[-1], x.shape[1])

        def start(chunk: int) -> Callable[[], None]:
            return transport.start(message, arrived, chunk, f"rows of chunk {chunk}")

        pending, returning = [start(0)], []
        self._compute_beside()
        for chunk in range(chunks):
            if chunk + 1 < chunks:
                pending.append(start(chunk + 1))
            pending[chunk]()
            here = slice(bounds[chunk], bounds[chunk + 1])
            row_x, tails, chunk_rows = arrived[here, :width], arrived[here, width:], rows_of_chunk(rows, bounds, chunk)
            chunk_rows.copy_(row_x if self.dispatch_dtype is None else unpack_rows(row_x, x.shape[1], x.dtype))
            row_ids, row_weights = transport.ids_and_weights(tails, tail)
            y = self.inner.forward(chunk_rows, row_ids, row_weights, counts.assignments[chunk], saved)
            returning.append(transport.start_back(y, home, chunk, f"results of chunk {chunk}"))
        for wait in returning:
            wait()
        out = self._combine(home, sent.position)
        first, self.inner_calls = self.inner_calls, self.inner_calls + chunks
        place = saved.put(sent.tokens, sent.position)
        self.calls.append(ExchangeCall(transport, place, place + 1, tail[1], range(first, self.inner_calls)))
        return out

    def forward_sorted(self, x: Tensor, weights: Tensor, counts: Tensor, starts: Tensor | None, saved: Saved) -> Tensor:
        ids = chosen_experts(sorted_dispatch(counts, x.shape[0], starts))
        return self.forward(x, ids, weights, x.shape[0], saved)

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        """Issue all of backward's exchanges; what is returned waits for the last ones and sums up."""
        here = self.calls[call]
        transport, position, weights = here.transport, saved[here.position], [here.weights]
        chunks, bounds, d = transport.chunks, transport.counts.received_bounds, grad.shape[1]
        rows = expand(grad, saved[here.tokens])
        arrived = grad.new_empty(bounds[-1], d)
        home = grad.new_empty(transport.home_bounds[-1], d + tail_width(weights, grad.dtype))

        def start(chunk: int) -> Callable[[], None]:
            return transport.start(rows, arrived, chunk, f"output gradients of chunk {chunk}")

        pending, returning = [start(0)], []
        for chunk in range(chunks):
            if chunk + 1 < chunks:
                pending.append(start(chunk + 1))
            pending[chunk]()
            part = rows_of_chunk(arrived, bounds, chunk)
            grad_x, grad_weights = self.inner.start_backward(here.inner_calls[chunk], part, saved)()
            message = torch.cat([grad_x, tail_of([grad_weights], grad.dtype)], dim=1)
            returning.append(transport.start_back(message, home, chunk, f"row gradients of chunk {chunk}"))

        def finish() -> tuple[Tensor, Tensor]:
            for wait in returning:
                wait()
            (grad_weights,) = parts_of(home[:, d:], weights)
            return self._combine(home[:, :d].contiguous(), position), transport.choice_gradients(grad_weights, position)

        return finish

    def _compute_beside(self) -> None:
        if self.overlap_with is not None:
            self.overlap_with.compute()

    def _combine(self, rows: Tensor, position: Tensor) -> Tensor:
        return runtime.experts_backend(self.backend, rows.device).combine_rows(rows, position)
