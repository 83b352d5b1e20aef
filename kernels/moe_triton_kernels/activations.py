"""The activations and their derivatives, as device functions on fp32 tiles.

A gated activation is factor(gate) * up; an ungated one is factor(x) alone. gpt_oss clamps both halves first and adds
one to the clamped `up`. The definition is `activate` of the reference; the names are the same strings.
"""

from __future__ import annotations

import triton
import triton.language as tl

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "gpt_oss")
UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def check_activation(activation: str) -> bool:
    """True for a gated activation, False for an ungated one; ValueError for a name that is neither."""
    if activation not in GATED + UNGATED:
        raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(GATED + UNGATED)}")
    return activation in GATED


@triton.constexpr_function
def is_gated(activation):
    return activation in GATED


@triton.jit
def gelu_tanh_gate(x):
    # x * sigmoid(2y) equals 0.5 * x * (1 + tanh(y)), without the cancellation of 1 + tanh
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def factor(x, ACTIVATION: tl.constexpr):
    """The value that multiplies `up` (gated), or the result itself (ungated)."""
    if ACTIVATION == "swiglu" or ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "geglu" or ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "geglu_tanh" or ACTIVATION == "gelu_tanh":
        return x * gelu_tanh_gate(x)
    elif ACTIVATION == "gpt_oss":
        clamped = tl.minimum(x, 7.0)
        return clamped * tl.sigmoid(1.702 * clamped)
    elif ACTIVATION == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def factor_slope(x, ACTIVATION: tl.constexpr):
    """d factor / dx. At a kink it is PyTorch's choice: 0 for relu at 0, 1 for clamp at its limit."""
    if ACTIVATION == "swiglu" or ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "geglu" or ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "geglu_tanh" or ACTIVATION == "gelu_tanh":
        s = gelu_tanh_gate(x)
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "gpt_oss":
        clamped = tl.minimum(x, 7.0)
        s = tl.sigmoid(1.702 * clamped)
        return tl.where(x <= 7.0, s * (1.0 + 1.702 * clamped * (1.0 - s)), 0.0)
    elif ACTIVATION == "relu2":
        return 2.0 * tl.maximum(x, 0.0)
    else:
        return tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def up_factor(up, ACTIVATION: tl.constexpr):
    """What factor(gate) is multiplied by."""
    if ACTIVATION == "gpt_oss":
        return tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
    else:
        return up


@triton.jit
def up_slope(up, ACTIVATION: tl.constexpr):
    """d up_factor / d up."""
    if ACTIVATION == "gpt_oss":
        return tl.where((up >= -7.0) & (up <= 7.0), 1.0, 0.0)
    else:
        return 1.0
