"""What the launchers share: descriptors, constants, the grid."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moe_triton_kernels.gluon.names import TensorDescriptor, gl
from moe_triton_kernels.gluon.schedules import BLOCK_K, BLOCK_M, RingTile, Schedule, is_k_contiguous
from moe_triton_kernels.launch import target_of
from moe_triton_kernels.operands import PerExpert

LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


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


def tile_of(schedule: Schedule, *, group: int, parts: int) -> RingTile:
    """What a kernel is compiled for: the schedule, and the column blocks of the operation's epilogue."""
    return RingTile(
        PING_PONG=schedule.ping_pong,
        BLOCK_M=BLOCK_M,
        BLOCK_N=schedule.block_n,
        BLOCK_K=BLOCK_K,
        STAGES=schedule.stages,
        GROUP=group,
        PARTS=parts,
    )


def grid(device: torch.device, max_tiles: int, size_columns: int, width: int) -> tuple[int]:
    """One program per multiprocessor, whose shared memory it fills, and no more than there can be tiles."""
    return (max(1, min(max_tiles * triton.cdiv(size_columns, width), target_of(device).num_sms)),)
