"""Which warp-specialized schedules there are, and whether one can run a given product. Imports no Gluon."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_triton_kernels.activations import Activation
from moe_triton_kernels.compiler import triton_version
from moe_triton_kernels.launch import HOPPER, target_of
from moe_triton_kernels.operands import PerExpert

BLOCK_M, BLOCK_K = 128, 64
# bytes from one coordinate to the next where matrices are tensors of their own. torch allocates by 512; views of one
# buffer begin at any multiple of 16. A coordinate is an int32, so that is 1 TiB and 32 GiB.
STEPS = (512, 16)
REACH = 2**31 - 1
# by their names in tables: what has a warp-specialized kernel
OPS = ("up_gated", "up", "down", "d_hidden_gated", "d_hidden", "d_rows")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# whose derivatives fit in the registers of d_hidden's epilogue; with the others it spills
DERIVATIVES = tuple(map(Activation, ("swiglu", "geglu_tanh", "silu", "gelu_tanh")))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a program's warpgroups share its tiles, of 128 rows in each program of a cluster (see `pipeline`).

    ping_pong  the two consumers take turns at whole tiles; otherwise each takes half of the rows of every tile
    block_n    columns of the experts' matrix in a tile, gate and up together
    stages     depth of the ring, as shared memory allows
    ctas       programs of a cluster, which share the columns that they multiply by (see `cluster`)
    """

    ping_pong: bool
    block_n: int
    stages: int
    ctas: int = 1

    @property
    def block_m(self) -> int:
        """Rows of a tile, of all programs of a cluster together."""
        return BLOCK_M * self.ctas

    @property
    def consumers(self) -> int:
        """How many warpgroups share a tile."""
        return 1 if self.ping_pong else 2


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
    CTAS: int


SCHEDULES = {
    "cooperative": Schedule(ping_pong=False, block_n=256, stages=4),
    "ping_pong": Schedule(ping_pong=True, block_n=128, stages=6),
    "cooperative_cluster": Schedule(ping_pong=False, block_n=256, stages=4, ctas=2),
    "ping_pong_cluster": Schedule(ping_pong=True, block_n=128, stages=6, ctas=2),
}


CLUSTERS_SINCE = (3, 8)  # before, Gluon's arrivals at a barrier stayed within a program


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


def cluster_error() -> str | None:
    """Why this Triton runs no clusters, if it does not."""
    if triton_version()[:2] >= CLUSTERS_SINCE:
        return None
    wanted = ".".join(map(str, CLUSTERS_SINCE))
    return f"clusters of programs (TMA multicast) need Triton {wanted}, this is {triton.__version__}"


def compile_error(name: str) -> str | None:
    """Why this Triton does not compile the schedule of this name, if it does not."""
    return import_error() or (cluster_error() if schedule_of(name).ctas > 1 else None)


def available() -> list[str]:
    """The names of the schedules that this Triton has."""
    return [name for name, schedule in SCHEDULES.items() if schedule.ctas == 1 or cluster_error() is None]


def is_k_contiguous(weight: PerExpert) -> bool:
    """Whether k, and not the columns, lies side by side in the experts' matrices [k, columns]."""
    return weight.strides[0] == 1


def are_dense(weight: PerExpert, size_k: int, size_columns: int) -> bool:
    """Whether the matrices [k, columns], or their transposes, have no gaps, nor, in a stack, any between them."""
    dense = weight.strides in ((1, size_k), (size_columns, 1))
    return dense and (weight.is_table or weight.layout.stride_e == size_k * size_columns)


class Places(NamedTuple):
    """Where the matrices of a table lie: each some steps above the lowest one.

    lowest  number of the expert whose matrix lies lowest
    first   its address
    step    bytes
    steps   how many there are up to the highest one, that one included
    """

    lowest: int
    first: int
    step: int
    steps: int


@lru_cache(maxsize=1024)
def places_of(addresses: tuple[int, ...]) -> Places:
    """Of addresses that are multiples of 16."""
    first, last = min(addresses), max(addresses)
    step = next(step for step in STEPS if all((address - first) % step == 0 for address in addresses))
    return Places(addresses.index(first), first, step, (last - first) // step + 1)


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
    dtype = weight.held[0].dtype if weight.is_table else weight.data.dtype
    if rows.dtype not in TYPES or dtype != rows.dtype:
        return f"{rows.dtype} rows and {dtype} weights, wanted both in one of {', '.join(map(str, TYPES))}"
    if not are_dense(weight, size_k, projections * size_columns):
        return "the experts' matrices are neither one contiguous tensor nor one each"
    if weight.adapter is not None:
        return "an adapter beside the experts' matrices"
    if bias is not None and bias.strides != (1,):
        return "the experts' biases are not contiguous"
    if derivative is not None and derivative not in DERIVATIVES:
        return f"the derivative of {derivative}, wanted that of one of {', '.join(map(str, DERIVATIVES))}"
    if rows.shape[0] == 0:
        return "no rows"
    if size_k % 16 != 0:
        return f"a contraction of {size_k}, wanted a multiple of 16"
    if size_columns % 16 != 0:
        return f"{size_columns} columns, wanted a multiple of 16"
    begins = weight.layout.alignment if weight.is_table else weight.data.data_ptr()
    if rows.data_ptr() % 16 != 0 or begins % 16 != 0:
        return "rows or weights do not begin at a multiple of 16 bytes"
    if weight.is_table and places_of(weight.addresses).steps > REACH:
        return "the experts' matrices lie further apart than a descriptor reaches"
    return compile_error(schedule)
