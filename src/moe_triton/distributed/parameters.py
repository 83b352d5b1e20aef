"""Which parameters of a model belong to experts that are spread over ranks, and over which ranks the others are equal.

A module whose attribute `expert_parallel` is an ExpertParallel holds expert parameters: its own, not its children's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn

from moe_triton.distributed.expert_parallel import ExpertParallel
from moe_triton.distributed.groups import Group, ParallelGroups, group_from_handle


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertParallel]]:
    """(name, module, its ExpertParallel) of every module that holds expert parameters."""
    for name, module in model.named_modules():
        parallel = getattr(module, "expert_parallel", None)
        if isinstance(parallel, ExpertParallel):
            yield name, module, parallel


def expert_parameters(model: nn.Module) -> dict[nn.Parameter, ExpertParallel]:
    """Every expert parameter of the model with the ExpertParallel that spreads it."""
    return {
        parameter: parallel
        for _, module, parallel in expert_modules(model)
        for parameter in module.parameters(recurse=False)
    }


def is_sliced(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether expert tensor parallelism splits this parameter; the down projection's bias is whole on every slice."""
    return parameter is not getattr(module, "down_proj_bias", None)


def data_groups(model: nn.Module, groups: ParallelGroups | None = None) -> tuple[Group, ...]:
    """The groups over which the model's tokens are spread, one after the other.

    Those of `groups`, else of the model's first ExpertParallel, else the default group; none without torch.distributed.
    """
    if groups is not None:
        return (groups.dp,)
    for _, _, parallel in expert_modules(model):
        return parallel.data
    return (group_from_handle(None),) if dist.is_available() and dist.is_initialized() else ()


def number_of_ranks(groups: tuple[Group, ...]) -> int:
    """Ranks in the product of the groups."""
    total = 1
    for group in groups:
        total *= group.size
    return total
