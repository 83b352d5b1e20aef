"""The gradient of the hidden rows: dA = dO W2, then everything that follows from it per row, in one kernel.

With w the row's router weight and A = activation(H) recomputed from the kept pre-activation H:
    wA = w * A                    for dW2 = dO^T (w A)
    dH = w * dA * activation'(H)  for dW1 = dH^T X and dX = dH W1
    dw = <dA, A> + <dO, b2>       the router weight's gradient
Each tile writes its share of <dA, A>; a second kernel adds the shares in column order. No float atomics: same input,
same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.activations import GATED, UNGATED, check_activation, factor, factor_slope, up_factor, up_slope
from moe_triton_kernels.configs import Config, launch_options, offline_case, persistent_grid, shipped_configs
from moe_triton_kernels.grouped_gemm import (
    PerExpert,
    expert_base,
    offline_weight,
    rows_times_weight,
    split_columns,
    tile_order,
    weight_argument,
)
from moe_triton_kernels.offline import Case
from moe_triton_kernels.tiles import TileTables, load_tile


@triton.jit(do_not_specialize=["num_slots"])
def d_hidden_kernel(
    grad_out,  # [T, d]
    source,  # [S]
    weight,  # per expert [d, n]
    h,  # [S, n] or [S, 2n]
    router_weights,  # [T * K]
    weighted_a,  # [S, n]
    grad_h,  # like h
    shares,  # [num_n, S] fp32
    table,
    num_tiles,
    offsets,
    size_d,
    size_n,
    num_slots,
    weight_stride_e,
    weight_stride_d,
    weight_stride_n,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    CONCATENATED: tl.constexpr,
    WEIGHT_TABLE: tl.constexpr,
    WEIGHT_ALIGNMENT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    FENCE: tl.constexpr,
):
    DTYPE: tl.constexpr = grad_out.dtype.element_ty
    FACTOR: tl.constexpr = 2 if GATED else 1
    PART: tl.constexpr = BLOCK_N // PARTS
    num_m = tl.load(num_tiles)
    num_n = tl.cdiv(size_n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, num_m, num_n, GROUP)
        expert, first_row, end_row = load_tile(table, offsets, tile_m, BLOCK_M)
        rows = first_row + tl.arange(0, BLOCK_M)
        row_mask = rows < end_row
        slots = tl.load(source + rows, mask=row_mask, other=0)  # rows past the end compute token 0 and store nothing
        n0 = tile_n * BLOCK_N
        acc = rows_times_weight(
            grad_out + (slots // TOP_K).to(tl.int64) * size_d,
            weight,
            expert,
            n0,
            size_d,
            size_n,
            weight_stride_e,
            weight_stride_d,
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
        scale = tl.load(router_weights + slots, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        a_rows = weighted_a + rows.to(tl.int64) * size_n
        h_offsets = rows.to(tl.int64) * (FACTOR * size_n)
        share = tl.zeros((BLOCK_M,), dtype=tl.float32)
        blocks = split_columns(acc, PARTS)
        for i in tl.static_range(PARTS):
            inner = n0 + i * PART + tl.arange(0, PART)
            mask = row_mask[:, None] & (inner < size_n)[None, :]
            grad_a = blocks[i]
            if GATED and CONCATENATED:
                gate_at = h_offsets[:, None] + inner[None, :]
                gate = tl.load(h + gate_at, mask=mask, other=0.0).to(tl.float32)
                up = tl.load(h + gate_at + size_n, mask=mask, other=0.0).to(tl.float32)
                gate_value = factor(gate, ACTIVATION)
                up_value = up_factor(up, ACTIVATION)
                value = gate_value * up_value
                weighted = grad_a * scale
                grad_gate = weighted * up_value * factor_slope(gate, ACTIVATION)
                grad_up = weighted * gate_value * up_slope(up, ACTIVATION)
                tl.store(grad_h + gate_at, grad_gate.to(DTYPE), mask=mask)
                tl.store(grad_h + gate_at + size_n, grad_up.to(DTYPE), mask=mask)
            elif GATED:
                pairs = FACTOR * (n0 + i * PART) + tl.arange(0, FACTOR * PART)
                pair_at = h_offsets[:, None] + pairs[None, :]
                pair_mask = row_mask[:, None] & (pairs < FACTOR * size_n)[None, :]
                both = tl.load(h + pair_at, mask=pair_mask, other=0.0)
                gate, up = both.to(tl.float32).reshape(BLOCK_M, PART, 2).split()
                gate_value = factor(gate, ACTIVATION)
                up_value = up_factor(up, ACTIVATION)
                value = gate_value * up_value
                weighted = grad_a * scale
                grad_gate = weighted * up_value * factor_slope(gate, ACTIVATION)
                grad_up = weighted * gate_value * up_slope(up, ACTIVATION)
                grad_both = tl.join(grad_gate.to(DTYPE), grad_up.to(DTYPE)).reshape(BLOCK_M, FACTOR * PART)
                tl.store(grad_h + pair_at, grad_both, mask=pair_mask)
            else:
                at = h_offsets[:, None] + inner[None, :]
                x = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
                value = factor(x, ACTIVATION)
                tl.store(grad_h + at, (grad_a * scale * factor_slope(x, ACTIVATION)).to(DTYPE), mask=mask)
            value = value.to(DTYPE).to(tl.float32)  # forward multiplied the rounded A by W2
            share += tl.sum(grad_a * value, 1)
            tl.store(a_rows[:, None] + inner[None, :], (value * scale).to(DTYPE), mask=mask)
        tl.store(shares + tile_n.to(tl.int64) * num_slots + rows, share, mask=row_mask)


def d_hidden(
    grad_out: Tensor,
    source: Tensor,
    tiles: TileTables,
    offsets: Tensor,
    weight: PerExpert,
    h: Tensor,
    router_weights: Tensor,
    *,
    size_n: int,
    activation: str,
    is_concatenated: bool,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor]:
    """w*A [S, n] and dH (like h) in grad_out's dtype, and the shares of <dA, A>, [column tiles, S] fp32.

    grad_out [T, d] contiguous; weight: the down projection per expert as [d, n], any strides; h [S, 2n] or [S, n] as
    `up` made it; router_weights [T, K] contiguous. Rows past offsets[E] are neither read nor written.
    """
    gated = check_activation(activation)
    num_slots, size_d = source.shape[0], grad_out.shape[1]
    weighted_a = grad_out.new_empty((num_slots, size_n))
    grad_h = torch.empty_like(h)
    num_n = triton.cdiv(size_n, config.block_n)
    shares = grad_out.new_empty((num_n, num_slots), dtype=torch.float32)
    table, num_tiles, max_tiles = tiles.select(config.block_m)
    weight_data, weight_constants = weight_argument(
        weight, config, size_k=size_d, size_columns=size_n, halves=1, block_n=config.block_n
    )
    d_hidden_kernel[persistent_grid(grad_out.device, max_tiles * num_n, config)](
        grad_out,
        source,
        weight_data,
        h,
        router_weights,
        weighted_a,
        grad_h,
        shares,
        table,
        num_tiles,
        offsets,
        size_d,
        size_n,
        num_slots,
        weight.stride_e,
        *weight.strides,
        TOP_K=router_weights.shape[1],
        ACTIVATION=activation,
        GATED=gated,
        CONCATENATED=is_concatenated,
        **weight_constants,
        EVEN_K=size_d % config.block_k == 0,
        **launch_options(grad_out.device, config),
    )
    return weighted_a, grad_h, shares


@triton.jit(do_not_specialize=["num_slots", "num_shares"])
def router_weight_kernel(
    shares,
    grad_out,
    source,
    bias,
    grad_weights,
    table,
    num_tiles,
    offsets,
    num_shares,
    size_d,
    num_slots,
    bias_stride_e,
    bias_stride_d,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_TABLE: tl.constexpr,
    BIAS_ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per row tile: the shares in column order, then <dO, b2>, to the row's slot."""
    tile = tl.program_id(0)
    if tile < tl.load(num_tiles):
        expert, first_row, end_row = load_tile(table, offsets, tile, BLOCK_M)
        rows = first_row + tl.arange(0, BLOCK_M)
        row_mask = rows < end_row
        slots = tl.load(source + rows, mask=row_mask, other=0)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        column_shares = shares + rows
        for _ in tl.range(0, num_shares):
            total += tl.load(column_shares, mask=row_mask, other=0.0)
            column_shares += num_slots
        if HAS_BIAS:
            DTYPE: tl.constexpr = grad_out.dtype.element_ty
            b = expert_base(bias, expert, bias_stride_e, BIAS_TABLE, BIAS_ALIGNMENT, DTYPE)
            grad_rows = grad_out + (slots // TOP_K).to(tl.int64) * size_d
            for start in tl.range(0, size_d, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                inside = columns < size_d
                grad = tl.load(
                    grad_rows[:, None] + columns[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0
                )
                bias_part = tl.load(b + columns * bias_stride_d, mask=inside, other=0.0).to(tl.float32)
                total += tl.sum(grad.to(tl.float32) * bias_part[None, :], 1)
        tl.store(grad_weights + slots, total.to(grad_weights.dtype.element_ty), mask=row_mask)


def d_router_weights(
    shares: Tensor,
    grad_out: Tensor,
    source: Tensor,
    tiles: TileTables,
    offsets: Tensor,
    bias: PerExpert | None,
    like: Tensor,
) -> Tensor:
    """dw [T, K] in the dtype of `like`, the router weights; 0 where a choice has no row.

    `shares` come from `d_hidden`; `bias` is the down projection's, per expert [d].
    """
    grad_weights = torch.zeros_like(like, memory_format=torch.contiguous_format)
    block_m = tiles.block_sizes[0]
    table, num_tiles, max_tiles = tiles.select(block_m)
    router_weight_kernel[(max_tiles,)](
        shares,
        grad_out,
        source,
        shares if bias is None else bias.data,
        grad_weights,
        table,
        num_tiles,
        offsets,
        shares.shape[0],
        grad_out.shape[1],
        shares.shape[1],
        0 if bias is None else bias.stride_e,
        0 if bias is None else bias.strides[0],
        TOP_K=like.shape[1],
        HAS_BIAS=bias is not None,
        BIAS_TABLE=bias is not None and bias.is_table,
        BIAS_ALIGNMENT=1 if bias is None else bias.alignment,
        BLOCK_M=block_m,
        BLOCK_D=128,
    )
    return grad_weights


def offline_cases(arch: str) -> list[Case]:
    """Every shipped configuration; the first of each op also with every activation and weight layout."""
    cases = []
    for op, activations in (("d_hidden_gated", GATED), ("d_hidden", UNGATED)):
        entries = [entry for entry in shipped_configs(arch) if entry.op == op]
        # (configuration, activation, is_transposed, is_concatenated, addresses instead of a stacked tensor)
        variants = [(entry, activations[0], False, True, False) for entry in entries]
        variants += [(entries[0], activation, False, True, False) for activation in activations[1:]]
        variants += [(entries[0], activations[-1], True, op == "d_hidden", True)]
        for number, (entry, activation, transposed, concatenated, addresses) in enumerate(variants):
            stored = f"*{entry.dtype}"
            pointers = dict.fromkeys(("grad_out", "h", "weighted_a", "grad_h"), stored)
            weight, weight_constants = offline_weight(
                entry, addresses=addresses, by_k=transposed, block_n=entry.config.block_n
            )
            pointers |= {"weight": weight, "router_weights": "*fp32", "shares": "*fp32"}
            cases.append(
                offline_case(
                    d_hidden_kernel,
                    entry,
                    arch,
                    variant=activation + "_T" * transposed + "_pairs" * (not concatenated) + "_addresses" * addresses,
                    pointers=pointers | dict.fromkeys(("source", "table", "num_tiles", "offsets"), "*i32"),
                    unit_strides=("weight_stride_d" if transposed else "weight_stride_n",),
                    sample=number == 0,
                    TOP_K=8,
                    ACTIVATION=activation,
                    GATED=op == "d_hidden_gated",
                    CONCATENATED=concatenated,
                    **weight_constants,
                    EVEN_K=not addresses,
                )
            )
    shares = {"shares": "*fp32", "grad_out": "*bf16", "bias": "*bf16", "grad_weights": "*fp32"}
    cases.append(
        Case(
            name="d_router_weights",
            fn=router_weight_kernel,
            signature=shares
            | dict.fromkeys(("source", "table", "num_tiles", "offsets"), "*i32")
            | dict.fromkeys(("num_shares", "size_d", "num_slots", "bias_stride_e"), "i32"),
            constexprs={"bias_stride_d": 1, "TOP_K": 8, "HAS_BIAS": True, "BIAS_TABLE": False, "BIAS_ALIGNMENT": 16}
            | {"BLOCK_M": 16, "BLOCK_D": 128},
        )
    )
    return cases
