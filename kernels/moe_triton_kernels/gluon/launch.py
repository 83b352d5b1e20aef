"""What the launchers share: descriptors, constants, the grid."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from moe_triton_kernels.gluon.cluster import matrix_in_memory, rows_in_memory
from moe_triton_kernels.gluon.names import TensorDescriptor
from moe_triton_kernels.gluon.schedules import BLOCK_K, RingTile, Schedule, is_k_contiguous, places_of
from moe_triton_kernels.launch import constant, target_of
from moe_triton_kernels.operands import PerExpert
from moe_triton_kernels.tiles import TilesArgument, TileTables, tile_tables


def rows_block(schedule: Schedule) -> list[int]:
    """What one load brings of A: the rows of one consumer."""
    return [schedule.block_m // schedule.consumers, BLOCK_K]


def rows_descriptor(a: Tensor, schedule: Schedule) -> TensorDescriptor:
    """Of a contiguous [rows, k]."""
    return TensorDescriptor.from_tensor(a, rows_block(schedule), rows_in_memory(schedule.ctas))


def weight_block(width: int, k_contiguous: bool) -> list[int]:
    """What one load brings: `width` columns of an expert's matrix, BLOCK_K of each."""
    return [1, width, BLOCK_K] if k_contiguous else [1, BLOCK_K, width]


class PlacesArgument(NamedTuple):
    """Where the matrices of a table lie, among a kernel's arguments.

    table  pointer to their addresses [E] in int64
    first  the lowest of them, where the descriptor begins
    STEP   bytes from one coordinate of the descriptor's first dimension to the next
    """

    table: Any
    first: Any
    STEP: Any


def weight_arguments(
    weight: PerExpert, width: int, schedule: Schedule
) -> tuple[TensorDescriptor, PlacesArgument | None]:
    """The experts' matrices as they lie in memory, whatever view of it `weight` is.

    A descriptor [E, rows, columns], and None. Of a table the descriptor begins with the matrix that lies lowest, and
    has as many steps in place of E as lead to the highest one: beside it is what makes coordinates of addresses.
    """
    line = max(weight.strides)  # elements from one row in memory to the next: the other stride is 1
    block = weight_block(width, is_k_contiguous(weight))
    if weight.is_table:
        places = places_of(weight.addresses)
        base, size, step = weight.held[places.lowest], places.steps, places.step // weight.layout.itemsize
        rows, argument = base.numel() // line, PlacesArgument(weight.data, places.first, constant(places.step))
    else:
        base, size, step = weight.data, weight.data.shape[0], weight.layout.stride_e
        rows, argument = step // line, None
    layout = matrix_in_memory(schedule.ctas)
    return TensorDescriptor(base, [size, rows, line], [step, line, 1], block, layout), argument


def tile_of(schedule: Schedule, *, group: int, parts: int, size_k: int) -> RingTile:
    """What a kernel is compiled for: the schedule, the column blocks of its epilogue, whether k ends within a block."""
    return RingTile(
        PING_PONG=schedule.ping_pong,
        BLOCK_M=schedule.block_m,
        BLOCK_N=schedule.block_n,
        BLOCK_K=BLOCK_K,
        STAGES=schedule.stages,
        GROUP=group,
        PARTS=parts,
        EVEN_K=size_k % BLOCK_K == 0,
        CTAS=schedule.ctas,
    )


def select_tiles(tiles: TileTables, schedule: Schedule, num_rows: int) -> tuple[TilesArgument, int]:
    """As `TileTables.select`. No table has a cluster's tiles: one launch more makes it."""
    if schedule.ctas > 1:
        tiles = tile_tables(tiles.offsets, num_rows, (schedule.block_m,))
    return tiles.select(schedule.block_m)


def grid(device: torch.device, schedule: Schedule, max_tiles: int, size_columns: int, width: int) -> tuple[int]:
    """One program of a cluster per multiprocessor, whose shared memory it fills; no more clusters than tiles."""
    clusters = target_of(device).num_sms // schedule.ctas
    return (max(1, min(max_tiles * triton.cdiv(size_columns, width), clusters)),)
