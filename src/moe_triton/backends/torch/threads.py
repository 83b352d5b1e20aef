"""Threads that share a loop which runs without Python's lock: as many as torch's, started at the first need."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from moe_triton.torch_internals import openmp_parallel

_pool: ThreadPoolExecutor | None = None


def share(run: Callable[[int, int], object], size: int, least: int) -> None:
    """Call run(first, last) for ranges that together are range(size), in several threads where each gets `least`.

    The calling thread runs one of the ranges, and returns when all have ended. An exception in any is raised here.
    """
    count = max(min(torch.get_num_threads(), size // max(least, 1)), 1)
    bounds = [size * i // count for i in range(count + 1)]
    others = [_workers().submit(run, *bounds[i : i + 2]) for i in range(1, count)]
    try:
        run(0, bounds[1])
    finally:
        for other in others:
            other.result()


def knows_torchs_threads() -> bool:
    """Return whether `on_all_threads` runs on all of them."""
    return torch.get_num_threads() == 1 or openmp_parallel() is not None


def on_all_threads(function: int, data: int, pieces: int | None = None) -> None:
    """Call a compiled function, of which `function` is the address, with the address `data` on all of torch's threads.

    Where torch's library of threads is not known to us, or there is one piece of work only, on the calling thread.
    """
    parallel = openmp_parallel()
    if parallel is None or (pieces is not None and pieces <= 1):
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)
    else:
        parallel(function, data, torch.get_num_threads(), 0)


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="moe_triton")
    return _pool


def _forget() -> None:
    """A forked process has none of the threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
