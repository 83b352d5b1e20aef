"""Rows times the experts' matrices, warp-specialized: what `moe_triton_kernels.down` computes, all of it by TMA."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton_kernels.configs import Config
from moe_triton_kernels.gluon.launch import (
    block_constants,
    grid,
    offline_case,
    rows_descriptor,
    weight_block,
    weight_descriptor,
)
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
from moe_triton_kernels.gluon.schedules import (
    BLOCK_K,
    BLOCK_M,
    SCHEDULES,
    TYPES,
    Schedule,
    is_k_contiguous,
    schedule_of,
)
from moe_triton_kernels.grouped_gemm import PerExpert, add_bias, split_columns
from moe_triton_kernels.offline import Case
from moe_triton_kernels.tiles import TileTables


@gluon.jit
def consume(
    CONSUMER: gl.constexpr,
    work,
    ring,
    bias,
    router_weights,
    source,
    out,
    bias_stride_e,
    HAS_BIAS: gl.constexpr,
    WEIGHTED: gl.constexpr,
):
    """A consumer partition: (product + bias) * router weight, of its tiles or of its half of every tile."""
    DTYPE: gl.constexpr = out.dtype.element_ty
    PART: gl.constexpr = work.BLOCK_N // work.PARTS
    STORE: gl.constexpr = store_layout(PART)
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
        if WEIGHTED:
            slot_rows = first_row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
            slots = gl.load(source + gl.minimum(slot_rows, end_row - 1))
            scale = gl.load(router_weights + slots).to(gl.float32)
        rows = first_row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, STORE))
        out_rows = out + rows.to(gl.int64) * work.size_columns
        blocks = split_columns(acc, work.PARTS)
        for i in gl.static_range(work.PARTS):
            n0 = tile_n * work.BLOCK_N + i * PART
            columns = n0 + gl.arange(0, PART, layout=gl.SliceLayout(0, blocks[i].type.layout))
            value = add_bias(blocks[i], b, columns, columns < work.size_columns, 1, HAS_BIAS)
            if WEIGHTED:
                value *= gl.convert_layout(scale, gl.SliceLayout(1, blocks[i].type.layout))[:, None]
            store_block(out_rows, rows < end_row, n0, work.size_columns, value.to(DTYPE), STORE)


@gluon.jit
def rows_kernel(
    a,  # descriptor [S, k]
    weight,  # descriptor [E * columns, k] or [E * k, columns]
    bias,  # [E, columns]
    router_weights,  # [T * K]
    source,  # [S]
    out,  # [S, columns]
    table,
    num_tiles,
    offsets,
    size_k,
    size_columns,
    bias_stride_e,
    HAS_BIAS: gl.constexpr,
    WEIGHTED: gl.constexpr,
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
        size_k,
        size_columns,
        PING_PONG,
        False,
        False,
        K_CONTIGUOUS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        STAGES,
        GROUP,
        PARTS,
    )
    ring = make_ring(work, out.dtype.element_ty, 0)
    gl.warp_specialize(
        [
            (consume, (0, work, ring, bias, router_weights, source, out, bias_stride_e, HAS_BIAS, WEIGHTED)),
            (consume, (1, work, ring, bias, router_weights, source, out, bias_stride_e, HAS_BIAS, WEIGHTED)),
            (produce, (work, ring, a, source, weight, 1)),
        ],
        [4, 1],
        [240, 24],
    )


def parts_of(schedule: Schedule) -> int:
    """Column blocks of the epilogue: 64 columns of 16 bits are a cache line."""
    return schedule.block_n // 64


def rows_times_experts(
    a: Tensor,
    tiles: TileTables,
    offsets: Tensor,
    weight: PerExpert,
    *,
    size_columns: int,
    config: Config,
    bias: PerExpert | None,
    router_weights: Tensor | None,
    source: Tensor | None,
) -> Tensor:
    """As `moe_triton_kernels.down.rows_times_experts`, for what `why_unsupported` has no reason against.

    Rows of `a` past offsets[E] that share a tile with rows that count are read, and change nothing.
    """
    num_rows, size_k = a.shape
    schedule = schedule_of(config.gluon)
    out = a.new_empty((num_rows, size_columns))
    table, num_tiles, max_tiles = tiles.select(BLOCK_M)
    rows_kernel[grid(a.device, max_tiles, size_columns, schedule.block_n)](
        rows_descriptor(a),
        weight_descriptor(weight, schedule.block_n),
        weight.data if bias is None else bias.data,
        out if router_weights is None else router_weights,
        offsets if source is None else source,
        out,
        table,
        num_tiles,
        offsets,
        size_k,
        size_columns,
        0 if bias is None else bias.stride_e,
        HAS_BIAS=bias is not None,
        WEIGHTED=router_weights is not None,
        K_CONTIGUOUS=is_k_contiguous(weight),
        **block_constants(schedule, group=config.group, parts=parts_of(schedule)),
        num_warps=4,
    )
    return out


def offline_cases() -> list[Case]:
    """down (bias, router weights) and d_rows in every schedule; the first also in the other layout and type."""
    cases = []
    for op in ("down", "d_rows"):
        default = op == "down"  # its k is contiguous: [columns, k]; the other way round for d_rows
        variants = [(name, default, torch.bfloat16) for name in SCHEDULES]
        variants += [("cooperative", not default, torch.bfloat16), ("cooperative", default, torch.float16)]
        for schedule, by_k, dtype in variants:
            width = SCHEDULES[schedule].block_n
            stored = f"*{TYPES[dtype]}"
            cases.append(
                offline_case(
                    rows_kernel,
                    op,
                    schedule,
                    dtype=dtype,
                    variant="k" if by_k else "columns",
                    width=width,
                    parts=parts_of(SCHEDULES[schedule]),
                    descriptors={"a": [BLOCK_M, BLOCK_K], "weight": weight_block(width, by_k)},
                    pointers={"bias": stored, "out": stored, "router_weights": "*fp32"},
                    sample=op == "down" and by_k and dtype == torch.bfloat16,
                    HAS_BIAS=op == "down",
                    WEIGHTED=op == "down",
                    K_CONTIGUOUS=by_k,
                )
            )
    return cases
