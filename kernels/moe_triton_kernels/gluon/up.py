"""The up projection, warp-specialized: what `moe_triton_kernels.up` computes, with gathered rows and weights by TMA."""

from __future__ import annotations

from torch import Tensor

from moe_triton_kernels.activations import Activation, is_gated
from moe_triton_kernels.gluon.launch import grid, select_tiles, tile_of, weight_arguments
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
from moe_triton_kernels.launch import Config, constants
from moe_triton_kernels.operands import PerExpert, expert_base
from moe_triton_kernels.preactivation import activate, part_blocks, round_parts, split_pair
from moe_triton_kernels.tiles import TileTables


@gluon.jit
def column_blocks(acc, work):
    """As `part_blocks`: gate columns left and up columns right, or, ungated or in pairs, one half twice as wide."""
    left, right = part_blocks(acc, 2, work.PARTS)
    if work.GATED:
        return left, right
    else:
        return (left + right,)


@gluon.jit
def consume(CONSUMER: gl.constexpr, work, ring, bias, a, h, DTYPE: gl.constexpr, ACTIVATION: gl.constexpr):
    """A consumer partition: H = product + bias and A = activation(H), of its tiles or of its half of every tile."""
    PART: gl.constexpr = work.BLOCK_N // 2 // work.PARTS
    BLOCKS: gl.constexpr = work.PARTS if work.GATED else 2 * work.PARTS  # column blocks of A
    HALVES: gl.constexpr = 2 if work.GATED else 1
    PAIRS: gl.constexpr = 2 if is_gated(ACTIVATION) and not work.GATED else 1  # columns of H for one of A
    STORE: gl.constexpr = store_layout(PART, work.CTAS)
    STORE_A: gl.constexpr = store_layout(PART // PAIRS, work.CTAS)
    size_h, size_n = work.size_columns, work.size_columns // PAIRS
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
        rows = first_row + gl.arange(0, work.ROWS, layout=gl.SliceLayout(1, STORE))
        row_mask = rows < end_row
        blocks = column_blocks(acc, work)
        for i in gl.static_range(BLOCKS):
            n0 = (tile_n * BLOCKS + i) * PART
            columns = n0 + gl.arange(0, PART, layout=gl.SliceLayout(0, blocks[0][i].type.layout))
            parts = round_parts(blocks, bias, b, columns, columns < size_h, size_h, i, DTYPE, HALVES)
            if h is not None:
                h_rows = h + rows.to(gl.int64) * (HALVES * size_h)
                for half in gl.static_range(HALVES):
                    store_block(h_rows + half * size_h, row_mask, n0, size_h, parts[half], STORE)
            if a is not None:
                a_tile = first_row + gl.arange(0, work.ROWS, layout=gl.SliceLayout(1, STORE_A))
                a_rows = a + a_tile.to(gl.int64) * size_n
                value = activate(split_pair(parts, ACTIVATION, HALVES), ACTIVATION)
                store_block(a_rows, a_tile < end_row, n0 // PAIRS, size_n, value.to(DTYPE), STORE_A)


@gluon.jit
def up_kernel(
    x,  # [T, d]
    source,  # [S]
    weight,  # descriptor [E, n or 2n, d], or [E, d, n or 2n]
    places,  # of a table's matrices (PlacesArgument), or None
    bias,  # per expert [n] or [2n], or None
    a,  # [S, n], or None
    h,  # [S, n] or [S, 2n], or None
    tiles,
    size_d,
    size_n,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    CONCATENATED: gl.constexpr,
    K_CONTIGUOUS: gl.constexpr,
    TILE,
):
    DTYPE: gl.constexpr = x.dtype.element_ty
    GATED: gl.constexpr = is_gated(ACTIVATION)
    size_columns = size_n if CONCATENATED or not GATED else 2 * size_n
    work = Work(tiles, size_d, size_columns, True, GATED and CONCATENATED, K_CONTIGUOUS, TILE)
    ring = make_ring(work, DTYPE, 4 * 32)
    gl.warp_specialize(
        [
            (consume, (0, work, ring, bias, a, h, DTYPE, ACTIVATION)),
            (consume, (1, work, ring, bias, a, h, DTYPE, ACTIVATION)),
            (produce, (work, ring, x, source, weight, places, TOP_K)),
        ],
        [4, 4],
        [232, 40],
    )


def parts_of(schedule: Schedule, is_gated: bool, is_concatenated: bool) -> int:
    """Column blocks of each half of the tile: as wide as the registers allow without a spill."""
    return 2 if is_gated and (schedule.ping_pong or not is_concatenated) else 4


def up(
    x: Tensor,
    source: Tensor,
    tiles: TileTables,
    weight: PerExpert,
    bias: PerExpert | None,
    *,
    size_n: int,
    top_k: int,
    activation: Activation,
    is_concatenated: bool,
    keep_activation: bool,
    keep_preactivation: bool,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """As `moe_triton_kernels.up.up`, for what `why_unsupported` has no reason against."""
    schedule = schedule_of(config.gluon)
    projections = 2 if activation.is_gated else 1
    width = schedule.block_n // projections  # of a tile of A
    num_rows, size_d = source.shape[0], x.shape[1]
    a = x.new_empty((num_rows, size_n) if keep_activation else 0)
    h = x.new_empty((num_rows, projections * size_n) if keep_preactivation else 0)
    table, max_tiles = select_tiles(tiles, schedule, num_rows)
    up_kernel[grid(x.device, schedule, max_tiles, size_n, width)](
        x,
        source,
        *weight_arguments(weight, width if is_concatenated else schedule.block_n, schedule),
        None if bias is None else bias.bias(),
        a if keep_activation else None,
        h if keep_preactivation else None,
        table,
        size_d,
        size_n,
        TOP_K=top_k,
        ACTIVATION=activation,
        CONCATENATED=is_concatenated,
        K_CONTIGUOUS=is_k_contiguous(weight),
        TILE=constants(
            tile_of(
                schedule,
                group=config.group,
                parts=parts_of(schedule, activation.is_gated, is_concatenated),
                size_k=size_d,
            )
        ),
        num_warps=4,
        num_ctas=schedule.ctas,
    )
    return a, h
