"""Loops over activations with a gate times its sigmoid, and what other loops need of them; see `loops`."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from ctypes import Structure, c_double
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import carray, from_dtype, njit, types
from numba.extending import register_jitable

from moe_triton.backends.torch.addresses import next_of, pointer_to
from moe_triton.backends.torch.loops import (
    FUSED,
    SUMS,
    bits_of_float,
    f32,
    float_of_bits,
    i32,
    named,
    quickly_rounded,
    started,
    u16,
    u32,
    widened,
)
from moe_triton.backends.torch.row_loops import bits_at, fields, floats_at


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


class Activation(Structure):
    """The activation of rows, gate * sigmoid(alpha * gate) * (up + offset) of h = (gate, up) [num_rows, 2n].

    Gate and up are cut at `limit` as `activations` says. In bf16, all but w and grad_w hold bits. Where gate and up
    alternate, h and grad_h are read as integers for each pair [num_rows, n], the gate's bits in the lower half: of
    these LLVM makes vectors.

    a              [num_rows, n], which `forward` writes; `backward` reads its gradient from there
    w              the rows' weights [num_rows] fp32
    grad_h         the gradient of h, given that of w * a
    weighted_a     w * a [num_rows, n]
    grad_w         the sums over n of a times its gradient [num_rows] fp32
    """

    _fields_ = fields("num_rows n h a w grad_h weighted_a grad_w")
    _fields_ += [(name, c_double) for name in ("alpha", "limit", "offset")]


class ActivationLoops(NamedTuple):
    """Two functions of the address of an `Activation`, which all of torch's threads run at once: see `row_loops`."""

    forward: object
    backward: object


PIECE = 16  # rows that a thread takes at a time
as_activation, as_pairs, as_wide_pairs = (
    pointer_to(number) for number in (from_dtype(np.dtype(Activation)), types.uint32, types.uint64)
)


@register_jitable
def pairs_at(address, num_rows, columns):
    return carray(as_pairs(address), (num_rows, columns))


@register_jitable
def wide_pairs_at(address, num_rows, columns):
    return carray(as_wide_pairs(address), (num_rows, columns))


@cache
def activation_loops(is_bf16, is_concatenated):
    """Return the loops over rows in bf16 or in fp32, whose gate comes before up, or alternates with it."""

    @register_jitable
    @named(is_bf16, is_concatenated)
    def number(stored):
        return widened(stored) if is_bf16 else stored

    @register_jitable
    @named(is_bf16, is_concatenated)
    def stored(number):
        return quickly_rounded(number) if is_bf16 else number

    if is_concatenated:

        @register_jitable
        @named(is_bf16, is_concatenated)
        def at(gates, ups, j):
            return number(gates[j]), number(ups[j])

        @register_jitable
        @named(is_bf16, is_concatenated)
        def write(gates, ups, j, gate, up):
            gates[j], ups[j] = stored(gate), stored(up)
    else:
        word, narrow = (u32, u16) if is_bf16 else (np.uint64, u32)
        half, mask = word(16 if is_bf16 else 32), word(0xFFFF if is_bf16 else 0xFFFFFFFF)
        of_bits, bits_of = (widened, quickly_rounded) if is_bf16 else (float_of_bits, bits_of_float)

        @register_jitable
        @named(is_bf16, is_concatenated)
        def at(pairs, _, j):
            return of_bits(narrow(pairs[j] & mask)), of_bits(narrow(pairs[j] >> half))

        @register_jitable
        @named(is_bf16, is_concatenated)
        def write(pairs, _, j, gate, up):
            pairs[j] = word(bits_of(gate)) | word(word(bits_of(up)) << half)

    @register_jitable
    @named(is_bf16, is_concatenated)
    def parts(gate, up, alpha, limit, offset):
        """What is activated, its sigmoid, and what it is multiplied by."""
        g = at_most(gate, limit)
        return g, sigmoid(alpha * g), at_least(at_most(up, limit), -limit) + offset

    @register_jitable
    @named(is_bf16, is_concatenated)
    def numbers(address, num_rows, columns):
        if is_bf16:
            return bits_at(address, num_rows, columns)
        else:
            return floats_at(address, num_rows, columns)

    @register_jitable
    @named(is_bf16, is_concatenated)
    def halves(address, num_rows, n):
        if is_concatenated:
            return numbers(address, num_rows, 2 * n)
        elif is_bf16:
            return pairs_at(address, num_rows, n)
        else:
            return wide_pairs_at(address, num_rows, n)

    @named(is_bf16, is_concatenated)
    def forward(address):
        job = carray(as_activation(address), 1)[0]
        n, alpha, limit, offset = job.n, f32(job.alpha), f32(job.limit), f32(job.offset)
        h, a = halves(job.h, job.num_rows, n), numbers(job.a, job.num_rows, n)
        first = next_of(address) * PIECE
        while first < job.num_rows:
            for i in range(first, min(first + PIECE, job.num_rows)):
                gates, ups, out = h[i, :n], h[i, n:], a[i]
                for j in range(n):
                    gate, up = at(gates, ups, j)
                    g, s, u = parts(gate, up, alpha, limit, offset)
                    out[j] = stored(g * s * u)
            first = next_of(address) * PIECE

    @named(is_bf16, is_concatenated)
    def backward(address):
        job = carray(as_activation(address), 1)[0]
        n, alpha, limit, offset = job.n, f32(job.alpha), f32(job.limit), f32(job.offset)
        h, grad_h = halves(job.h, job.num_rows, n), halves(job.grad_h, job.num_rows, n)
        grad_a, weighted_a = numbers(job.a, job.num_rows, n), numbers(job.weighted_a, job.num_rows, n)
        w, grad_w = floats_at(job.w, 1, job.num_rows)[0], floats_at(job.grad_w, 1, job.num_rows)[0]
        terms = np.empty(n, f32)
        first = next_of(address) * PIECE
        while first < job.num_rows:
            for i in range(first, min(first + PIECE, job.num_rows)):
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
            first = next_of(address) * PIECE

    return ActivationLoops(started(forward, fastmath=FUSED), started(backward, fastmath=FUSED))
