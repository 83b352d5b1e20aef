"""Small helpers under upstream's paths."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from moe_triton.compat.colossalai.context.parallel_context import global_context
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.compat.colossalai.utils.moe import get_moe_epsize_param_dict, sync_moe_model_param

__all__ = [
    "checkpoint",
    "free_port",
    "get_current_device",
    "get_dataloader",
    "get_moe_epsize_param_dict",
    "sync_moe_model_param",
]


def get_current_device() -> torch.device:
    """Return this process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint activations so that the router keeps its gradient and every random stream is repeated."""
    return torch_checkpoint(function, *args, use_reentrant=False)


def get_dataloader(
    dataset: Dataset[Any], shuffle: bool = False, seed: int = 1024, add_sampler: bool = True, **arguments: Any
) -> DataLoader[Any]:
    """Make a DataLoader of this rank's share of a dataset: ranks with the same tokens get the same samples.

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


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
