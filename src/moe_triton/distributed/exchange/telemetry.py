"""Stages that measure what is inside them: the experts of this rank, and a layer's outermost exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_triton.distributed.exchange.meter import ExchangeMeter
from moe_triton.distributed.exchange.stages import InnermostStage, InnerStage, Saved, Stage


@dataclass
class MeteredExperts:
    """The experts of this rank, whose rows are counted and whose time is no exchange's. See `stages.InnerStage`."""

    experts: InnerStage
    meter: ExchangeMeter
    num_experts: int

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        is_here = (ids >= 0) & (ids < self.num_experts)
        self.meter.count(is_here.any(1).sum())
        with self.meter.excluding(x.device):
            return self.experts.forward(x, ids, weights, assignments, saved)

    def forward_sorted(self, x: Tensor, weights: Tensor, counts: Tensor, starts: Tensor | None, saved: Saved) -> Tensor:
        self.meter.count(counts[: self.num_experts].sum())
        with self.meter.excluding(x.device):
            return self.experts.forward_sorted(x, weights, counts, starts, saved)

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        with self.meter.excluding(grad.device):
            return self.experts.start_backward(call, grad, saved)


@dataclass
class MeteredExchange:
    """A layer's outermost stage, whose time is measured. See `stages.Stage`."""

    stage: Stage
    meter: ExchangeMeter

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        with self.meter.measuring(x.device):
            return self.stage.forward(x, ids, weights, assignments, saved)

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        with self.meter.measuring(grad.device):
            wait = self.stage.start_backward(call, grad, saved)

        def finish() -> tuple[Tensor, Tensor]:
            with self.meter.measuring(grad.device):
                return wait()

        return finish


def metered_experts(experts: InnermostStage, meters: Sequence[ExchangeMeter]) -> InnerStage:
    """Return the experts, counted by all of these meters."""
    found: InnerStage = experts
    for meter in meters:
        found = MeteredExperts(found, meter, experts.num_experts)
    return found


def metered_exchange(stage: Stage, meters: Sequence[ExchangeMeter]) -> Stage:
    """Return the outermost stage, measured by all of these meters."""
    for meter in meters:
        stage = MeteredExchange(stage, meter)
    return stage
