"""Start the processes' groups, and put model, optimizer and criterion into an engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from moe_triton.checks import check_int
from moe_triton.compat.colossalai.config import read_config, settings_of
from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT
from moe_triton.compat.colossalai.context.parallel_context import global_context, world_size
from moe_triton.compat.colossalai.context.random import set_seed
from moe_triton.compat.colossalai.engine import Engine, MoeGradientHandler, holds_experts
from moe_triton.compat.colossalai.global_variables import moe_env
from moe_triton.compat.colossalai.logging import get_dist_logger
from moe_triton.distributed.consistency import broadcast_parameters


def launch(
    config: str | Path | dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
    host: str | None = None,
    port: int | None = None,
    backend: str | None = None,
    local_rank: int | None = None,
    seed: int = 1024,
    verbose: bool = True,
) -> None:
    """Start torch.distributed if it is not running and there are several processes, make the groups, seed torch.

    Args:
        config: a dict, or the path of a .py or .json file. `parallel = dict(moe=dict(size=M), tensor=dict(size=N))`
            (v0.0.2), or `max_ep_size = M` (v0.1.6); `gradient_accumulation`, `clip_grad_norm`. Other names are yours.
        rank, world_size: of this process among all.
        host, port: where rank 0 listens.
        backend: None is "nccl" where there are GPUs, else "gloo".
        local_rank: the GPU; None is rank modulo the GPUs.
        seed: of python, numpy and torch, on every rank the same.
        verbose: log the layout on rank 0.

    Raises:
        ValueError, TypeError: a bad config or size, by name.
    """
    found = read_config(config)
    settings = settings_of(found)
    check_int("world_size", world_size, low=1)
    check_int("rank", rank, low=0, high=world_size - 1)
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count() if local_rank is None else local_rank)
    if world_size > 1 and not dist.is_initialized():
        if host is None or port is None:
            raise ValueError(f"host, port: got {host!r}, {port!r} for {world_size} processes, wanted both")
        dist.init_process_group(
            backend or ("nccl" if has_gpu else "gloo"),
            init_method=f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}",
            rank=rank,
            world_size=world_size,
        )
    setup(found, seed)
    if verbose:
        get_dist_logger().info(
            f"{world_size} processes, tensor parallel {settings.tensor_size}, "
            f"moe model parallel {MOE_CONTEXT.max_ep_size}, moe data parallel {MOE_CONTEXT.min_dp_size}",
            ranks=[0],
        )


def launch_from_torch(
    config: str | Path | dict[str, Any],
    host: str | None = None,
    port: int | None = None,
    backend: str | None = None,
    seed: int = 1024,
    verbose: bool = True,
) -> None:
    """Call `launch` in a process that torchrun started; without torchrun it is one process alone."""
    environment = os.environ
    launch(
        config,
        rank=int(environment.get("RANK", 0)),
        world_size=int(environment.get("WORLD_SIZE", 1)),
        host=environment.get("MASTER_ADDR", host),
        port=int(environment["MASTER_PORT"]) if "MASTER_PORT" in environment else port,
        backend=backend,
        local_rank=int(environment["LOCAL_RANK"]) if "LOCAL_RANK" in environment else None,
        seed=seed,
        verbose=verbose,
    )


def setup(config: dict[str, Any], seed: int = 1024) -> None:
    """Do what `launch` does after torch.distributed has started."""
    settings = settings_of(config)
    processes = world_size()
    if processes % settings.tensor_size:
        raise ValueError(f"parallel.tensor.size: got {settings.tensor_size}, wanted a divisor of {processes} processes")
    global_context.config, global_context.tensor_parallel = dict(config), settings.tensor_size
    if settings.max_ep_size is not None:
        MOE_CONTEXT.setup(max_ep_size=settings.max_ep_size, generation="v0.1.6")
    elif settings.moe_size is not None:
        moe_env.setup(settings.moe_size, **settings.exchange)
    else:
        MOE_CONTEXT.reset()
    set_seed(seed)


def _reset_loss(*_: object) -> None:
    """Reset the losses before a forward; a function of this file, so that a model with the hook can be pickled."""
    MOE_CONTEXT.reset_loss()


def initialize(
    model: nn.Module,
    optimizer: Optimizer,
    criterion: Any = None,
    train_dataloader: Any = None,
    test_dataloader: Any = None,
    lr_scheduler: Any = None,
    ophooks: Any = None,
    verbose: bool = True,
) -> tuple[Engine, Any, Any, Any]:
    """Make an engine of model, optimizer and criterion, which reduces dense and expert gradients itself.

    The model is moved to the GPU where there is one, and its parameters become those of the first rank that holds
    them. A `MoeGradientHandler` is added when the layout of experts was set up or the model holds any. The auxiliary
    losses are reset by each of the model's forwards.

    Args:
        model, optimizer: built by the caller, the optimizer on the model's parameters.
        criterion: called with (output, label); `nn.loss.MoeLoss` for a model with experts.
        train_dataloader, test_dataloader, lr_scheduler: given back as they are.
        ophooks: must be None.
        verbose: log what was made on rank 0.

    Returns:
        (engine, train_dataloader, test_dataloader, lr_scheduler)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a Module")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, wanted a torch.optim.Optimizer")
    if ophooks is not None:
        raise ValueError(f"ophooks: got {ophooks!r}, wanted None: hooks of operators are not supported")
    settings = settings_of(global_context.config)
    if torch.cuda.is_available():
        model.cuda()
    broadcast_parameters(model, global_context.groups())
    model.register_forward_pre_hook(_reset_loss)
    handlers = [MoeGradientHandler(model, optimizer)] if MOE_CONTEXT.is_initialized or holds_experts(model) else []
    engine = Engine(
        model,
        optimizer,
        criterion,
        gradient_handlers=handlers,
        clip_grad_norm=settings.clip_grad_norm,
        gradient_accumulation=settings.gradient_accumulation,
    )
    if verbose:
        get_dist_logger().info(
            f"engine with {', '.join(type(h).__name__ for h in handlers) or 'no handler'}", ranks=[0]
        )
    return engine, train_dataloader, test_dataloader, lr_scheduler
