"""Helpers for the parameters of a model with experts."""

from __future__ import annotations

from torch import nn

from moe_triton.compat.colossalai.context.parallel_context import global_context
from moe_triton.distributed.consistency import broadcast_parameters
from moe_triton.distributed.parameters import expert_parameters


def sync_moe_model_param(model: nn.Module) -> None:
    """Give every rank the first rank's parameters: dense ones, and each expert among those who hold it."""
    broadcast_parameters(model, global_context.groups())


def get_moe_epsize_param_dict(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """Return the parameters by how many ranks share their set of experts; the dense ones under 1."""
    experts = expert_parameters(model)
    found: dict[int, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        size = experts[parameter].ep.size if parameter in experts else 1
        found.setdefault(size, []).append(parameter)
    return found
