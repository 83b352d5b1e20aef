"""Rows times the experts' matrices: the down projection, and the gradient of the up projection's input rows.

The rows lie in expert order already, so nothing is gathered. Down multiplies (row W2^T + b2) by the row's router
weight in fp32 before it rounds, so that combine is a plain sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

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
def rows_kernel(
    a,  # [S, k]
    weight,  # per expert [k, columns]
    bias,  # per expert [columns]
    router_weights,  # [T * K]
    source,  # [S]
    out,  # [S, columns]
    table,
    num_tiles,
    offsets,
    size_k,
    size_columns,
    weight_stride_e,
    weight_stride_k,
    weight_stride_n,
    bias_stride_e,
    bias_stride_n,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
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
    DTYPE: tl.constexpr = a.dtype.element_ty
    PART: tl.constexpr = BLOCK_N // PARTS
    num_m = tl.load(num_tiles)
    num_n = tl.cdiv(size_columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, num_m, num_n, GROUP)
        expert, first_row, end_row = load_tile(table, offsets, tile_m, BLOCK_M)
        rows = first_row + tl.arange(0, BLOCK_M)
        row_mask = rows < end_row
        n0 = tile_n * BLOCK_N
        acc = rows_times_weight(
            a + tl.minimum(rows, end_row - 1).to(tl.int64) * size_k,
            weight,
            expert,
            n0,
            size_k,
            size_columns,
            weight_stride_e,
            weight_stride_k,
            weight_stride_n,
            1,
            WEIGHT_TABLE,
            WEIGHT_ALIGNMENT,
            DESCRIPTOR,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_K,
            FENCE,
        )
        out_rows = out + rows.to(tl.int64) * size_columns
        b = expert_base(bias, expert, bias_stride_e, BIAS_TABLE, BIAS_ALIGNMENT, DTYPE) if HAS_BIAS else bias
        if WEIGHTED:
            slots = tl.load(source + rows, mask=row_mask, other=0)
            scale = tl.load(router_weights + slots, mask=row_mask, other=0.0).to(tl.float32)
        blocks = split_columns(acc, PARTS)
        for i in tl.static_range(PARTS):
            part = n0 + i * PART + tl.arange(0, PART)
            part_mask = part < size_columns
            value = add_bias(blocks[i], b, part, part_mask, bias_stride_n, HAS_BIAS)
            if WEIGHTED:
                value *= scale[:, None]
            tl.store(out_rows[:, None] + part[None, :], value.to(DTYPE), mask=row_mask[:, None] & part_mask[None, :])


def rows_times_experts(
    a: Tensor,
    tiles: TileTables,
    offsets: Tensor,
    weight: PerExpert,
    *,
    size_columns: int,
    config: Config,
    bias: PerExpert | None = None,
    router_weights: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """out[row] = (a[row] weight[e] + bias[e]) * w[source[row]] for the rows of every expert e: [S, columns], a's dtype.

    a [S, k] contiguous, rows in expert order; weight: per expert [k, columns], any strides; router_weights [T, K]
    contiguous, read at source[row] (None: no factor; `source` is then not needed). Rows past offsets[E] are neither
    read nor written.
    """
    if why_unsupported(config.gluon, a, weight, bias, size_columns=size_columns) is None:
        from moe_triton_kernels.gluon import down as warp_specialized  # imports Gluon, which is experimental

        return warp_specialized.rows_times_experts(
            a,
            tiles,
            offsets,
            weight,
            size_columns=size_columns,
            config=config,
            bias=bias,
            router_weights=router_weights,
            source=source,
        )
    num_rows, size_k = a.shape
    out = a.new_empty((num_rows, size_columns))
    table, num_tiles, max_tiles = tiles.select(config.block_m)
    grid = persistent_grid(a.device, max_tiles * triton.cdiv(size_columns, config.block_n), config)
    weight_data, weight_constants = weight_argument(
        weight, config, size_k=size_k, size_columns=size_columns, halves=1, block_n=config.block_n
    )
    rows_kernel[grid](
        a,
        weight_data,
        weight.data if bias is None else bias.data,
        a if router_weights is None else router_weights,
        offsets if source is None else source,
        out,
        table,
        num_tiles,
        offsets,
        size_k,
        size_columns,
        weight.stride_e,
        *weight.strides,
        0 if bias is None else bias.stride_e,
        0 if bias is None else bias.strides[0],
        HAS_BIAS=bias is not None,
        WEIGHTED=router_weights is not None,
        **weight_constants,
        BIAS_TABLE=bias is not None and bias.is_table,
        BIAS_ALIGNMENT=1 if bias is None else bias.alignment,
        EVEN_K=size_k % config.block_k == 0,
        **launch_options(a.device, config),
    )
    return out


def offline_cases(arch: str) -> list[Case]:
    """Every shipped configuration of down (bias, router weights) and of d_rows; the first also in the other layout."""
    cases = []
    for op in ("down", "d_rows"):
        entries = [entry for entry in shipped_configs(arch) if entry.op == op]
        columns_contiguous = op == "d_rows"  # the default layout is [columns, k] for down, [k, columns] for d_rows
        # (configuration, columns are contiguous, addresses instead of a stacked tensor)
        variants = [(entry, columns_contiguous, False) for entry in entries]
        variants += [(entries[0], not columns_contiguous, True)]
        for number, (entry, contiguous, addresses) in enumerate(variants):
            stored = f"*{entry.dtype}"
            weight, weight_constants = offline_weight(
                entry, addresses=addresses, by_k=not contiguous, block_n=entry.config.block_n
            )
            pointers = {"a": stored, "out": stored, "weight": weight, "router_weights": "*fp32"}
            pointers["bias"] = "*i64" if addresses else stored
            cases.append(
                offline_case(
                    rows_kernel,
                    entry,
                    arch,
                    variant=("columns" if contiguous else "k") + "_addresses" * addresses,
                    pointers=pointers | dict.fromkeys(("source", "table", "num_tiles", "offsets"), "*i32"),
                    unit_strides=("weight_stride_n" if contiguous else "weight_stride_k", "bias_stride_n"),
                    sample=number == 0,
                    HAS_BIAS=op == "down",
                    WEIGHTED=op == "down",
                    **weight_constants,
                    BIAS_TABLE=addresses,
                    BIAS_ALIGNMENT=16,
                    EVEN_K=not addresses,
                )
            )
    return cases
