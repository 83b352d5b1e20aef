"""Find the parameters of experts that are spread over ranks, and the ranks over which the others are equal."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from moe_triton.distributed.exchange.expert_parallel import ExpertParallel
from moe_triton.distributed.groups import Group, ParallelGroups, group_from_handle
from moe_triton.distributed.holders import spread_experts


def expert_parameters(model: nn.Module) -> dict[nn.Parameter, ExpertParallel]:
    """Return every expert parameter of the model with the ExpertParallel that spreads it."""
    return {
        parameter: parallel for _, module, parallel in spread_experts(model) for parameter in module.held_parameters()
    }


def data_groups(model: nn.Module, groups: ParallelGroups | None = None) -> tuple[Group, ...]:
    """Return the groups over which the model's tokens are spread, one after the other.

    Those of `groups`, else of the model's first ExpertParallel, else the default group; none without torch.distributed.
    """
    if groups is not None:
        return (groups.dp,)
    for _, _, parallel in spread_experts(model):
        return parallel.data
    return (group_from_handle(None),) if dist.is_available() and dist.is_initialized() else ()


def check_rule(model: nn.Module, rule: str) -> None:
    """Raise ValueError where a layer's losses make the global one in another way than gradients are reduced by."""
    wanted = "sum" if rule == "sum" else "mean"
    for name, _, parallel in spread_experts(model):
        if parallel.loss_reduction != wanted:
            raise ValueError(
                f"rule: got {rule!r} with loss_reduction={parallel.loss_reduction!r} at {name!r}, wanted "
                f"ExpertParallel(loss_reduction={wanted!r}) or the other rule: either the ranks' losses average, or sum"
            )
