"""What a provider is: a whole MoE block over the workload's weights, router included.

A block takes hidden states [T, d] to hidden states [T, d].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from moe_triton.autograd.gate import run_gate
from moe_triton.benchmarking.cases import Case, Workload

Parameter = Tensor | list[Tensor]  # one tensor, or one per expert
Named = dict[str, Parameter]


class Unavailable(Exception):
    """A provider that cannot be measured here: `status` in two words and the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Block:
    """A provider, ready to run.

    forward      [T, d] -> [T, d], differentiable in the hidden states and in every parameter if `is_trainable`
    choose       [T, d] -> the experts that its own router chooses, [T, K]
    parameters   "gate" [E, d], "gate_up", "down" and biases as in `Workload`, or one tensor per expert; or whatever it
                 has, with `unpack`
    unpack       its parameters (or their gradients) by name -> the same in the names and the layout of `Workload`
    is_trainable False: inference only
    is_fp8       its products are in fp8, so that its results have their noise
    label        how it is shown, where that is only known now
    """

    forward: Callable[[Tensor], Tensor]
    choose: Callable[[Tensor], Tensor]
    parameters: Mapping[str, Parameter]
    unpack: Callable[[Named], Named] | None = None
    is_trainable: bool = True
    is_fp8: bool = False
    label: str | None = None

    def leaves(self) -> list[Tensor]:
        """The parameters as one flat list."""
        groups = (value if isinstance(value, list) else [value] for value in self.parameters.values())
        return [tensor for group in groups for tensor in group]

    def grouped(self, tensors: list[Tensor]) -> Named:
        """A flat list in the order of `leaves` by the workload's names again."""
        rest, named = list(tensors), {}
        for name, value in self.parameters.items():
            size = len(value) if isinstance(value, list) else 1
            named[name] = rest[:size] if isinstance(value, list) else rest[0]
            del rest[:size]
        return named if self.unpack is None else self.unpack(named)


@dataclass(frozen=True, kw_only=True)
class Provider:
    """`build` makes the block or raises `Unavailable`. `notes`: what differs from the other blocks."""

    label: str
    build: Callable[[Workload], Block]
    is_ours: bool = False
    notes: str = ""


def share(tensor: Tensor) -> nn.Parameter:
    """A parameter over the workload's own memory."""
    return nn.Parameter(tensor)


def require(package: str, name: str | None = None) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable("not installed", f"{name or package} is not installed")


def require_swiglu(case: Case, who: str) -> None:
    if case.activation != "swiglu" or case.bias:
        raise Unavailable("not applicable", f"{who} computes swiglu without biases")


def routed_block(
    workload: Workload,
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    gate_up: nn.Parameter,
    down: nn.Parameter,
    unpack: Callable[[Named], Named] | None = None,
    label: str | None = None,
) -> Block:
    """A block with our gate and `plain_route` before experts `run`: (x [T, d], weights, experts [T, K]) -> [T, d]."""
    gate, top_k = share(workload.gate), workload.case.top_k

    def forward(x: Tensor) -> Tensor:
        logits, x = run_gate(x, gate, None)
        return run(x, *plain_route(logits, top_k))

    return Block(
        forward=forward,
        choose=lambda x: plain_route(run_gate(x, gate, None)[0], top_k)[1],
        parameters={"gate": gate, "gate_up": gate_up, "down": down},
        unpack=unpack,
        label=label,
    )


def plain_route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, K] in fp32 and experts [T, K] int64, by plain torch: the router of peers that have experts only.

    softmax over all experts in fp32, top-k, weights normalised over the K choices when K > 1, as every block here does.
    """
    weights, experts = logits_TE.softmax(-1).topk(top_k, dim=-1)
    if top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts
