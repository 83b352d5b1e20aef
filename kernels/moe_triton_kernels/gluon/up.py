"""The up projection, warp-specialized: what `moe_triton_kernels.up` computes, with gathered rows and weights by TMA."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton_kernels.activations import GATED, UNGATED, check_activation, factor, up_factor
from moe_triton_kernels.configs import Config
from moe_triton_kernels.gluon.launch import block_constants, grid, offline_case, weight_block, weight_descriptor
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
from moe_triton_kernels.gluon.schedules import BLOCK_M, SCHEDULES, TYPES, Schedule, is_k_contiguous, schedule_of
from moe_triton_kernels.grouped_gemm import PerExpert, add_bias, halves, split_columns
from moe_triton_kernels.offline import Case
from moe_triton_kernels.tiles import TileTables


@gluon.jit
def consume(
    CONSUMER: gl.constexpr,
    work,
    ring,
    bias,
    a,
    h,
    bias_stride_e,
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    KEEP_A: gl.constexpr,
    KEEP_H: gl.constexpr,
):
    """A consumer partition: H = product + bias and A = activation(H), of its tiles or of its half of every tile."""
    DTYPE: gl.constexpr = a.dtype.element_ty
    HALF: gl.constexpr = work.BLOCK_N // 2
    PART: gl.constexpr = HALF // work.PARTS
    STORE: gl.constexpr = store_layout(PART)
    size_n = work.size_columns
    num_m, num_n = count_tiles(work)
    first, stride, number = consumer_tiles(work, CONSUMER)
    for tile in range(first, num_m * num_n, stride):
        expert, first_row, end_row, tile_n = locate(work, tile, num_m, num_n)
        acc = multiply(work, ring, CONSUMER, number)
        if work.PING_PONG:
            number += 2
        else:
            number += 1
            first_row += CONSUMER * acc.shape[0]
        b = bias + expert.to(gl.int64) * bias_stride_e
        rows = first_row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, STORE))
        row_mask = rows < end_row
        a_rows = a + rows.to(gl.int64) * size_n
        left, right = halves(acc)
        lefts = split_columns(left, work.PARTS)
        rights = split_columns(right, work.PARTS)
        if work.GATED:  # gate columns left, up columns right
            h_rows = h + rows.to(gl.int64) * (2 * size_n)
            for i in gl.static_range(work.PARTS):
                n0 = tile_n * HALF + i * PART
                inner = n0 + gl.arange(0, PART, layout=gl.SliceLayout(0, lefts[i].type.layout))
                inside = inner < size_n
                gate = add_bias(lefts[i], b, inner, inside, 1, HAS_BIAS).to(DTYPE)
                up = add_bias(rights[i], b, size_n + inner, inside, 1, HAS_BIAS).to(DTYPE)
                if KEEP_H:
                    store_block(h_rows, row_mask, n0, size_n, gate, STORE)
                    store_block(h_rows + size_n, row_mask, n0, size_n, up, STORE)
                if KEEP_A:
                    value = factor(gate.to(gl.float32), ACTIVATION) * up_factor(up.to(gl.float32), ACTIVATION)
                    store_block(a_rows, row_mask, n0, size_n, value.to(DTYPE), STORE)
        else:
            h_rows = h + rows.to(gl.int64) * size_n
            blocks = lefts + rights
            for i in gl.static_range(2 * work.PARTS):
                n0 = tile_n * work.BLOCK_N + i * PART
                inner = n0 + gl.arange(0, PART, layout=gl.SliceLayout(0, blocks[i].type.layout))
                x = add_bias(blocks[i], b, inner, inner < size_n, 1, HAS_BIAS).to(DTYPE)
                if KEEP_H:
                    store_block(h_rows, row_mask, n0, size_n, x, STORE)
                if KEEP_A:
                    value = factor(x.to(gl.float32), ACTIVATION)
                    store_block(a_rows, row_mask, n0, size_n, value.to(DTYPE), STORE)


@gluon.jit
def up_kernel(
    x,  # [T, d]
    source,  # [S]
    weight,  # descriptor [E * n or E * 2n, d], or [E * d, n or 2n]
    bias,  # [E, n] or [E, 2n]
    a,  # [S, n]
    h,  # [S, n] or [S, 2n]
    table,
    num_tiles,
    offsets,
    size_d,
    size_n,
    bias_stride_e,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    KEEP_A: gl.constexpr,
    KEEP_H: gl.constexpr,
    K_CONTIGUOUS: gl.constexpr,
    PING_PONG: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PARTS: gl.constexpr,
):
    work = Work(
        table,
        num_tiles,
        offsets,
        size_d,
        size_n,
        PING_PONG,
        True,
        GATED,
        K_CONTIGUOUS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        STAGES,
        GROUP,
        PARTS,
    )
    ring = make_ring(work, x.dtype.element_ty, 4 * 32)
    gl.warp_specialize(
        [
            (consume, (0, work, ring, bias, a, h, bias_stride_e, ACTIVATION, HAS_BIAS, KEEP_A, KEEP_H)),
            (consume, (1, work, ring, bias, a, h, bias_stride_e, ACTIVATION, HAS_BIAS, KEEP_A, KEEP_H)),
            (produce, (work, ring, x, source, weight, TOP_K)),
        ],
        [4, 4],
        [232, 40],
    )


def parts_of(schedule: Schedule, gated: bool) -> int:
    """Column blocks of each half of the tile: as wide as the registers allow without a spill."""
    return 2 if schedule.ping_pong and gated else 4


def up(
    x: Tensor,
    source: Tensor,
    tiles: TileTables,
    offsets: Tensor,
    weight: PerExpert,
    bias: PerExpert | None,
    *,
    size_n: int,
    top_k: int,
    activation: str,
    keep_activation: bool,
    keep_preactivation: bool,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """As `moe_triton_kernels.up.up` with concatenated weights, for what `why_unsupported` has no reason against."""
    schedule = schedule_of(config.gluon)
    gated = check_activation(activation)
    projections = 2 if gated else 1
    width = schedule.block_n // projections
    num_rows, size_d = source.shape[0], x.shape[1]
    a = x.new_empty((num_rows, size_n) if keep_activation else 0)
    h = x.new_empty((num_rows, projections * size_n) if keep_preactivation else 0)
    table, num_tiles, max_tiles = tiles.select(BLOCK_M)
    up_kernel[grid(x.device, max_tiles, size_n, width)](
        x,
        source,
        weight_descriptor(weight, width),
        weight.data if bias is None else bias.data,
        a,
        h,
        table,
        num_tiles,
        offsets,
        size_d,
        size_n,
        0 if bias is None else bias.stride_e,
        TOP_K=top_k,
        ACTIVATION=activation,
        GATED=gated,
        HAS_BIAS=bias is not None,
        KEEP_A=keep_activation,
        KEEP_H=keep_preactivation,
        K_CONTIGUOUS=is_k_contiguous(weight),
        **block_constants(schedule, group=config.group, parts=parts_of(schedule, gated)),
        num_warps=4,
    )
    return a, h


def offline_cases() -> list[Case]:
    """Both forms in every schedule; the first also with every activation, the other layout and the other type."""
    cases = []
    for op, activations in (("up_gated", GATED), ("up", UNGATED)):
        gated = op == "up_gated"
        # (schedule, activation, k is contiguous, type)
        variants = [(name, activations[0], True, torch.bfloat16) for name in SCHEDULES]
        variants += [("cooperative", activation, True, torch.bfloat16) for activation in activations[1:]]
        variants += [("cooperative", activations[0], False, torch.bfloat16)]
        variants += [("cooperative", activations[0], True, torch.float16)]
        for number, (schedule, activation, by_k, dtype) in enumerate(variants):
            width = SCHEDULES[schedule].block_n // (2 if gated else 1)
            cases.append(
                offline_case(
                    up_kernel,
                    op,
                    schedule,
                    dtype=dtype,
                    variant=activation + "_T" * (not by_k),
                    width=width,
                    parts=parts_of(SCHEDULES[schedule], gated),
                    descriptors={"weight": weight_block(width, by_k)},
                    pointers=dict.fromkeys(("x", "bias", "a", "h"), f"*{TYPES[dtype]}"),
                    sample=gated and number < len(SCHEDULES),
                    TOP_K=8,
                    ACTIVATION=activation,
                    GATED=gated,
                    HAS_BIAS=True,
                    KEEP_A=True,
                    KEEP_H=True,
                    K_CONTIGUOUS=by_k,
                )
            )
    return cases
