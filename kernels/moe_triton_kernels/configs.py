"""Which block sizes a grouped kernel runs with: tables of measured entries (the user's, then the shipped one), and a
heuristic behind them.

A configuration is keyed by (op, d, n, dtype, architecture, bucket of rows per expert). Rows per expert is the average
S / E of the static sizes: it is known without asking the device and takes few values, so neither a host sync nor a
recompilation follows from a new number of tokens. Nothing is tuned at run time: every rank picks the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from moe_triton_kernels.offline import Case

OPS = ("up_gated", "up", "down", "d_hidden_gated", "d_hidden", "d_rows", "d_weight")
DECODED = ("up_gated", "up", "down")  # the kernels of a forward pass
BUCKETS = (16, 32, 64, 128)  # rows per expert: up to 16, up to 32, up to 64, more; also the rows of a tile
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# (d, n) of the benchmarks' shapes: sonic-12, the published models, and the granularity sweep at d = 4096
MODEL_SIZES = (
    *((768, n) for n in (256, 512, 1024)),
    *((1536, n) for n in (256, 512, 1024)),
    *((4096, n) for n in (256, 512, 1024, 1536, 2048, 4096, 8192, 14336)),
    *((2048, n) for n in (768, 1024)),
    (2880, 2880),
    (7168, 2048),
)
TABLE = Path(__file__).with_name("configs.json")
# their matrix units read shared memory through the asynchronous proxy
HOPPER, BLACKWELL = ("sm_90",), ("sm_100", "sm_103")


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
    descriptors                 weights come by tensor descriptors (TMA) where their layout allows it
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


@dataclass(frozen=True, kw_only=True)
class Target:
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


def triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3] if part.isdigit())


def compiler_fences() -> bool:
    """True where Triton itself puts a proxy fence between cp.async and the matrix unit (see grouped_gemm)."""
    return triton_version() >= (3, 7, 1)


def bucket_of(rows_per_expert: float) -> int:
    """The smallest bucket that holds the average number of rows per expert; the last one is open-ended."""
    return next((bucket for bucket in BUCKETS if rows_per_expert <= bucket), BUCKETS[-1])


Table = Mapping[tuple[Any, ...], Config]  # by KEYS
KEYS = ("op", "d", "n", "dtype", "architecture", "bucket")


def read_table(path: Path) -> Table:
    """A table file, a JSON list of objects with KEYS and "config"; ValueError, naming the file, where it is broken."""
    try:
        return {tuple(entry[key] for key in KEYS): Config(**entry["config"]) for entry in json.loads(path.read_text())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"table {path}: {type(error).__name__}: {error}") from error


@lru_cache
def shipped_table() -> Table:
    """configs.json, which comes with the kernels."""
    return read_table(TABLE)


def user_table_path() -> Path | None:
    """Where this user's own table lies, as `moe-triton tune` writes it.

    MOE_TRITON_TABLE names it (empty: none is read); else it is moe_triton/configs.json under $XDG_CONFIG_HOME, which
    is ~/.config by default.
    """
    named = os.environ.get("MOE_TRITON_TABLE")
    if named is not None:
        return Path(named) if named else None
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "moe_triton" / "configs.json"


@lru_cache
def user_table() -> Table:
    """The user's own table, which goes before the shipped one; read once. Empty where there is none."""
    path = user_table_path()
    if path is None or (not path.exists() and "MOE_TRITON_TABLE" not in os.environ):
        return {}
    return read_table(path)


def find_config(
    op: str, *, d: int, n: int, dtype: torch.dtype, num_rows: int, num_experts: int, architecture: str
) -> tuple[Config, str]:
    """The configuration for this case and where it is from: "user table", "shipped table" or "heuristic".

    ValueError on an unknown op, and on a table that is broken.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, wanted one of {', '.join(OPS)}")
    bucket = bucket_of(num_rows / max(num_experts, 1))
    key = (op, d, n, str(dtype).removeprefix("torch."), architecture, bucket)
    for table, origin in ((user_table(), "user table"), (shipped_table(), "shipped table")):
        if key in table:
            return table[key], origin
    return heuristic(op, d, n, dtype.itemsize, architecture, bucket), "heuristic"


def choose_config(
    op: str, *, d: int, n: int, dtype: torch.dtype, num_rows: int, num_experts: int, architecture: str
) -> Config:
    """`find_config` without the origin."""
    return find_config(
        op, d=d, n=n, dtype=dtype, num_rows=num_rows, num_experts=num_experts, architecture=architecture
    )[0]


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """One configuration that a GPU can meet: the op, Triton's name of the dtype, and the configuration."""

    op: str
    dtype: str
    config: Config


def shipped_configs(architecture: str) -> list[Shipped]:
    """Every configuration of the table and of the heuristic at the sizes of common models, without repetitions.

    fp16 shares bf16's configurations. The first entry of an op is the one of large bf16 problems.
    """
    found: dict[Shipped, None] = {}
    for op in OPS:
        for dtype in (torch.bfloat16, torch.float32):
            for bucket in reversed(BUCKETS):
                for d, n in MODEL_SIZES:
                    config = choose_config(
                        op, d=d, n=n, dtype=dtype, num_rows=bucket, num_experts=1, architecture=architecture
                    )
                    plain = replace(config, gluon=None)  # the Gluon kernels list their own cases
                    found[Shipped(op=op, dtype=TYPES[dtype], config=plain)] = None
    return list(found)


def fit(block: int, size: int) -> int:
    """The block, no wider than the size needs (a power of two, 16 at least, as the matrix unit wants)."""
    return min(block, max(16, triton.next_power_of_2(size)))


def heuristic(op: str, d: int, n: int, itemsize: int, architecture: str, bucket: int) -> Config:
    """Tiles as large as the accumulator registers allow without a spill; shorter ones where experts have few rows."""
    if architecture == "interpreter":
        return Config(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=1, group=2)
    width, contraction = (d, n) if op in ("down", "d_rows") else (n, d)
    if op == "d_weight":
        config = weight_gradient_tile(itemsize, architecture)
        config = replace(config, block_m=fit(config.block_m, min(d, n)), block_n=fit(config.block_n, max(d, n)))
    else:
        if itemsize == 4:
            config = fp32_tile(op, bucket)
        elif bucket == BUCKETS[-1]:
            config = large_tile(op, architecture)
        elif bucket == BUCKETS[0] and op in DECODED:
            config = decode_tile(op, contraction, architecture)
        else:
            config = small_tile(op, bucket)
        block_n = fit(config.block_n, width)
        parts = min(config.parts, block_n // 16)
        # d_hidden's loop over 32 rows is shorter with pointers (73 instructions and 88); no other loop is
        shorter = op not in ("d_hidden", "d_hidden_gated") or config.block_m != 32
        descriptors = itemsize == 2 and architecture in HOPPER + BLACKWELL and shorter
        block_k = fit(config.block_k, contraction)
        config = replace(config, block_n=block_n, block_k=block_k, parts=parts, descriptors=descriptors)
    return replace(config, num_stages=2) if architecture.startswith("gfx") else config


def fp32_tile(op: str, bucket: int) -> Config:
    """No matrix unit multiplies in full fp32: the tile is as large as one multiply-add per element keeps busy."""
    block_m = min(bucket, 64)
    block_n = 32 if op == "up_gated" else 64
    return Config(block_m=block_m, block_n=block_n, block_k=32, num_warps=block_m // 8, num_stages=2, parts=4)


def large_tile(op: str, architecture: str) -> Config:
    wide = architecture in HOPPER + BLACKWELL
    block_n = 256 if wide else 128
    if op == "up_gated":
        block_n //= 2
    elif op in ("d_hidden_gated", "d_hidden"):
        block_n = 128
    parts = 2 if op in ("down", "d_rows") else 4
    # Of N stages N - 1 are on the way, for at least N - 2 steps. Hopper multiplies 128x256x64 in 0.6 us, 128x128x64 in
    # half of that, and memory answers in about 0.8 us: 2 steps cover it, or 3 of the short ones.
    stages = (5 if block_n == 128 and op != "up_gated" else 4) if wide else 3
    return Config(block_m=128, block_n=block_n, block_k=64, num_warps=8, num_stages=stages, parts=parts)


def small_tile(op: str, bucket: int) -> Config:
    warps = 8 if op in ("d_hidden_gated", "d_hidden") else 4  # its epilogue needs many registers
    block_n = 64 if op == "up_gated" else 128
    return Config(
        block_m=bucket, block_n=block_n, block_k=64, num_warps=warps, num_stages=4, parts=4, programs_per_sm=2
    )


def decode_tile(op: str, contraction: int, architecture: str) -> Config:
    """With a few rows per expert the time is that of reading each touched expert's weights once: a tile made for it.

    A GPU delivers its bandwidth to those who have about 4 MB on the way (4.3 TB/s times 0.9 us, both of an H200). One
    token touches K experts only; with 64 columns a tile, half as many as for more rows, their tiles still ask for that
    much in every model of MODEL_SIZES that has K > 1. Splitting the contraction would cost partial sums and a launch.
    """
    block_k, num_stages = (128, 4) if contraction % 128 == 0 else (64, 6)  # long runs, but no masked steps
    return Config(
        block_m=BUCKETS[0],
        block_n=32 if op == "up_gated" else 64,
        block_k=block_k,
        num_warps=4,
        num_stages=num_stages,
        programs_per_sm=3 if architecture in HOPPER + BLACKWELL else 2,
    )


def weight_gradient_tile(itemsize: int, architecture: str) -> Config:
    if itemsize == 4:
        return Config(block_m=64, block_n=64, block_k=32, num_warps=8, num_stages=2)
    if architecture in HOPPER + BLACKWELL:  # the load of the row index takes one stage more than the products need
        return Config(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4)
    return Config(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=4)


def block_constants(architecture: str, config: Config) -> dict[str, int | bool]:
    """The constexpr arguments of a grouped kernel that follow from the configuration."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "PARTS": config.parts,
        "FENCE": architecture in HOPPER and not compiler_fences(),
    }


def pipeline_stages(architecture: str, config: Config) -> int:
    """The configuration's stages; 1 on Blackwell before Triton 3.7.1, where the pipelined loop has no proxy fence."""
    return 1 if architecture in BLACKWELL and not compiler_fences() else config.num_stages


def launch_options(device: torch.device, config: Config) -> dict[str, int | bool]:
    """The keyword arguments of a launch that follow from the configuration."""
    architecture = target_of(device).architecture
    stages = pipeline_stages(architecture, config)
    return {**block_constants(architecture, config), "num_warps": config.num_warps, "num_stages": stages}


def persistent_grid(device: torch.device, max_tiles: int, config: Config) -> tuple[int]:
    """As many programs as the device holds at once, and no more than there can be tiles."""
    return (max(1, min(max_tiles, target_of(device).num_sms * config.programs_per_sm)),)


def main_loop_instructions(shipped: Shipped, arch: str) -> list[str]:
    """What the main loop has to compile to: matrix instructions for 16-bit types, asynchronous copies before Blackwell.

    wgmma takes 64 rows at least. On Blackwell the copies depend on `pipeline_stages`.
    """
    wants = ["cp_async"] if arch in ("sm_80", "sm_90") else []
    if shipped.dtype != "fp32":
        wants.append("wgmma" if arch == "sm_90" and shipped.config.block_m >= 64 else "mma")
    return wants


def offline_case(
    fn: Any,
    shipped: Shipped,
    arch: str,
    *,
    variant: str,
    pointers: Mapping[str, str],
    unit_strides: Sequence[str] = (),
    sample: bool = False,
    **constants: Any,
) -> Case:
    """A grouped kernel at a shipped configuration: sizes and strides are multiples of 16, `unit_strides` are 1."""
    config = shipped.config
    constexprs = {**constants, **block_constants(arch, config), **dict.fromkeys(unit_strides, 1)}
    numbers = [name for name in fn.arg_names if name not in pointers and name not in constexprs]
    aligned = [name for name in numbers if name.startswith(("size_", "weight_stride_"))]
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    addresses = [name for name, kind in pointers.items() if kind.startswith("*") and name != "num_tiles"]
    return Case(
        name=f"{shipped.op}_{shipped.dtype}_{tile}_{variant}",
        fn=fn,
        signature={**pointers, **dict.fromkeys(numbers, "i32")},
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=pipeline_stages(arch, config),
        aligned=[*addresses, *aligned],
        sample=sample,
        wants=[*main_loop_instructions(shipped, arch), *(["tma"] if constants.get("DESCRIPTOR") else [])],
    )
