"""Whether the compiled loops (`loops` and its neighbours) run on this CPU, and how tensors become their arguments."""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import torch
from torch import Tensor

from moe_triton.backends.torch.processor import Processor
from moe_triton.backends.torch.threads import knows_torchs_threads
from moe_triton.checks import check_choice

VARIABLE = "MOE_TRITON_CPU_LOOPS"
DTYPES = (torch.float32, torch.bfloat16)  # that the loops write
# as numpy names them; where it lacks one, unsigned integers of as many bits
TYPES = {
    torch.float32: "<f4", torch.float64: "<f8", torch.bfloat16: "<u2", torch.float16: "<u2", torch.float8_e4m3fn: "|u1",
    torch.uint8: "|u1", torch.int8: "|i1", torch.int32: "<i4", torch.int64: "<i8", torch.bool: "|b1",
}  # fmt: skip
WORTH_A_THREAD = 1 << 19  # numbers to decode: 0.1 ms, some times what it takes to wake a thread


def loops_problem() -> str | None:
    """Return why the compiled loops do not run; None where they do.

    Raises ValueError where MOE_TRITON_CPU_LOOPS is neither 0 (they do not) nor 1.
    """
    return _problem(os.environ.get(VARIABLE, "1"))


@cache
def _problem(value: str) -> str | None:
    """`loops_problem` where the variable has this value."""
    check_choice(VARIABLE, value, ("0", "1"))
    if value == "0":
        return f"{VARIABLE}=0"
    try:
        import moe_triton.backends.torch.loops  # noqa: F401
    except ImportError as error:  # numba is an extra, and its versions go with some of numpy only
        return f"numba cannot be imported ({error}); pip install moe-triton[cpu]"
    return None


def runs_on_threads(dtype: torch.dtype) -> bool:
    """Return whether loops over rows of a dtype run, and on all of torch's threads."""
    return dtype in DTYPES and knows_torchs_threads() and loops_problem() is None


def multiplies_pairs(processor: Processor) -> bool:
    """Return whether loops may use the instruction of a processor that multiplies pairs of bf16."""
    if loops_problem() is not None or not processor.has("avx512_bf16"):
        return False
    from moe_triton.backends.torch.loops import compiles_for_another

    return not compiles_for_another()


def loops_in_words() -> str:
    """Return whether the compiled loops run, and for what, in words."""
    problem = loops_problem()
    if problem is not None:
        return f"none ({problem})"
    return (
        "by numba, for routing and dispatch, gathers and sums of rows, gated activations, the experts of few rows, "
        "quantised projections, and on processors with AVX-512 adapters and, by policy, products"
    )


def codes_in_words(dtype: torch.dtype) -> str:
    """Return what decodes quantised projections on the CPU to a dtype, in words."""
    problem = loops_problem() or ("" if dtype in DTYPES else f"the compiled loops write no {dtype}")
    if problem:
        return f"decoded by torch, in parts that stay in cache: {problem}"
    return "decoded by compiled loops (numba), with few rows inside their product, else in parts that stay in cache"


class _Memory:
    """A CPU tensor as numpy reads it. After `Tensor.numpy` torch would not resize the storage, as FSDP2 does."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x  # lives as long as the array
        size, memory = x.element_size(), (x.data_ptr(), False)
        strides = tuple(stride * size for stride in x.stride())
        self.__array_interface__ = {
            "data": memory, "shape": tuple(x.shape), "strides": strides, "typestr": TYPES[x.dtype], "version": 3,
        }  # fmt: skip


def data(x: Tensor) -> np.ndarray:
    """Return the numbers of a tensor that a loop reads: dense, so that it is compiled for one layout."""
    return np.asarray(_Memory(x.detach().contiguous()))


def array(x: Tensor) -> np.ndarray:
    """Return the array of a tensor; where numpy lacks its dtype, that of its bits as unsigned integers."""
    return np.asarray(_Memory(x))
