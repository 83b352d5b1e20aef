"""Which parameters of a model belong to experts that are spread over ranks, and over which ranks the others are equal.

A module whose attribute `expert_parallel` is an ExpertParallel holds expert parameters: its own, not its children's,
unless it has a method `held_parameters` that gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import nn

from moe_triton.distributed.exchange.expert_parallel import ExpertParallel
from moe_triton.distributed.groups import Group, ParallelGroups, group_from_handle


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertParallel]]:
    """Yield (name, module, its ExpertParallel) of every module that holds expert parameters."""
    for name, module in model.named_modules():
        parallel = getattr(module, "expert_parallel", None)
        if isinstance(parallel, ExpertParallel):
            yield name, module, parallel


def held_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Return the expert parameters of one of `expert_modules`."""
    held: Callable[[], Iterator[nn.Parameter]] | None = getattr(module, "held_parameters", None)
    return module.parameters(recurse=False) if held is None else held()


def expert_parameters(model: nn.Module) -> dict[nn.Parameter, ExpertParallel]:
    """Every expert parameter of the model with the ExpertParallel that spreads it."""
    return {
        parameter: parallel for _, module, parallel in expert_modules(model) for parameter in held_parameters(module)
    }


def is_sliced(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether expert tensor parallelism splits this parameter, as it does all where a module does not say."""
    names = getattr(module, "sliced_dimensions", None)
    return names is None or any(parameter is getattr(module, name, None) for name in names)


def data_groups(model: nn.Module, groups: ParallelGroups | None = None) -> tuple[Group, ...]:
    """Return the groups over which the model's tokens are spread, one after the other.

    Those of `groups`, else of the model's first ExpertParallel, else the default group; none without torch.distributed.
    """
    if groups is not None:
        return (groups.dp,)
    for _, _, parallel in expert_modules(model):
        return parallel.data
    return (group_from_handle(None),) if dist.is_available() and dist.is_initialized() else ()


def check_rule(model: nn.Module, rule: str) -> None:
    """Raise ValueError where a layer's losses make the global one in another way than gradients are reduced by."""
    wanted = "sum" if rule == "sum" else "mean"
    for name, _, parallel in expert_modules(model):
        if parallel.loss_reduction != wanted:
            raise ValueError(
                f"rule: got {rule!r} with loss_reduction={parallel.loss_reduction!r} at {name!r}, wanted "
                f"ExpertParallel(loss_reduction={wanted!r}) or the other rule: either the ranks' losses average, or sum"
            )
