"""What a router makes of its logits: device functions on fp32 values in registers."""

from __future__ import annotations

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
TOPK_SOFTMAX = tl.constexpr(1)
SIGMOID = tl.constexpr(2)  # from here on, an expert's score follows from its own logit
SQRT_SOFTPLUS = tl.constexpr(3)
SCORES = {"softmax": 0, "topk_softmax": 1, "sigmoid": 2, "sqrt_softplus": 3}
EPS = tl.constexpr(1e-20)  # keeps a normalisation finite when every chosen score underflowed


@triton.jit
def ordered_bits(x):
    """fp32, not NaN -> int32 in the same order; -0.0 equals 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def first_of(keys, best, index, SIZE: tl.constexpr):
    """The lowest index at which keys [N, SIZE] have their row's maximum `best` [N]."""
    return tl.min(tl.where(keys == best[:, None], index, SIZE), 1)


@triton.jit
def softmax_rows(x, valid):
    """Softmax of x [N, M] over its rows, and log(sum(exp(x))) [N]; zeros for the rows, all -inf, that are not valid."""
    most = tl.where(valid, tl.max(x, 1), 0.0)
    e = tl.exp(x - most[:, None])
    total = tl.sum(e, 1)
    return e * tl.where(valid, 1.0 / total, 0.0)[:, None], tl.where(valid, most + tl.log(total), 0.0)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sqrt_softplus(x):
    """sqrt(log(1 + exp(x))); log(1 + y) for y <= 1 as 2 atanh(y / (2 + y)), since log is inexact near 1."""
    y = tl.exp(-tl.abs(x))
    r = y / (2.0 + y)
    q = r * r
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13))))))
    return tl.where(x < -40.0, tl.exp(0.5 * x), tl.sqrt(tl.maximum(x, 0.0) + 2.0 * r * series))


@triton.jit
def own_score(x, SCORE: tl.constexpr):
    """The score that an expert has by its own logit."""
    if SCORE == SIGMOID:
        return sigmoid(x)
    else:
        return sqrt_softplus(x)


@triton.jit
def scores_of(x, softmax, SCORE: tl.constexpr):
    """The scores that a choice bias is added to."""
    if SCORE >= SIGMOID:
        return own_score(x, SCORE)
    elif SCORE == SOFTMAX:
        return softmax
    else:
        return x


@triton.jit
def scores_of_chosen(logit, lse, has_weight, SCORE: tl.constexpr):
    """The chosen experts' scores [N, K], from their logits [N, K], -inf where there is no weight, and the lse [N]."""
    if SCORE == TOPK_SOFTMAX:
        score, _ = softmax_rows(logit, tl.max(has_weight.to(tl.int32), 1) != 0)
    elif SCORE >= SIGMOID:
        score = own_score(logit, SCORE)
    else:
        score = tl.exp(logit - lse[:, None])
    return score
