"""Loops over activations with a gate times its sigmoid, and what other loops need of them; see `loops`."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numba.extending import register_jitable

from moe_triton.backends.torch.loops import (
    FUSED,
    SUMS,
    bits_of_float,
    compiled,
    f32,
    float_of_bits,
    i32,
    rounded,
    u16,
    u32,
    widened,
)


@register_jitable
def at_most(x, limit):
    """The smaller one; a NaN stays."""
    return limit if x > limit else x


@register_jitable
def at_least(x, limit):
    """The larger one; a NaN stays."""
    return limit if x < limit else x


@register_jitable
def exp(x):
    """e^x to 1e-7: 2^n times a polynomial, by S. Moshier's coefficients in Cephes (expf), |x - n ln 2| <= ln 2 / 2."""
    inside = at_least(at_most(x, f32(88)), f32(-87))
    n = np.floor(inside * f32(1.4426950408889634) + f32(0.5))
    r = inside - n * f32(0.693359375) + n * f32(2.12194440e-4)  # ln 2 in two parts, of which the first is exact
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    found = (p * r * r + r + f32(1)) * float_of_bits(u32(i32(n) + i32(127)) << u32(23))
    return f32(np.inf) if x > f32(88) else f32(0) if x < f32(-87) else found


@register_jitable
def sigmoid(x):
    return f32(1) / (f32(1) + exp(-x))


@njit(nogil=True, fastmath=SUMS)
def sum_of(terms):
    """The sum of a row. Its own function: where sums may be cut, the two parts of ln 2 would become one."""
    total = f32(0)
    for j in range(len(terms)):
        total += terms[j]
    return total


class ActivationLoops(NamedTuple):
    """The compiled loops of gate * sigmoid(alpha * gate) * (up + offset) over rows h = (gate, up) [m, 2n].

    Gate and up are cut at `limit` as `activations` says; for bf16 all arrays but those of rows hold bits. Where they
    alternate, h is an integer for each pair [m, n], the gate's bits in its lower half: of these LLVM makes vectors.

    forward(h, alpha, limit, offset, a, first, last)
        writes the activation a [m, n] of the rows first <= i < last
    backward(h, grad_a, w, alpha, limit, offset, grad_h, weighted_a, grad_w, first, last)
        writes w * a to weighted_a, a . grad_a to grad_w [m] fp32, and to grad_h the gradient that w * grad_a gives
    """

    forward: object
    backward: object


@cache
def activation_loops(is_bf16, is_concatenated):
    """Return the loops over rows in bf16 or in fp32, whose gate comes before up, or alternates with it."""

    @register_jitable
    def number(stored):
        return widened(stored) if is_bf16 else stored

    @register_jitable
    def stored(number):
        return rounded(number) if is_bf16 else number

    if is_concatenated:

        @register_jitable
        def at(gates, ups, j):
            return number(gates[j]), number(ups[j])

        @register_jitable
        def write(gates, ups, j, gate, up):
            gates[j], ups[j] = stored(gate), stored(up)
    else:
        word, narrow = (u32, u16) if is_bf16 else (np.uint64, u32)
        half, mask = word(16 if is_bf16 else 32), word(0xFFFF if is_bf16 else 0xFFFFFFFF)
        of_bits, bits_of = (widened, rounded) if is_bf16 else (float_of_bits, bits_of_float)

        @register_jitable
        def at(pairs, _, j):
            return of_bits(narrow(pairs[j] & mask)), of_bits(narrow(pairs[j] >> half))

        @register_jitable
        def write(pairs, _, j, gate, up):
            pairs[j] = word(bits_of(gate)) | word(word(bits_of(up)) << half)

    @register_jitable
    def parts(gate, up, alpha, limit, offset):
        """What is activated, its sigmoid, and what it is multiplied by."""
        g = at_most(gate, limit)
        return g, sigmoid(alpha * g), at_least(at_most(up, limit), -limit) + offset

    def forward(h, alpha, limit, offset, a, first, last):
        n, alpha, limit, offset = a.shape[1], f32(alpha), f32(limit), f32(offset)
        for i in range(first, last):
            gates, ups, out = h[i, :n], h[i, n:], a[i]
            for j in range(n):
                gate, up = at(gates, ups, j)
                g, s, u = parts(gate, up, alpha, limit, offset)
                out[j] = stored(g * s * u)

    def backward(h, grad_a, w, alpha, limit, offset, grad_h, weighted_a, grad_w, first, last):
        n, alpha, limit, offset = grad_a.shape[1], f32(alpha), f32(limit), f32(offset)
        terms = np.empty(n, f32)
        for i in range(first, last):
            gates, ups, grad, out = h[i, :n], h[i, n:], grad_a[i], weighted_a[i]
            grad_gates, grad_ups, weight = grad_h[i, :n], grad_h[i, n:], w[i]
            for j in range(n):
                gate, up = at(gates, ups, j)
                g, s, u = parts(gate, up, alpha, limit, offset)
                a, da = g * s * u, number(grad[j])
                terms[j] = a * da
                out[j] = stored(a * weight)
                slope = s * (f32(1) + alpha * g * (f32(1) - s))  # d (g * sigmoid(alpha * g)) / d g
                grad_gate = f32(0) if gate > limit else weight * da * u * slope
                grad_up = f32(0) if abs(up) > limit else weight * da * g * s
                write(grad_gates, grad_ups, j, grad_gate, grad_up)
            grad_w[i] = sum_of(terms)

    return ActivationLoops(compiled(forward, fastmath=FUSED), compiled(backward, fastmath=FUSED))
