"""A small model whose gradients on several ranks are compared with those of one process on the global batch."""

from __future__ import annotations

import torch
from torch import nn

from moe_triton.distributed import ExpertParallel, ParallelGroups
from tests.helpers import parity
from tests.helpers.compare import assert_close
from tests.helpers.parity import HIDDEN, Case

TOKENS = [5, 5, 5, 5]
LAYER = {"aux_loss_weight": 0.1, "bias": True}


class Model(nn.Module):
    """A dense layer, an MoE layer, and a parameter that no loss reaches."""

    def __init__(self, case: Case, parallel: ExpertParallel | None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(HIDDEN, HIDDEN, dtype=case.dtype)
        self.unused = nn.Parameter(torch.ones(3, dtype=case.dtype))
        self.moe = parity.make_layer(case, parallel)

    def forward(self, x):
        return self.moe(self.first(x))


def losses(case, model, x, grad, divisor):
    out = model(x)
    return (out.output * grad).sum() / divisor + out.aux_loss


def expected_gradients(case: Case, scale: float) -> dict[str, torch.Tensor]:
    """Of the global batch in one process; `scale` times the loss without its auxiliary part."""
    model = Model(case, None)
    x, grad = parity.global_batch(case)
    losses(case, model, x, grad, 1 / scale).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


def local_part(model: Model, name: str, whole: torch.Tensor) -> torch.Tensor:
    if ".experts." not in name:
        return whole
    experts = model.moe.experts
    part = whole[list(experts.local_experts)]
    return torch.stack([experts.local_slice(name.rpartition(".")[2], expert) for expert in part])


def compare(case: Case, model: Model, expected: dict[str, torch.Tensor], factor=lambda name: 1.0) -> None:
    for name, parameter in model.named_parameters():
        wanted = local_part(model, name, expected[name]) * factor(name)
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        assert_close(grad, wanted)


def share(case: Case, groups: ParallelGroups) -> slice:
    """This rank's tokens of the global batch."""
    start = sum(case.tokens[: groups.dp.rank])
    return slice(start, start + case.tokens[groups.dp.rank])


def backward_here(case: Case, groups, rule: str, **exchange) -> Model:
    """Losses that sum, or that average, to the global one."""
    parallel = ExpertParallel(groups, loss_reduction="sum" if rule == "sum" else "mean", **exchange)
    model = Model(case, parallel)
    x, grad = parity.global_batch(case)
    here = share(case, groups)
    losses(case, model, x[here], grad[here], 1.0 if rule == "sum" else 1 / groups.dp.size).backward()
    return model
