"""The gradient of the hidden rows, warp-specialized: what `moe_triton_kernels.d_hidden` computes.

Its epilogue is the longest of all: it reads H and writes wA and dH. It works on blocks that lie as they are loaded and
stored, 16 bytes a thread side by side along the row, so that only the product has to change its layout. Each block is
converted before its H is loaded, and wA is stored before dH is computed: in another order registers spill. With the
activations that are not among `DERIVATIVES` they spill in any order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moe_triton_kernels.activations import Activation, is_gated
from moe_triton_kernels.compiler import triton_version
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
    store_layout,
)
from moe_triton_kernels.gluon.schedules import Schedule, is_k_contiguous, schedule_of
from moe_triton_kernels.grouped_gemm import split_columns
from moe_triton_kernels.launch import Config, constants
from moe_triton_kernels.operands import PerExpert
from moe_triton_kernels.preactivation import d_activate, join_pair, load_parts, split_pair
from moe_triton_kernels.tiles import TileTables


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, work, ring, source, h, router_weights, outputs, num_slots, DTYPE, ACTIVATION: gl.constexpr,
    CONCATENATED: gl.constexpr,
):  # fmt: skip
    """A consumer partition: wA, dH and the shares of <dA, A>, of its tiles or of its half of every tile."""
    HALVES: gl.constexpr = 2 if is_gated(ACTIVATION) and CONCATENATED else 1
    PAIRS: gl.constexpr = 2 if is_gated(ACTIVATION) and not CONCATENATED else 1  # columns of H for one of A
    PART: gl.constexpr = work.BLOCK_N // work.PARTS
    STORE: gl.constexpr = store_layout(PART, work.CTAS)
    STORE_H: gl.constexpr = store_layout(PART, work.CTAS, PAIRS)
    weighted_a, grad_h, shares = outputs
    size_n = work.size_columns
    num_m, num_n = count_tiles(work)
    first, stride, number = consumer_tiles(work, CONSUMER)
    for tile in range(first, num_m * num_n, stride):
        _, first_row, end_row, tile_n = locate(work, tile, num_m, num_n)
        acc = multiply(work, ring, CONSUMER, number, end_row - first_row)
        if work.PING_PONG:
            number += 2
        else:
            number += 1
            first_row += CONSUMER * work.ROWS
        tile_rows = gl.arange(0, work.ROWS, layout=gl.SliceLayout(1, STORE))
        rows = first_row + tile_rows
        row_mask = rows < end_row
        slots = gl.load(source + gl.minimum(rows, end_row - 1))
        scale = gl.load(router_weights + slots).to(gl.float32)[:, None]
        # within a tile offsets are small: 32 bits of each, and one pointer of 64 for all of them
        first_cell = gl.to_tensor(first_row).to(gl.int64) * size_n
        a_tile, h_tile = weighted_a + first_cell, h + HALVES * PAIRS * first_cell
        grad_tile = grad_h + HALVES * PAIRS * first_cell
        h_rows = gl.arange(0, work.ROWS, layout=gl.SliceLayout(1, STORE_H))
        share = gl.zeros([work.ROWS], gl.float32, gl.SliceLayout(1, STORE))
        blocks = split_columns(acc, work.PARTS)
        for i in gl.static_range(work.PARTS):
            n0 = tile_n * work.BLOCK_N + i * PART
            columns = n0 + gl.arange(0, PART, layout=gl.SliceLayout(0, STORE))
            mask = row_mask[:, None] & (columns < size_n)[None, :]
            h_columns = PAIRS * n0 + gl.arange(0, PAIRS * PART, layout=gl.SliceLayout(0, STORE_H))
            h_mask = (first_row + h_rows < end_row)[:, None] & (h_columns < PAIRS * size_n)[None, :]
            cells = (h_rows * (HALVES * PAIRS * size_n))[:, None] + h_columns[None, :]
            grad_a = gl.convert_layout(blocks[i], STORE)
            pair = split_pair(load_parts(h_tile + cells, size_n, h_mask, HALVES), ACTIVATION, HALVES)
            if PAIRS == 2:  # the layouts are the same, and have two names
                pair = (gl.convert_layout(pair[0], STORE), gl.convert_layout(pair[1], STORE))
            value, grads = d_activate(grad_a, scale, pair, ACTIVATION)
            value = value.to(DTYPE).to(gl.float32)  # forward multiplied the rounded A by W2
            share += gl.sum(grad_a * value, 1)
            a_cells = (tile_rows * size_n)[:, None] + columns[None, :]
            gl.store(a_tile + a_cells, (value * scale).to(DTYPE), mask=mask)
            grad_parts = join_pair(grads, ACTIVATION, HALVES, DTYPE)
            for half in gl.static_range(HALVES):
                grad_part = gl.convert_layout(grad_parts[half], STORE_H)
                gl.store(grad_tile + (cells + half * size_n), grad_part, mask=h_mask)
        gl.store(shares + gl.to_tensor(tile_n).to(gl.int64) * num_slots + rows, share, mask=row_mask)


@gluon.jit(do_not_specialize=["num_slots"])
def d_hidden_kernel(
    grad_out,  # [T, d]
    source,  # [S]
    weight,  # descriptor [E, n, d] or [E, d, n]
    places,  # of a table's matrices (PlacesArgument), or None
    h,  # [S, n] or [S, 2n]
    router_weights,  # [T * K]
    weighted_a,  # [S, n]
    grad_h,  # like h
    shares,  # [num_n, S] fp32
    tiles,
    size_d,
    size_n,
    num_slots,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    CONCATENATED: gl.constexpr,
    K_CONTIGUOUS: gl.constexpr,
    TILE,
):
    DTYPE: gl.constexpr = grad_out.dtype.element_ty
    work = Work(tiles, size_d, size_n, True, False, K_CONTIGUOUS, TILE)
    ring = make_ring(work, DTYPE, 4 * 32)
    outputs = (weighted_a, grad_h, shares)
    gl.warp_specialize(
        [
            (consume, (0, work, ring, source, h, router_weights, outputs, num_slots, DTYPE, ACTIVATION, CONCATENATED)),
            (consume, (1, work, ring, source, h, router_weights, outputs, num_slots, DTYPE, ACTIVATION, CONCATENATED)),
            (produce, (work, ring, grad_out, source, weight, places, TOP_K)),
        ],
        [4, 4],
        [232, 40],
    )


def parts_of(schedule: Schedule) -> int:
    """Column blocks of the epilogue: with fewer, registers spill. Triton 3.9 calls another assembler."""
    return 16 if schedule.ping_pong or triton_version() >= (3, 9) else 8


def d_hidden(
    grad_out: Tensor,
    source: Tensor,
    tiles: TileTables,
    weight: PerExpert,
    h: Tensor,
    router_weights: Tensor,
    *,
    size_n: int,
    activation: Activation,
    is_concatenated: bool,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe_triton_kernels.d_hidden.d_hidden`, for what `why_unsupported` has no reason against."""
    schedule = schedule_of(config.gluon)
    num_slots, size_d = source.shape[0], grad_out.shape[1]
    weighted_a, grad_h = grad_out.new_empty((num_slots, size_n)), torch.empty_like(h)
    num_n = triton.cdiv(size_n, schedule.block_n)
    shares = grad_out.new_empty((num_n, num_slots), dtype=torch.float32)
    table, max_tiles = select_tiles(tiles, schedule, num_slots)
    d_hidden_kernel[grid(grad_out.device, schedule, max_tiles, size_n, schedule.block_n)](
        grad_out,
        source,
        *weight_arguments(weight, schedule.block_n, schedule),
        h,
        router_weights,
        weighted_a,
        grad_h,
        shares,
        table,
        size_d,
        size_n,
        num_slots,
        TOP_K=router_weights.shape[1],
        ACTIVATION=activation,
        CONCATENATED=is_concatenated,
        K_CONTIGUOUS=is_k_contiguous(weight),
        TILE=constants(tile_of(schedule, group=config.group, parts=parts_of(schedule), size_k=size_d)),
        num_warps=4,
        num_ctas=schedule.ctas,
    )
    return weighted_a, grad_h, shares
