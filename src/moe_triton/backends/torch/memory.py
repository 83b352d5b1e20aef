"""Memory for large CPU tensors that is used again once they are gone.

The system takes freed memory back at once, and faulting in the pages of a new buffer costs as much as a product over
it. So a training step's gradients and rows get the memory of the step before. MOE_TRITON_MEMORY_POOL=0 turns this off.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import defaultdict, deque

import numpy as np
import torch
from torch import Tensor

from moe_triton.checks import check_choice

LARGE = 1 << 20  # bytes; smaller tensors are torch's own
ALIGNMENT = 64  # bytes; a cache line, which is what torch's own memory is aligned to
LEAST_KEPT, SHARE_KEPT = 1 << 30, 8  # bytes of idle memory that are kept, or a part of the machine's if this is more


def most_idle() -> int:
    """Return how many bytes of idle memory are kept: between two steps, the gradients of a large layer."""
    try:
        return max(LEAST_KEPT, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // SHARE_KEPT)
    except (AttributeError, OSError, ValueError):  # a system that does not say
        return LEAST_KEPT


MOST_IDLE = most_idle()

_idle: defaultdict[int, deque[np.ndarray]] = defaultdict(deque)  # by size; its single operations are atomic


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU, in used memory where the tensor is large and there is some."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not is_on():
        return torch.empty(shape, dtype=dtype)
    total = size_class(size + ALIGNMENT)
    try:
        memory = _idle[total].pop()  # the one that was given back last is the likeliest to be in cache
    except IndexError:
        memory = np.empty(total, dtype=np.uint8)
    lent = memory[:]
    weakref.finalize(lent, _give_back, memory).atexit = False  # runs when the last tensor on it is gone
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(lent)[start : start + size].view(dtype).view(shape)


def is_on() -> bool:
    """Return whether memory is used again: yes, unless the environment says MOE_TRITON_MEMORY_POOL=0."""
    value = os.environ.get("MOE_TRITON_MEMORY_POOL", "1")
    check_choice("MOE_TRITON_MEMORY_POOL", value, ("0", "1"))
    return value == "1"


def size_class(size: int) -> int:
    """`size` rounded up by an eighth at most, so that nearby sizes share memory."""
    step = 1 << max(size.bit_length() - 4, 0)
    return -(-size // step) * step


def _give_back(memory: np.ndarray) -> None:
    idle = sum(size * len(kept) for size, kept in list(_idle.items()))
    if idle + memory.nbytes <= MOST_IDLE:
        _idle[memory.nbytes].append(memory)
