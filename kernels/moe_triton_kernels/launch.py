"""How a grouped kernel is launched: the configuration, the device, the constants and the grid that follow from both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from moe_triton_kernels.compiler import compiler_fences

# their matrix units read shared memory through the asynchronous proxy
HOPPER, BLACKWELL = ("sm_90",), ("sm_100", "sm_103")
MAX_REGISTERS = 255  # that one thread can have
# bytes of shared memory that one program can have; elsewhere as little as anywhere
SHARED_BYTES = {
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_103": 232448,
    "sm_120": 101376, "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip
Constants = TypeVar("Constants", bound=tuple[Any, ...])
Launch = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one grouped kernel is launched.

    block_m, block_n, block_k   rows, columns and contraction of a tile; the gated up projection computes block_n
                                columns of gate and of up. For d_weight, block_m by block_n of the gradient, and
                                block_k rows
    num_warps, num_stages       launch options of Triton
    group                       tile rows that are walked through before the next tile column (L2 reuse)
    parts                       column blocks that the epilogue works through one after another (1, 2 or 4)
    programs_per_sm             resident programs per multiprocessor: bounds the persistent grid
    gluon                       the warp-specialized schedule to run instead where it can (a key of gluon.schedules), in
                                blocks of its own; only ever from the table, where a GPU measured it faster
    descriptors                 weights, and rows that are not gathered, come by tensor descriptors (TMA) where their
                                layout allows it
    maxnreg                     registers per thread at most (NVIDIA): with fewer, more programs are resident
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    parts: int = 1
    programs_per_sm: int = 1
    gluon: str | None = None
    descriptors: bool = False
    maxnreg: int = MAX_REGISTERS

    def __hash__(self) -> int:
        """Of a few fields that tell most configurations apart: launches look up what follows from one."""
        return hash((self.block_m, self.block_n, self.block_k, self.num_warps, self.num_stages))


class Tile(NamedTuple):
    """What a grouped kernel is compiled for: the fields of its `Config` that it reads.

    A kernel's argument is a tuple of constants, made by `constants`: as a tl.constexpr argument, its fields would be
    plain numbers, which Triton does not take everywhere.

    FENCE  a kernel with 16-bit operands has to put the proxy fence itself (see `grouped_gemm`)
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    PARTS: int
    FENCE: bool


class Target(NamedTuple):
    """What kernels run on: an architecture name ("sm_90", "gfx942", "interpreter") and its multiprocessors."""

    architecture: str
    num_sms: int


@lru_cache
def target_of(device: torch.device) -> Target:
    """The target of a device. TRITON_INTERPRET makes everything the interpreter; a CPU without it is a ValueError."""
    if triton.knobs.runtime.interpret:
        return Target(architecture="interpreter", num_sms=3)  # few programs, and more tiles than programs
    if device.type != "cuda":
        raise ValueError(f"device: got {device}, wanted a GPU, or TRITON_INTERPRET=1 set before triton is imported")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return Target(architecture=name, num_sms=properties.multi_processor_count)


def tile_of(architecture: str, config: Config) -> Tile:
    """What a kernel is compiled for on this architecture."""
    return Tile(
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        PARTS=config.parts,
        FENCE=architecture in HOPPER and config.block_m >= 64 and not compiler_fences(),
    )


@lru_cache(maxsize=4096, typed=True)
def constants(values: Constants) -> Constants:
    """The NamedTuple as an argument of a kernel that is compiled for its values."""
    return type(values)(*map(tl.constexpr, values))


@lru_cache(maxsize=4096, typed=True)
def constant(value: Any) -> tl.constexpr:
    """One value that a kernel is compiled for."""
    return tl.constexpr(value)


def pipeline_stages(architecture: str, config: Config) -> int:
    """The configuration's stages; 1 on Blackwell before Triton 3.7.1, where the pipelined loop has no proxy fence."""
    return 1 if architecture in BLACKWELL and not compiler_fences() else config.num_stages


def launch_options(device: torch.device, config: Config) -> dict[str, Any]:
    """The keyword arguments of a launch that follow from the configuration: TILE, num_warps, num_stages, maxnreg."""
    return _options(target_of(device).architecture, config, compiler_fences())


@lru_cache(maxsize=1024)
def _options(architecture: str, config: Config, _fences: bool) -> dict[str, Any]:
    return {
        "TILE": constants(tile_of(architecture, config)),
        "num_warps": config.num_warps,
        "num_stages": pipeline_stages(architecture, config),
        **register_limit(architecture, config.maxnreg),
    }


def prepare(kernel: Any, grid: tuple[int, ...], **constants: Any) -> Launch:
    """kernel[grid], with these keyword arguments, to be called many times: it calls no Python before the launch."""
    return partial(kernel.run, grid=grid, warmup=False, **constants)


def register_limit(architecture: str, maxnreg: int) -> dict[str, int]:
    """Triton's option for the registers per thread, where it has one and there is less than can be."""
    return {"maxnreg": maxnreg} if architecture.startswith("sm_") and maxnreg < MAX_REGISTERS else {}


def shared_limit(architecture: str) -> int:
    """Bytes of shared memory that one program can have."""
    return SHARED_BYTES.get(architecture, min(SHARED_BYTES.values()))


def persistent_grid(device: torch.device, max_tiles: int, config: Config) -> tuple[int]:
    """As many programs as the device holds at once, and no more than there can be tiles."""
    return (max(1, min(max_tiles, target_of(device).num_sms * config.programs_per_sm)),)
