"""Experts of DeepSpeed and Colossal-AI, here or over ranks: MLPs run fused, any other module is called on its own rows.

Shapes: R rows of tokens, J choices of a row, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moe_triton import runtime
from moe_triton.autograd.experts import run_experts
from moe_triton.dispatch import dispatch, sorted_dispatch
from moe_triton.distributed import ExpertParallel
from moe_triton.distributed.exchange.stages import ExchangedLayer, Saved
from moe_triton.experts import check_call
from moe_triton.records import Dispatch, ExpertCall
from moe_triton.reference import wide

Compute = Callable[[Tensor, Tensor, Dispatch], Tensor]


def call_one_by_one(
    experts: Sequence[Callable[[Tensor], Any]], hidden_states: Tensor, weights: Tensor, dispatched: Dispatch
) -> Tensor:
    """hidden_states [R, d], weights [R, J], a Dispatch of the R rows -> weighted sums [R, d]; one host sync.

    An expert maps [1, 1, rows, d] (four dimensions, as DeepSpeed has) to the same shape, or to a tuple that begins with
    it.
    """
    bounds = dispatched.offsets.tolist()
    size_d, num_rows = hidden_states.shape[1], bounds[-1]
    rows_Sd = hidden_states[dispatched.source[:num_rows].long() // dispatched.top_k]
    outs = []
    for expert, (start, end) in zip(experts, pairwise(bounds), strict=True):
        # an idle expert sees a row of zeros, so that its gradients are zeros and not None
        rows = rows_Sd[start:end] if start < end else hidden_states.new_zeros(1, size_d)
        out = expert(rows[None, None])
        out = out[0] if isinstance(out, tuple) else out
        outs.append(out.reshape(-1, size_d)[: end - start])
    outs.append(outs[0].new_zeros(1, size_d))  # the row of the choices that were dropped or skipped
    position = torch.where(dispatched.position < 0, num_rows, dispatched.position).long()
    rows_RJd = torch.cat(outs)[position].to(wide(hidden_states.dtype))
    return (rows_RJd * weights[..., None]).sum(1).to(hidden_states.dtype)


@dataclass(frozen=True, kw_only=True)
class OpaqueCall:
    """What experts that are any modules compute with, in place of an `ExpertCall`.

    name         what they are, which has to be the same on all ranks
    compute      (rows [R, d], weights [R, J], a Dispatch of the rows) -> [R, d], for the local experts
    parameters   of the local experts
    num_experts  how many they are
    """

    hidden: Tensor
    weights: Tensor
    dispatched: Dispatch
    name: str
    compute: Compute
    parameters: Sequence[Tensor]
    num_experts: int


def compute_experts(call: ExpertCall | OpaqueCall, parallel: ExpertParallel | None, layer: ExchangedLayer, /) -> Tensor:
    """Return the experts' outputs [T, d], over the ranks of `parallel` where that is not None."""
    if isinstance(call, ExpertCall):
        if parallel is not None:
            return parallel.run(call, layer)
        check_call(call, layer.backend)
        return run_experts(call, backend=layer.backend)
    if parallel is None:
        return call.compute(call.hidden, call.weights, call.dispatched)
    experts = OpaqueExperts(call, parallel.first_expert(layer.num_experts), layer.backend)
    with runtime.without_autocast(call.hidden.device):
        return parallel.exchange(call.hidden, call.weights, call.dispatched, experts, call.parameters, layer)


class OpaqueExperts:
    """Any modules as the innermost stage of an exchange (`distributed.exchange.stages`): a graph of their own."""

    def __init__(self, call: OpaqueCall, first_expert: int, backend: str) -> None:
        device = call.hidden.device
        self.name, self.run, self.parameters = call.name, call.compute, call.parameters
        self.num_experts, self.first_expert = call.num_experts, first_expert
        self.backend = runtime.choose(backend, device, torch.float32).name
        self.keeps_graph, self.autocast = torch.is_grad_enabled(), runtime.autocast_dtype(device)
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.gradients: list[Tensor] | None = None

    def description(self) -> Mapping[str, object]:
        return {"activation": self.name, "width": tuple(self.parameters[0].shape) if self.parameters else ()}

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        """Rows [R, d], ids [R, J], weights [R, J] -> [R, d]."""
        local = ids - self.first_expert
        local = torch.where((local >= 0) & (local < self.num_experts), local, -1)
        return self._forward(x, weights, dispatch(local, self.num_experts))

    def forward_sorted(self, x: Tensor, weights: Tensor, counts: Tensor, starts: Tensor | None, saved: Saved) -> Tensor:
        """Rows [R, d] in expert order, weights [R, 1] -> [R, d]."""
        here = slice(self.num_experts)
        starts = None if starts is None else starts[here]
        return self._forward(x, weights, sorted_dispatch(counts[here], x.shape[0], starts))

    def _forward(self, x: Tensor, weights: Tensor, dispatched: Dispatch) -> Tensor:
        cast = torch.autocast(x.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)
        with torch.set_grad_enabled(self.keeps_graph), cast:
            x, weights = (t.detach().requires_grad_(self.keeps_graph) for t in (x, weights))
            out = self.run(x, weights, dispatched)
        self.calls.append((x, weights, out))
        return out.detach()

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        """Compute the gradients of a call's rows and weights, and add those of the parameters to the earlier ones."""
        x, weights, out = self.calls[call]
        wanted = [p for p in self.parameters if p.requires_grad]
        grad_x, grad_weights, *found = torch.autograd.grad(
            out, [x, weights, *wanted], grad, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        found = found if self.gradients is None else [a + b for a, b in zip(self.gradients, found, strict=True)]
        self.gradients = found
        return lambda: (grad_x, grad_weights)

    def backward_weights(self, wanted: Sequence[bool], saved: Saved) -> list[Tensor | None]:
        """Return the parameters' gradients; None for a frozen one."""
        found = iter(self.gradients or [])
        self.gradients = None
        return [next(found) if p.requires_grad else None for p in self.parameters]
