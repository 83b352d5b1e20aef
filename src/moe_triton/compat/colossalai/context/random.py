"""Streams of random numbers, one per ParallelMode, that differ between ranks or are shared by them as the mode says.

A stream has no state: entering it draws a number from torch's default generator, mixes it with the
stream's seed, and gives the default generator back one draw further. So `torch.manual_seed` seeds every stream, ranks
in step with each other stay in step, and activation checkpointing, which restores the default generator, repeats them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from moe_triton.checks import check_int
from moe_triton.compat.colossalai.context.parallel_context import global_context
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode


@dataclass
class SeedManager:
    """The streams' seeds, and what the next container of experts starts from.

    DATA is the default generator itself, so it has no seed here.
    """

    seeds: dict[ParallelMode, int] = field(default_factory=dict)
    mode: ParallelMode = ParallelMode.DATA
    expert_seed: int | None = None
    containers: int = 0


_manager = SeedManager()


def set_seed(value: int) -> None:
    """Seed python, numpy and torch alike on every rank: the DATA stream, which dense parameters are drawn from."""
    check_int("seed", value, low=0)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def add_seed(mode: ParallelMode, seed: int, overwrite: bool = False) -> None:
    """Give the stream of `mode` its seed. Raises ValueError when it has one and `overwrite` is False."""
    if not isinstance(mode, ParallelMode):
        raise TypeError(f"mode: got {mode!r}, wanted a ParallelMode")
    check_int("seed", seed, low=0)
    if mode in _manager.seeds and not overwrite:
        raise ValueError(f"mode: {mode} has the seed {_manager.seeds[mode]} already; overwrite=True replaces it")
    _manager.seeds[mode] = seed


def get_seeds() -> dict[ParallelMode, int]:
    """Return the seeds of all streams that have one."""
    return dict(_manager.seeds)


def get_current_mode() -> ParallelMode:
    """Return the stream that torch's generators draw from now."""
    return _manager.mode


def reset_seeds() -> None:
    """Forget all streams."""
    global _manager
    _manager = SeedManager()


def moe_set_seed(seed: int) -> None:
    """Seed the streams of an MoE model on this rank, and the experts that are made from now on.

    v0.0.2: MOE_MODEL gets seed + the rank in the moe model parallel group, TENSOR the global rank. v0.1.6: TENSOR gets
    seed + the global rank. TOKENS, which upstream does not have, gets seed + the data-parallel rank. Experts are drawn
    by `seed` and their global id, so that they do not depend on how many ranks share them (upstream's do).
    """
    check_int("seed", seed, low=0)
    rank = global_context.get_global_rank()
    if global_context.generation == "v0.0.2":
        add_seed(ParallelMode.MOE_MODEL, seed + global_context.get_local_rank(ParallelMode.MOE_MODEL), overwrite=True)
        add_seed(ParallelMode.TENSOR, rank, overwrite=True)
    else:
        add_seed(ParallelMode.TENSOR, seed + rank, overwrite=True)
    add_seed(ParallelMode.TOKENS, seed + global_context.get_local_rank(ParallelMode.DATA), overwrite=True)
    _manager.expert_seed, _manager.containers = seed, 0


@contextmanager
def seed(mode: ParallelMode) -> Iterator[None]:
    """Draw from the stream of `mode` inside. A mode without a seed, or DATA, draws from the default generator."""
    if mode not in _manager.seeds:
        yield
        return
    before, _manager.mode = _manager.mode, mode
    try:
        with generators_seeded(_mixed(_draw(), _manager.seeds[mode])):
            yield
    finally:
        _manager.mode = before


def with_seed(function: Callable[..., Any], mode: ParallelMode) -> Callable[..., Any]:
    """Return `function` as called inside `seed(mode)`."""
    return seed(mode)(function)


def expert_seeds() -> Callable[[int], int]:
    """Return, for a new container, global expert id -> the seed to draw that expert with, the same on every rank."""
    if _manager.expert_seed is None:
        base = _draw()
    else:
        base = _mixed(_manager.expert_seed, _manager.containers)
        _manager.containers += 1
    return lambda expert: _mixed(base, expert)


@contextmanager
def generators_seeded(value: int) -> Iterator[None]:
    """Start torch's default generators from `value` inside, and restore their states afterwards."""
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(value)
        yield


def _draw() -> int:
    return int(torch.randint(2**62, (), device="cpu").item())


def _mixed(*numbers: int) -> int:
    """Return one 63-bit seed made of several numbers."""
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
