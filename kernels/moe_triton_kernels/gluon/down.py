"""Rows times the experts' matrices, warp-specialized: what `moe_triton_kernels.down` computes, all of it by TMA."""

from __future__ import annotations

from torch import Tensor

from moe_triton_kernels.gluon.launch import grid, rows_descriptor, select_tiles, tile_of, weight_arguments
from moe_triton_kernels.gluon.names import gl, gluon
from moe_triton_kernels.gluon.pipeline import (
    Work,
    consumer_tiles,
    count_tiles,
    locate,
    make_ring,
    multiply,
    produce,
    store_block,
    store_layout,
)
from moe_triton_kernels.gluon.schedules import Schedule, is_k_contiguous, schedule_of
from moe_triton_kernels.grouped_gemm import split_columns
from moe_triton_kernels.launch import Config, constants
from moe_triton_kernels.operands import PerExpert, add_bias, expert_base
from moe_triton_kernels.tiles import TileTables


@gluon.jit
def consume(CONSUMER: gl.constexpr, work, ring, bias, router_weights, source, out):
    """A consumer partition: (product + bias) * router weight, of its tiles or of its half of every tile."""
    DTYPE: gl.constexpr = out.dtype.element_ty
    PART: gl.constexpr = work.BLOCK_N // work.PARTS
    STORE: gl.constexpr = store_layout(PART, work.CTAS)
    num_m, num_n = count_tiles(work)
    first, stride, number = consumer_tiles(work, CONSUMER)
    for tile in range(first, num_m * num_n, stride):
        expert, first_row, end_row, tile_n = locate(work, tile, num_m, num_n)
        acc = multiply(work, ring, CONSUMER, number, end_row - first_row)
        if work.PING_PONG:
            number += 2
        else:
            number += 1
            first_row += CONSUMER * work.ROWS
        b = None if bias is None else expert_base(bias, expert, DTYPE)
        if router_weights is not None:
            slot_rows = first_row + gl.arange(0, work.ROWS, layout=gl.SliceLayout(1, acc.type.layout))
            slots = gl.load(source + gl.minimum(slot_rows, end_row - 1))
            scale = gl.load(router_weights + slots).to(gl.float32)
        rows = first_row + gl.arange(0, work.ROWS, layout=gl.SliceLayout(1, STORE))
        out_rows = out + rows.to(gl.int64) * work.size_columns
        blocks = split_columns(acc, work.PARTS)
        for i in gl.static_range(work.PARTS):
            n0 = tile_n * work.BLOCK_N + i * PART
            columns = n0 + gl.arange(0, PART, layout=gl.SliceLayout(0, blocks[i].type.layout))
            value = add_bias(blocks[i], bias, b, columns, columns < work.size_columns)
            if router_weights is not None:
                value *= gl.convert_layout(scale, gl.SliceLayout(1, blocks[i].type.layout))[:, None]
            store_block(out_rows, rows < end_row, n0, work.size_columns, value.to(DTYPE), STORE)


@gluon.jit
def down_kernel(
    a,  # descriptor [S, k]
    weight,  # descriptor [E, columns, k] or [E, k, columns]
    places,  # of a table's matrices (PlacesArgument), or None
    bias,  # per expert [columns], or None
    router_weights,  # [T * K], or None
    source,  # [S], or None
    out,  # [S, columns]
    tiles,
    size_k,
    size_columns,
    K_CONTIGUOUS: gl.constexpr,
    TILE,
):
    work = Work(tiles, size_k, size_columns, False, False, K_CONTIGUOUS, TILE)
    ring = make_ring(work, out.dtype.element_ty, 0)
    gl.warp_specialize(
        [
            (consume, (0, work, ring, bias, router_weights, source, out)),
            (consume, (1, work, ring, bias, router_weights, source, out)),
            (produce, (work, ring, a, source, weight, places, 1)),
        ],
        [4, 1],
        [240, 24],
    )


def parts_of(schedule: Schedule) -> int:
    """Column blocks of the epilogue: 64 columns of 16 bits are a cache line."""
    return schedule.block_n // 64


def down(
    a: Tensor,
    tiles: TileTables,
    weight: PerExpert,
    *,
    size_columns: int,
    config: Config,
    bias: PerExpert | None,
    router_weights: Tensor | None,
    source: Tensor | None,
) -> Tensor:
    """As `moe_triton_kernels.down.down`, for what `why_unsupported` has no reason against.

    Rows of `a` past offsets[E] that share a tile with rows that count are read, and change nothing.
    """
    num_rows, size_k = a.shape
    schedule = schedule_of(config.gluon)
    out = a.new_empty((num_rows, size_columns))
    table, max_tiles = select_tiles(tiles, schedule, num_rows)
    down_kernel[grid(a.device, schedule, max_tiles, size_columns, schedule.block_n)](
        rows_descriptor(a, schedule),
        *weight_arguments(weight, schedule.block_n, schedule),
        None if bias is None else bias.bias(),
        router_weights,
        source,
        out,
        table,
        size_k,
        size_columns,
        K_CONTIGUOUS=is_k_contiguous(weight),
        TILE=constants(tile_of(schedule, group=config.group, parts=parts_of(schedule), size_k=size_k)),
        num_warps=4,
        num_ctas=schedule.ctas,
    )
    return out
