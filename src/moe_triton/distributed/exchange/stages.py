"""What happens to rows between a token and its experts' outputs, forward and backward: exchanges around local experts.

A stage takes rows x [R, d] with their ids [R, J] (-1 for none) and weights [R, J], and gives one output row per input
row: the sum of its choices. Stages nest: an exchange between nodes holds one inside the node, which holds the experts.
Backward is in two halves, as the backends' is: the rows' gradients, which others wait for, then the parameters'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moe_triton import runtime
from moe_triton.autograd.experts import Weights
from moe_triton.dispatch import dispatch
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.exchange.transport import Transport
from moe_triton.records import Dispatch, ExpertSpec

Needs = tuple[bool, bool, bool, bool]  # gate_up, down and their biases
Parameters = tuple[Weights, Weights, Weights | None, Weights | None]
# ids, weights and the most (row, id) pairs -> the wait for the transport
Planner = Callable[[Tensor, Tensor, int], Callable[[], Transport]]


class Saved:
    """The tensors that one forward keeps for its backward; autograd holds them, so that its hooks see them."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self.tensors = list(tensors)

    def put(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.tensors[index]


class Stage(Protocol):
    """See the module. `forward` may be called several times before the backward calls, which name theirs by number."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor: ...

    def backward_rows(self, call: int, grad: Tensor, saved: Saved) -> tuple[Tensor, Tensor]: ...


@dataclass
class LocalCall:
    """One forward of the local experts: where its tensors are in Saved, its dispatch, and what backward leaves."""

    x: int
    weights: int
    preactivation: int
    plan: Dispatch
    grad_out: Tensor | None = None
    grad_h: Tensor | None = None
    weighted_a: Tensor | None = None


@dataclass
class LocalExperts:
    """The experts of this rank, by a backend: the innermost stage.

    first_expert    what to subtract from an id; ids of other ranks' experts are skipped
    adds_bias       whether the down bias is added here: of several ranks that hold slices of an expert only one does
    """

    num_experts: int
    spec: ExpertSpec
    backend: str
    keep_preactivation: bool
    first_expert: int = 0
    adds_bias: bool = True
    note: Callable[[str], None] = lambda event: None
    calls: list[LocalCall] = field(default_factory=list)
    parameters: Parameters | None = None

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        """Rows [R, d] -> [R, d]. `assignments` bounds the (row, id) pairs that are kept."""
        local = ids - self.first_expert
        local = torch.where((local >= 0) & (local < self.num_experts), local, -1)
        plan = _shortened(dispatch(local, self.num_experts, backend=self.backend), assignments)
        self.note(f"experts {len(self.calls)}")
        out, preactivation = self._ops.experts_forward(
            x, weights, plan.offsets, plan.source, plan.position, *self._used_parameters, self.spec,
            self.keep_preactivation,
        )  # fmt: skip
        call = LocalCall(x=saved.put(x), weights=saved.put(weights), preactivation=saved.put(preactivation), plan=plan)
        self.calls.append(call)
        return out

    def backward_rows(self, call: int, grad: Tensor, saved: Saved) -> tuple[Tensor, Tensor]:
        """The gradients of a call's rows [R, d] and weights [R, J]."""
        here, plan = self.calls[call], self.calls[call].plan
        self.note(f"row gradients {call}")
        grad_x, grad_weights, here.grad_h, here.weighted_a = self._ops.experts_backward_rows(
            grad, saved[here.x], saved[here.preactivation], saved[here.weights], plan.offsets, plan.source,
            plan.position, *self._used_parameters, self.spec, (True,) * 6,
        )  # fmt: skip
        here.grad_out = grad
        return grad_x, grad_weights

    def backward_weights(self, needs: Needs, saved: Saved) -> tuple[Weights | None, ...]:
        """The gradients of the parameters: one ragged product over the rows of all calls."""
        self.note("weight gradients")
        grad_out, x, weights, grad_h, weighted_a, plan = self._all_calls(saved)
        return self._ops.experts_backward_weights(
            grad_out, x, grad_h, weighted_a, weights, plan.offsets, plan.source, plan.position,
            *self._given_parameters, self.spec, (False, False, *needs),
        )  # fmt: skip

    def _all_calls(self, saved: Saved) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Dispatch]:
        """The operands of the weight gradients, with the calls' rows merged into one expert order."""
        grads = [(call.grad_out, call.grad_h, call.weighted_a) for call in self.calls]
        if len(self.calls) == 1:
            only = self.calls[0]
            grad_out, grad_h, weighted_a = grads[0]
            assert grad_out is not None
            assert grad_h is not None
            assert weighted_a is not None
            return grad_out, saved[only.x], saved[only.weights], grad_h, weighted_a, only.plan
        x = joined([saved[call.x] for call in self.calls])
        weights = torch.cat([saved[call.weights] for call in self.calls])
        grad_out = joined([grad for grad, _, _ in grads if grad is not None])
        experts, top_k = torch.cat([_expert_of_slots(call.plan) for call in self.calls]), weights.shape[1]
        num_rows = sum(call.plan.source.shape[0] for call in self.calls)
        plan = _shortened(dispatch(experts.view(-1, top_k), self.num_experts, backend=self.backend), num_rows)
        merged = []
        for name in ("grad_h", "weighted_a"):
            parts = [getattr(call, name) for call in self.calls]
            whole = parts[0].new_empty(num_rows + 1, parts[0].shape[1])  # one more for the rows past a call's end
            first_slot = 0
            for call, part in zip(self.calls, parts, strict=True):
                source = call.plan.source.long()
                if source.numel() > 0:
                    row = plan.position.reshape(-1)[(first_slot + source).clamp_min(0)].long()
                    whole[torch.where(source >= 0, row, num_rows)] = part
                first_slot += call.plan.position.numel()
            merged.append(whole[:num_rows])
        return grad_out, x, weights, merged[0], merged[1], plan

    @property
    def _ops(self):  # type: ignore[no-untyped-def]
        return runtime.load(self.backend, "experts")

    @property
    def _given_parameters(self) -> Parameters:
        assert self.parameters is not None
        return self.parameters

    @property
    def _used_parameters(self) -> Parameters:
        gate_up, down, gate_up_bias, down_bias = self._given_parameters
        if not self.adds_bias and down_bias is not None:
            if isinstance(down_bias, Tensor):
                down_bias = torch.zeros_like(down_bias)
            else:
                down_bias = [torch.zeros_like(b) for b in down_bias]
        return gate_up, down, gate_up_bias, down_bias


@dataclass
class ExchangeCall:
    """One forward of an exchange: its transport, and which calls of the inner stage its chunks were."""

    transport: Transport
    inner_calls: range


@dataclass
class Exchange:
    """Sends rows to where their experts are, lets the inner stage compute there, and sums what comes back.

    The exchange of chunk i+1 is issued before chunk i is computed, and in backward a chunk's results leave before the
    next chunk is computed.
    """

    planner: Planner
    inner: Stage
    channel: Channel
    backend: str
    beside: Callable[[], None] | None = None  # run once while the first chunk travels
    calls: list[ExchangeCall] = field(default_factory=list)
    inner_calls: int = 0

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        transport = self.planner(ids, weights, assignments)()
        chunks, bounds = transport.chunks, transport.received_bounds
        rows, packed = transport.expand(x), transport.packed()
        arrived = x.new_empty(bounds[-1], x.shape[1])
        arrived_packed = packed.new_empty(bounds[-1], packed.shape[1])
        home = x.new_empty(transport.home_bounds[-1], x.shape[1])

        def start(chunk: int) -> list[Callable[[], None]]:
            return [
                transport.start(packed, arrived_packed, chunk, f"ids of chunk {chunk}"),
                transport.start(rows, arrived, chunk, f"rows of chunk {chunk}"),
            ]

        pending, returning = [start(0)], []
        if self.beside is not None:
            self.beside()
        for chunk in range(chunks):
            if chunk + 1 < chunks:
                pending.append(start(chunk + 1))
            for wait in pending[chunk]:
                wait()
            here = slice(bounds[chunk], bounds[chunk + 1])
            row_ids, row_weights = transport.unpacked(arrived_packed[here])
            y = self.inner.forward(arrived[here], row_ids, row_weights, transport.assignments[chunk], saved)
            returning.append(transport.start_back(y, home, chunk, f"results of chunk {chunk}"))
        for wait in returning:
            wait()
        first, self.inner_calls = self.inner_calls, self.inner_calls + chunks
        self.calls.append(ExchangeCall(transport=transport, inner_calls=range(first, self.inner_calls)))
        return self._ops.combine_rows(home, transport.position)

    def backward_rows(self, call: int, grad: Tensor, saved: Saved) -> tuple[Tensor, Tensor]:
        return self.start_backward(call, grad, saved)()

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        """All of backward's exchanges, issued; what it returns waits for the last ones and sums up."""
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
            grad_x, grad_weights = self.inner.backward_rows(here.inner_calls[chunk], part, saved)
            returning += [
                transport.start_back(grad_x, home, chunk, f"row gradients of chunk {chunk}"),
                transport.start_back(grad_weights, home_weights, chunk, f"router weights' gradients of chunk {chunk}"),
            ]

        def finish() -> tuple[Tensor, Tensor]:
            for wait in returning:
                wait()
            grad_x = self._ops.combine_rows(home, transport.position)
            return grad_x, transport.choice_gradients(home_weights)

        return finish

    @property
    def _ops(self):  # type: ignore[no-untyped-def]
        return runtime.load(self.backend, "experts")


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows that follow each other, as one tensor: a view where they already are neighbours in one buffer."""
    first, width = parts[0], parts[0].stride(0)
    end = first.storage_offset()
    neighbours = True
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        neighbours = neighbours and same and part.is_contiguous() and part.storage_offset() == end
        end += part.shape[0] * width
    if not neighbours:
        return torch.cat(list(parts))
    return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), first.stride())


def _shortened(plan: Dispatch, num_rows: int) -> Dispatch:
    """The same dispatch with room for `num_rows` rows, which the kept ones must not exceed."""
    if num_rows >= plan.source.shape[0]:
        return plan
    return Dispatch(counts=plan.counts, offsets=plan.offsets, source=plan.source[:num_rows], position=plan.position)


def _expert_of_slots(plan: Dispatch) -> Tensor:
    """The expert of every slot [R*J], -1 for one without a row."""
    row = plan.position.reshape(-1)
    expert = torch.searchsorted(plan.offsets[1:].contiguous(), row, right=True)
    return torch.where(row >= 0, expert, -1).int()
