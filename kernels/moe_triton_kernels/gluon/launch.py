"""What the launchers share: descriptors, constants, the grid."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moe_triton_kernels.gluon.names import TensorDescriptor, gl
from moe_triton_kernels.gluon.schedules import BLOCK_K, BLOCK_M, RingTile, Schedule, is_k_contiguous
from moe_triton_kernels.launch import target_of
from moe_triton_kernels.operands import PerExpert


def layout_of(rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def rows_descriptor(a: Tensor) -> TensorDescriptor:
    """Of a contiguous [rows, k], a tile of which is [BLOCK_M, BLOCK_K]."""
    return TensorDescriptor.from_tensor(a, [BLOCK_M, BLOCK_K], layout_of(2))


def weight_block(width: int, k_contiguous: bool) -> list[int]:
    """What one load brings: `width` columns of an expert's matrix, BLOCK_K of each."""
    return [1, width, BLOCK_K] if k_contiguous else [1, BLOCK_K, width]


def weight_descriptor(weight: PerExpert, width: int) -> TensorDescriptor:
    """Of the experts' matrices as they lie in memory, whatever view of it `weight` is."""
    line = max(weight.strides)  # elements from one row in memory to the next: the other stride is 1
    shape = [weight.data.shape[0], weight.layout.stride_e // line, line]
    block = weight_block(width, is_k_contiguous(weight))
    return TensorDescriptor(weight.data, shape, [weight.layout.stride_e, line, 1], block, layout_of(3))


def tile_of(schedule: Schedule, *, group: int, parts: int, size_k: int) -> RingTile:
    """What a kernel is compiled for: the schedule, the column blocks of its epilogue, whether k ends within a block."""
    return RingTile(
        PING_PONG=schedule.ping_pong,
        BLOCK_M=BLOCK_M,
        BLOCK_N=schedule.block_n,
        BLOCK_K=BLOCK_K,
        STAGES=schedule.stages,
        GROUP=group,
        PARTS=parts,
        EVEN_K=size_k % BLOCK_K == 0,
    )


def grid(device: torch.device, max_tiles: int, size_columns: int, width: int) -> tuple[int]:
    """One program per multiprocessor, whose shared memory it fills, and no more than there can be tiles."""
    return (max(1, min(max_tiles * triton.cdiv(size_columns, width), target_of(device).num_sms)),)
