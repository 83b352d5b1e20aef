"""Which warp-specialized schedules there are, and whether one can run a given product. Imports no Gluon."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from moe_triton_kernels.activations import Activation
from moe_triton_kernels.launch import HOPPER, target_of
from moe_triton_kernels.operands import PerExpert

BLOCK_M, BLOCK_K = 128, 64
# by their names in tables: what has a warp-specialized kernel
OPS = ("up_gated", "up", "down", "d_hidden_gated", "d_hidden", "d_rows")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# whose derivatives fit in the registers of d_hidden's epilogue; with the others it spills
DERIVATIVES = tuple(map(Activation, ("swiglu", "geglu_tanh", "silu", "gelu_tanh")))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a program's warpgroups share its tiles of 128 rows (see `pipeline`).

    ping_pong  the two consumers take turns at whole tiles; otherwise each takes half of the rows of every tile
    block_n    columns of the experts' matrix in a tile, gate and up together
    stages     depth of the ring, as shared memory allows
    """

    ping_pong: bool
    block_n: int
    stages: int


class RingTile(NamedTuple):
    """What a warp-specialized kernel is compiled for (see `pipeline`)."""

    PING_PONG: bool
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    STAGES: int
    GROUP: int
    PARTS: int
    EVEN_K: bool  # BLOCK_K divides the contraction


SCHEDULES = {
    "cooperative": Schedule(ping_pong=False, block_n=256, stages=4),
    "ping_pong": Schedule(ping_pong=True, block_n=128, stages=6),
}


def schedule_of(name: str | None) -> Schedule:
    if name not in SCHEDULES:
        raise ValueError(f"gluon: got {name!r}, wanted None or one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


@lru_cache
def import_error() -> str | None:
    """What is wrong with this version's Gluon, if anything."""
    try:
        importlib.import_module("moe_triton_kernels.gluon.names")
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def is_k_contiguous(weight: PerExpert) -> bool:
    """Whether k, and not the columns, lies side by side in the experts' matrices [k, columns]."""
    return weight.strides[0] == 1


def is_one_stack(weight: PerExpert, size_k: int, size_columns: int) -> bool:
    """Whether the matrices [k, columns], or their transposes, lie one below the other without gaps."""
    dense = weight.strides in ((1, size_k), (size_columns, 1))
    return dense and not weight.is_table and weight.layout.stride_e == size_k * size_columns


def why_unsupported(
    schedule: str | None,
    rows: Tensor,
    weight: PerExpert,
    bias: PerExpert | None,
    *,
    size_columns: int,
    projections: int = 1,
    derivative: Activation | None = None,
) -> str | None:
    """Why the warp-specialized kernels cannot multiply `rows` [., k] by the experts' matrices; None: they can.

    A matrix has as many columns as all its projections (gate and up are two) of `size_columns` each. derivative: the
    activation that d_hidden derives; None for the other operations. ValueError on an unknown schedule. Reads sizes,
    strides and addresses only.
    """
    if schedule is None:
        return "no schedule is chosen"
    schedule_of(schedule)
    size_k = rows.shape[1]
    architecture = target_of(rows.device).architecture
    if architecture not in HOPPER:
        return f"architecture {architecture}, wanted one of {', '.join(HOPPER)}"
    if rows.dtype not in TYPES or (not weight.is_table and weight.data.dtype != rows.dtype):
        return f"{rows.dtype} rows and {weight.data.dtype} weights, wanted both in one of {', '.join(map(str, TYPES))}"
    if not is_one_stack(weight, size_k, projections * size_columns):
        return "the experts' matrices are not one contiguous tensor"
    if weight.adapter is not None:
        return "an adapter beside the experts' matrices"
    if bias is not None and (bias.is_table or bias.strides != (1,)):
        return "the experts' biases are not one tensor with contiguous rows"
    if derivative is not None and derivative not in DERIVATIVES:
        return f"the derivative of {derivative}, wanted that of one of {', '.join(map(str, DERIVATIVES))}"
    if rows.shape[0] == 0:
        return "no rows"
    if size_k % 16 != 0:
        return f"a contraction of {size_k}, wanted a multiple of 16"
    if size_columns % 16 != 0:
        return f"{size_columns} columns, wanted a multiple of 16"
    if rows.data_ptr() % 16 != 0 or weight.data.data_ptr() % 16 != 0:
        return "rows or weights do not begin at a multiple of 16 bytes"
    return import_error()
