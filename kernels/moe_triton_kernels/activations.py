"""The activations and their derivatives, as device functions on fp32 tiles.

A gated activation is factor(gate) * up_factor(up); an ungated one is factor(x) alone. Where there is a limit both
halves are cut at it first. The definition is `activate` of the reference; the names are the same strings.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "gpt_oss")
UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Activation:
    """What a kernel is compiled for: all layers of a model share one or two, and a register for each would cost more.

    limit  where gate and up are cut, a number of the pre-activation's dtype; None for nowhere
    alpha  the slope of the gate's sigmoid, of swiglu and gpt_oss
    """

    name: str
    limit: float | None = None
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in GATED + UNGATED:
            raise ValueError(f"activation: got {self.name!r}, wanted one of {', '.join(GATED + UNGATED)}")

    @property
    def is_gated(self) -> bool:
        return self.name in GATED

    def __str__(self) -> str:
        alpha = "" if self.alpha == 1 else f"_alpha{self.alpha:g}"
        return self.name + alpha + ("" if self.limit is None else f"_limit{self.limit:g}")


# Every branch of the functions below, for the tools: DeepSeek-V4's gate among them, and gpt-oss's.
GATED_CASES = (
    *map(Activation, GATED[:-1]),
    Activation("gpt_oss", limit=7.0, alpha=1.702),
    Activation("swiglu", limit=10.0),
    Activation("swiglu", limit=7.0, alpha=1.702),
)
UNGATED_CASES = tuple(map(Activation, UNGATED))


@triton.constexpr_function
def is_gated(activation):
    return activation.is_gated


@triton.constexpr_function
def name_of(activation):
    return activation.name


@triton.constexpr_function
def limit_of(activation):
    return activation.limit


@triton.constexpr_function
def alpha_of(activation):
    return activation.alpha


@triton.jit
def cut_gate(x, ACTIVATION: tl.constexpr):
    LIMIT: tl.constexpr = limit_of(ACTIVATION)
    if LIMIT is not None:
        return tl.where(x > LIMIT, LIMIT, x)  # a NaN stays one
    else:
        return x


@triton.jit
def gelu_tanh_gate(x):
    # x * sigmoid(2y) equals 0.5 * x * (1 + tanh(y)), without the cancellation of 1 + tanh
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def factor(x, ACTIVATION: tl.constexpr):
    """The value that multiplies `up` (gated), or the result itself (ungated)."""
    NAME: tl.constexpr = name_of(ACTIVATION)
    ALPHA: tl.constexpr = alpha_of(ACTIVATION)
    if NAME == "swiglu" or NAME == "gpt_oss" or NAME == "silu":
        cut = cut_gate(x, ACTIVATION)
        return cut * tl.sigmoid(ALPHA * cut)
    elif NAME == "geglu" or NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "geglu_tanh" or NAME == "gelu_tanh":
        return x * gelu_tanh_gate(x)
    elif NAME == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def factor_slope(x, ACTIVATION: tl.constexpr):
    """d factor / dx. At a kink it is the reference's choice: 0 for relu at 0, 1 at a limit."""
    NAME: tl.constexpr = name_of(ACTIVATION)
    ALPHA: tl.constexpr = alpha_of(ACTIVATION)
    LIMIT: tl.constexpr = limit_of(ACTIVATION)
    if NAME == "swiglu" or NAME == "gpt_oss" or NAME == "silu":
        cut = cut_gate(x, ACTIVATION)
        s = tl.sigmoid(ALPHA * cut)
        slope = s * (1.0 + ALPHA * cut * (1.0 - s))
        if LIMIT is not None:
            slope = tl.where(x > LIMIT, 0.0, slope)
        return slope
    elif NAME == "geglu" or NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif NAME == "geglu_tanh" or NAME == "gelu_tanh":
        s = gelu_tanh_gate(x)
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif NAME == "relu2":
        return 2.0 * tl.maximum(x, 0.0)
    else:
        return tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def up_factor(up, ACTIVATION: tl.constexpr):
    """What factor(gate) is multiplied by."""
    NAME: tl.constexpr = name_of(ACTIVATION)
    LIMIT: tl.constexpr = limit_of(ACTIVATION)
    if LIMIT is not None:
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return up + 1.0 if NAME == "gpt_oss" else up


@triton.jit
def up_slope(up, ACTIVATION: tl.constexpr):
    """d up_factor / d up."""
    LIMIT: tl.constexpr = limit_of(ACTIVATION)
    if LIMIT is not None:
        return tl.where((up > LIMIT) | (up < -LIMIT), 0.0, 1.0)
    else:
        return 1.0
