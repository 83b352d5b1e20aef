"""Experts that are any differentiable function, over ranks: an innermost stage with a graph of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_triton import runtime
from moe_triton.distributed.exchange.dispatched_rows import DispatchedRows
from moe_triton.distributed.exchange.expert_parallel import ExpertParallel
from moe_triton.distributed.exchange.stages import ExchangedLayer, Saved
from moe_triton.records import Dispatch

Compute = Callable[[Tensor, Tensor, Dispatch], Tensor]


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


def exchange_opaque(call: OpaqueCall, parallel: ExpertParallel, layer: ExchangedLayer) -> Tensor:
    """Return the experts' outputs [T, d] for this rank's tokens."""
    experts = OpaqueExperts(call, layer.backend)
    with runtime.without_autocast(call.hidden.device):
        return parallel.exchange(call.hidden, call.weights, call.dispatched, experts, call.parameters, layer)


class OpaqueExperts(DispatchedRows):
    """Any modules as the innermost stage of an exchange (`distributed.exchange.stages`): a graph of their own."""

    def __init__(self, call: OpaqueCall, backend: str) -> None:
        device = call.hidden.device
        self.name, self.run, self.parameters = call.name, call.compute, call.parameters
        self.num_experts = call.num_experts
        self.backend = runtime.choose(backend, device, torch.float32).name
        self.keeps_graph, self.autocast = torch.is_grad_enabled(), runtime.autocast_dtype(device)
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.gradients: list[Tensor] | None = None

    def description(self) -> Mapping[str, object]:
        return {"activation": self.name, "width": tuple(self.parameters[0].shape) if self.parameters else ()}

    def compute(self, x: Tensor, weights: Tensor, dispatched: Dispatch, saved: Saved) -> Tensor:
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
