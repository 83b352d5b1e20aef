"""The up projection: A = activation(X W1^T + b1), with the token rows gathered inside the product.

The activation is computed from H = X W1^T + b1 rounded to the hidden states' dtype, whether or not H is kept: backward
(and a recomputation) has the rounded H only, so both directions evaluate the same function at the same point.
A gated activation takes gate and up columns of one tile into one accumulator, [gate | up] or g0, u0, g1, u1, ...,
in the order of the weights' columns, which is also H's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.activations import GATED, UNGATED, check_activation, factor, up_factor
from moe_triton_kernels.configs import Config, launch_options, offline_case, persistent_grid, shipped_configs
from moe_triton_kernels.gluon.schedules import why_unsupported
from moe_triton_kernels.grouped_gemm import (
    PerExpert,
    add_bias,
    expert_base,
    offline_weight,
    rows_times_weight,
    split_columns,
    tile_order,
    weight_argument,
)
from moe_triton_kernels.offline import Case
from moe_triton_kernels.tiles import TileTables, load_tile


@triton.jit
def up_kernel(
    x,  # [T, d]
    source,  # [S]
    weight,  # per expert [d, n] or [d, 2n]
    bias,  # per expert [n] or [2n]
    a,  # [S, n]
    h,  # [S, n] or [S, 2n]
    table,
    num_tiles,
    offsets,
    size_d,
    size_n,
    weight_stride_e,
    weight_stride_d,
    weight_stride_n,
    bias_stride_e,
    bias_stride_n,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    CONCATENATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_A: tl.constexpr,
    KEEP_H: tl.constexpr,
    WEIGHT_TABLE: tl.constexpr,
    WEIGHT_ALIGNMENT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BIAS_TABLE: tl.constexpr,
    BIAS_ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    FENCE: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    FACTOR: tl.constexpr = 2 if GATED else 1
    HALVES: tl.constexpr = 2 if GATED and CONCATENATED else 1
    num_m = tl.load(num_tiles)
    num_n = tl.cdiv(size_n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, num_m, num_n, GROUP)
        expert, first_row, end_row = load_tile(table, offsets, tile_m, BLOCK_M)
        rows = first_row + tl.arange(0, BLOCK_M)
        row_mask = rows < end_row
        slots = tl.load(source + rows, mask=row_mask, other=0)  # rows past the end compute token 0 and store nothing
        x_rows = x + (slots // TOP_K).to(tl.int64) * size_d

        n0 = tile_n * BLOCK_N
        acc = rows_times_weight(
            x_rows,
            weight,
            expert,
            n0 * (FACTOR // HALVES),
            size_d,
            size_n * (FACTOR // HALVES),
            weight_stride_e,
            weight_stride_d,
            weight_stride_n,
            HALVES,
            WEIGHT_TABLE,
            WEIGHT_ALIGNMENT,
            DESCRIPTOR,
            BLOCK_M,
            BLOCK_N * (FACTOR // HALVES),
            BLOCK_K,
            EVEN_K,
            FENCE,
        )
        b = expert_base(bias, expert, bias_stride_e, BIAS_TABLE, BIAS_ALIGNMENT, DTYPE) if HAS_BIAS else bias
        a_rows = a + rows.to(tl.int64) * size_n
        h_rows = h + rows.to(tl.int64) * (FACTOR * size_n)
        PART: tl.constexpr = BLOCK_N // PARTS
        if GATED and CONCATENATED:
            gates, ups = split_columns(acc, 2)
            gates = split_columns(gates, PARTS)
            ups = split_columns(ups, PARTS)
            for i in tl.static_range(PARTS):
                inner = n0 + i * PART + tl.arange(0, PART)
                inside = inner < size_n
                mask = row_mask[:, None] & inside[None, :]
                gate = add_bias(gates[i], b, inner, inside, bias_stride_n, HAS_BIAS).to(DTYPE)
                up = add_bias(ups[i], b, size_n + inner, inside, bias_stride_n, HAS_BIAS).to(DTYPE)
                if KEEP_H:
                    tl.store(h_rows[:, None] + inner[None, :], gate, mask=mask)
                    tl.store(h_rows[:, None] + (size_n + inner)[None, :], up, mask=mask)
                if KEEP_A:
                    value = factor(gate.to(tl.float32), ACTIVATION) * up_factor(up.to(tl.float32), ACTIVATION)
                    tl.store(a_rows[:, None] + inner[None, :], value.to(DTYPE), mask=mask)
        elif GATED:
            blocks = split_columns(acc, PARTS)
            for i in tl.static_range(PARTS):
                pairs = FACTOR * (n0 + i * PART) + tl.arange(0, FACTOR * PART)
                inside = pairs < FACTOR * size_n
                both = add_bias(blocks[i], b, pairs, inside, bias_stride_n, HAS_BIAS).to(DTYPE)
                if KEEP_H:
                    tl.store(h_rows[:, None] + pairs[None, :], both, mask=row_mask[:, None] & inside[None, :])
                if KEEP_A:
                    gate, up = both.to(tl.float32).reshape(BLOCK_M, PART, 2).split()
                    value = factor(gate, ACTIVATION) * up_factor(up, ACTIVATION)
                    inner = n0 + i * PART + tl.arange(0, PART)
                    mask = row_mask[:, None] & (inner < size_n)[None, :]
                    tl.store(a_rows[:, None] + inner[None, :], value.to(DTYPE), mask=mask)
        else:
            blocks = split_columns(acc, PARTS)
            for i in tl.static_range(PARTS):
                inner = n0 + i * PART + tl.arange(0, PART)
                inside = inner < size_n
                mask = row_mask[:, None] & inside[None, :]
                x_part = add_bias(blocks[i], b, inner, inside, bias_stride_n, HAS_BIAS).to(DTYPE)
                if KEEP_H:
                    tl.store(h_rows[:, None] + inner[None, :], x_part, mask=mask)
                if KEEP_A:
                    value = factor(x_part.to(tl.float32), ACTIVATION)
                    tl.store(a_rows[:, None] + inner[None, :], value.to(DTYPE), mask=mask)


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
    is_concatenated: bool,
    keep_activation: bool,
    keep_preactivation: bool,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """A [S, n] and the pre-activation H [S, 2n] ([S, n] ungated), in x's dtype; an empty [0] tensor for one not kept.

    x [T, d] contiguous; source [S] int32, row -> token*top_k + choice; weight: per expert [d, 2n] or [d, n], any
    strides. H's columns lie as the weight's do: [gate | up], or g0, u0, g1, u1, ... where not `is_concatenated`.
    Rows past offsets[E] are not written.
    """
    gated = check_activation(activation)
    sizes = {"size_columns": size_n, "projections": 2 if gated else 1}
    if why_unsupported(config.gluon, x, weight, bias, is_concatenated=is_concatenated, **sizes) is None:
        from moe_triton_kernels.gluon import up as warp_specialized  # imports Gluon, which is experimental

        return warp_specialized.up(
            x,
            source,
            tiles,
            offsets,
            weight,
            bias,
            size_n=size_n,
            top_k=top_k,
            activation=activation,
            keep_activation=keep_activation,
            keep_preactivation=keep_preactivation,
            config=config,
        )
    num_rows, size_d = source.shape[0], x.shape[1]
    a = x.new_empty((num_rows, size_n) if keep_activation else 0)
    h = x.new_empty((num_rows, 2 * size_n if gated else size_n) if keep_preactivation else 0)
    table, num_tiles, max_tiles = tiles.select(config.block_m)
    grid = persistent_grid(x.device, max_tiles * triton.cdiv(size_n, config.block_n), config)
    halves = 2 if gated and is_concatenated else 1
    per_half = 2 // halves if gated else 1  # columns of the weight that lie together for one of A
    weight_data, weight_constants = weight_argument(
        weight,
        config,
        size_k=size_d,
        size_columns=per_half * size_n,
        halves=halves,
        block_n=per_half * config.block_n,
    )
    up_kernel[grid](
        x,
        source,
        weight_data,
        weight.data if bias is None else bias.data,
        a,
        h,
        table,
        num_tiles,
        offsets,
        size_d,
        size_n,
        weight.stride_e,
        *weight.strides,
        0 if bias is None else bias.stride_e,
        0 if bias is None else bias.strides[0],
        TOP_K=top_k,
        ACTIVATION=activation,
        GATED=gated,
        CONCATENATED=is_concatenated,
        HAS_BIAS=bias is not None,
        KEEP_A=keep_activation,
        KEEP_H=keep_preactivation,
        **weight_constants,
        BIAS_TABLE=bias is not None and bias.is_table,
        BIAS_ALIGNMENT=1 if bias is None else bias.alignment,
        EVEN_K=size_d % config.block_k == 0,
        **launch_options(x.device, config),
    )
    return a, h


def offline_cases(arch: str) -> list[Case]:
    """Every shipped configuration; the first of each op also with every activation and weight layout."""
    cases = []
    for op, activations in (("up_gated", GATED), ("up", UNGATED)):
        entries = [entry for entry in shipped_configs(arch) if entry.op == op]
        # (configuration, activation, is_transposed, is_concatenated, bias, addresses instead of a stacked tensor)
        variants = [(entry, activations[0], False, True, False, False) for entry in entries]
        variants += [(entries[0], activation, False, True, True, False) for activation in activations]
        variants += [(entries[0], activations[-1], True, False, True, True)]
        if op == "up_gated":
            variants += [(entries[0], activations[0], True, True, False, False)]
            variants += [(entries[0], activations[0], False, False, False, True)]
        for number, (entry, activation, transposed, concatenated, bias, addresses) in enumerate(variants):
            flags = "_T" * transposed + "_pairs" * (not concatenated) + "_bias" * bias + "_addresses" * addresses
            stored = f"*{entry.dtype}"
            weight, weight_constants = offline_weight(
                entry,
                addresses=addresses,
                by_k=not transposed,
                halves=2 if op == "up_gated" and concatenated else 1,
                block_n=entry.config.block_n * (1 if op == "up" or concatenated else 2),
            )
            pointers = {"x": stored, "a": stored, "h": stored, "weight": weight}
            pointers["bias"] = "*i64" if addresses else stored
            cases.append(
                offline_case(
                    up_kernel,
                    entry,
                    arch,
                    variant=activation + flags,
                    pointers=pointers | dict.fromkeys(("source", "table", "num_tiles", "offsets"), "*i32"),
                    unit_strides=("weight_stride_n" if transposed else "weight_stride_d", "bias_stride_n"),
                    sample=number == 0,
                    TOP_K=8,
                    ACTIVATION=activation,
                    GATED=op == "up_gated",
                    CONCATENATED=concatenated,
                    HAS_BIAS=bias,
                    KEEP_A=True,
                    KEEP_H=True,
                    **weight_constants,
                    BIAS_TABLE=addresses,
                    BIAS_ALIGNMENT=16,
                    EVEN_K=not transposed,
                )
            )
    return cases
