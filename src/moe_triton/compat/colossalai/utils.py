"""Small helpers under upstream's paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from moe_triton.compat.colossalai.context.parallel_context import global_context
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.distributed.parameters import expert_parameters
from moe_triton.distributed.replicas import broadcast_parameters


def get_current_device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Activation checkpointing that keeps the router's gradient and repeats every random stream."""
    return torch_checkpoint(function, *args, use_reentrant=False)


def get_dataloader(
    dataset: Dataset[Any], shuffle: bool = False, seed: int = 1024, add_sampler: bool = True, **arguments: Any
) -> DataLoader[Any]:
    """A DataLoader of this rank's share of a dataset: ranks with the same tokens get the same samples.

    arguments: DataLoader's own; batch_size is a rank's.
    """
    if not add_sampler:
        return DataLoader(dataset, shuffle=shuffle, **arguments)
    group = global_context.group(ParallelMode.DATA)
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, num_replicas=group.size, rank=group.rank, shuffle=shuffle, seed=seed,
        drop_last=arguments.get("drop_last", False),
    )  # fmt: skip
    return DataLoader(dataset, sampler=sampler, **arguments)


def sync_moe_model_param(model: nn.Module) -> None:
    """Give every rank the first rank's parameters: dense ones, and each expert among those who hold it."""
    broadcast_parameters(model, global_context.groups())


def get_moe_epsize_param_dict(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """Parameters by how many ranks share their set of experts; the dense ones under 1."""
    experts = expert_parameters(model)
    found: dict[int, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        size = experts[parameter].ep.size if parameter in experts else 1
        found.setdefault(size, []).append(parameter)
    return found
