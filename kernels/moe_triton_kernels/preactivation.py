"""The pre-activation H in the epilogues of up and d_hidden: how its columns lie, and what the activation makes of them.

A program holds a block of H's columns as a tuple, its parts, in one of three forms:

    gated, concatenated   (gate, up): columns j and n + j of [gate | up]
    gated, interleaved    (pairs,): columns 2j and 2j + 1 of g0, u0, g1, u1, ...
    ungated               (x,)

`split_pair` makes (gate, up), or (x,), of the parts; `join_pair` makes parts of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_triton_kernels.activations import factor, factor_slope, is_gated, up_factor, up_slope
from moe_triton_kernels.grouped_gemm import halves, split_columns
from moe_triton_kernels.operands import add_bias


@triton.jit
def part_blocks(acc, HALVES: tl.constexpr, PARTS: tl.constexpr):
    """PARTS column blocks of each half of an accumulator, left to right: a tuple for every half."""
    if HALVES == 2:
        left, right = halves(acc)
        return split_columns(left, PARTS), split_columns(right, PARTS)
    else:
        return (split_columns(acc, PARTS),)


@triton.jit
def round_parts(
    blocks,
    bias,
    base,
    columns,
    inside,
    size_n,
    NUMBER: tl.constexpr,
    DTYPE: tl.constexpr,
    HALVES: tl.constexpr,
):
    """The parts in DTYPE: blocks of this NUMBER of `part_blocks`, of these columns, plus the bias (see `add_bias`)."""
    first = add_bias(blocks[0][NUMBER], bias, base, columns, inside).to(DTYPE)
    if HALVES == 2:
        return first, add_bias(blocks[1][NUMBER], bias, base, size_n + columns, inside).to(DTYPE)
    else:
        return (first,)


@triton.jit
def load_parts(cells, size_n, mask, HALVES: tl.constexpr):
    """The parts at the pointers `cells`; those of the second half lie size_n columns further."""
    first = tl.load(cells, mask=mask, other=0.0)
    if HALVES == 2:
        return first, tl.load(cells + size_n, mask=mask, other=0.0)
    else:
        return (first,)


@triton.jit
def split_pair(parts, ACTIVATION: tl.constexpr, HALVES: tl.constexpr):
    """(gate, up), or (x,) for an ungated activation."""
    if HALVES == 1 and is_gated(ACTIVATION):
        pairs = parts[0].to(tl.float32)
        return pairs.reshape(pairs.shape[0], pairs.shape[1] // 2, 2).split()
    else:
        return parts


@triton.jit
def join_pair(pair, ACTIVATION: tl.constexpr, HALVES: tl.constexpr, DTYPE: tl.constexpr):
    """The parts, in DTYPE, of what `split_pair` gives."""
    if HALVES == 2:
        return pair[0].to(DTYPE), pair[1].to(DTYPE)
    elif is_gated(ACTIVATION):
        pairs = tl.join(pair[0].to(DTYPE), pair[1].to(DTYPE))
        return (pairs.reshape(pairs.shape[0], 2 * pairs.shape[1]),)
    else:
        return (pair[0].to(DTYPE),)


@triton.jit
def activate(pair, ACTIVATION: tl.constexpr):
    """activation(H), fp32."""
    value = factor(pair[0].to(tl.float32), ACTIVATION)
    if is_gated(ACTIVATION):
        return value * up_factor(pair[1].to(tl.float32), ACTIVATION)
    else:
        return value


@triton.jit
def d_activate(grad, scale, pair, ACTIVATION: tl.constexpr):
    """activation(H), and grad * scale * activation'(H) as a pair, fp32."""
    first = pair[0].to(tl.float32)
    if is_gated(ACTIVATION):
        second = pair[1].to(tl.float32)
        gate_value = factor(first, ACTIVATION)
        up_value = up_factor(second, ACTIVATION)
        value = gate_value * up_value
        grad = grad * scale
        d_gate = grad * up_value * factor_slope(first, ACTIVATION)
        d_up = grad * gate_value * up_slope(second, ACTIVATION)
        return value, (d_gate, d_up)
    else:
        return factor(first, ACTIVATION), (grad * scale * factor_slope(first, ACTIVATION),)
