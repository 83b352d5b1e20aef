"""What the launchers share, on a GPU and offline: descriptors, constants, the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from moe_triton_kernels.configs import target_of
from moe_triton_kernels.gluon.names import TensorDescriptor, gl
from moe_triton_kernels.gluon.schedules import BLOCK_K, BLOCK_M, SCHEDULES, TYPES, Schedule, is_k_contiguous
from moe_triton_kernels.grouped_gemm import PerExpert
from moe_triton_kernels.offline import Case

LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
TILES = dict.fromkeys(("source", "table", "num_tiles", "offsets"), "*i32")


def rows_descriptor(a: Tensor) -> TensorDescriptor:
    """Of a contiguous [rows, k], a tile of which is [BLOCK_M, BLOCK_K]."""
    return TensorDescriptor.from_tensor(a, [BLOCK_M, BLOCK_K], LAYOUT)


def weight_block(width: int, k_contiguous: bool) -> list[int]:
    """What one load brings: `width` columns of the experts' matrices, BLOCK_K of each."""
    return [width, BLOCK_K] if k_contiguous else [BLOCK_K, width]


def weight_descriptor(weight: PerExpert, width: int) -> TensorDescriptor:
    """Of the experts' matrices, one below the other as they lie in memory, whatever view of it `weight` is."""
    line = max(weight.strides)  # elements from one row in memory to the next: the other stride is 1
    shape = [weight.data.numel() // line, line]
    return TensorDescriptor(weight.data, shape, [line, 1], weight_block(width, is_k_contiguous(weight)), LAYOUT)


def block_constants(schedule: Schedule, *, group: int, parts: int) -> dict[str, int | bool]:
    """The constexpr arguments that follow from the schedule and from the operation's epilogue."""
    return {
        "PING_PONG": schedule.ping_pong,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": schedule.block_n,
        "BLOCK_K": BLOCK_K,
        "STAGES": schedule.stages,
        "GROUP": group,
        "PARTS": parts,
    }


def grid(device: torch.device, max_tiles: int, size_columns: int, width: int) -> tuple[int]:
    """One program per multiprocessor, whose shared memory it fills, and no more than there can be tiles."""
    return (max(1, min(max_tiles * triton.cdiv(size_columns, width), target_of(device).num_sms)),)


def offline_case(
    fn: Any,
    op: str,
    schedule: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    variant: str,
    width: int,
    parts: int,
    descriptors: Mapping[str, Sequence[int]],
    pointers: Mapping[str, str],
    sample: bool = False,
    **constants: Any,
) -> Case:
    """A kernel in one schedule: `descriptors` gives the block of each; sizes are multiples of 16."""
    form = SCHEDULES[schedule]
    constexprs = {**constants, **block_constants(form, group=8, parts=parts)}
    stored = TYPES[dtype]
    signature = {name: f"tensordesc<{stored}{list(block)},{LAYOUT!r}>" for name, block in descriptors.items()}
    signature |= {**pointers, **TILES}
    numbers = [name for name in fn.arg_names if name not in signature and name not in constexprs]
    is_gathered = "a" not in descriptors
    return Case(
        name=f"{op}_{stored}_{BLOCK_M}x{width}x{BLOCK_K}_{schedule}_{variant}",
        fn=fn,
        signature={**signature, **dict.fromkeys(numbers, "i32")},
        constexprs=constexprs,
        num_warps=4,
        aligned=[*pointers, "source", "table", "offsets", *numbers],
        sample=sample,
        wants=["wgmma", "tma", "setmaxnreg", "proxy_fence", *(["cp_async"] if is_gathered else [])],
    )
