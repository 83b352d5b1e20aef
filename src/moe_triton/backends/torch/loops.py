"""Loops that numba compiles for the processor at hand (`pip install moe-triton[cpu]`): over codes, and activations.

torch's element-wise operations take several passes over memory; here intermediate numbers stay in registers. `fused`
says whether these loops run, and imports this module at the first use: importing numba takes half a second. All of them
are in one file, since what numba keeps on disk is valid until the file of a loop changes.

Each element of a result is computed by one thread in a fixed order: the bits depend on neither the threads nor the run.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, register_jitable

from moe_triton.quantization.formats import FORMATS

f32, i32, u16, u32 = np.float32, np.int32, np.uint16, np.uint32
FUSED = {"contract"}  # lets a product and a sum become one instruction
SUMS = {"reassoc", "contract", "nsz"}  # lets a sum be cut into as many partial ones as a vector has lanes


def compiled(function, **options):
    """Compile at the first call, and keep the result on disk where there is a writable folder for it."""
    options |= {"nogil": True, "error_model": "numpy"}  # a check for a divisor of zero would forbid vectors
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # numba found no such folder
        return njit(function, **options)


@intrinsic
def float_of_half(typing_context, bits):
    """The number whose fp16 bits these are: exact, whatever the processor does with subnormal operands."""

    def lower(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), lower


@intrinsic
def bits_of_float(typing_context, number):
    def lower(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), lower


@intrinsic
def float_of_bits(typing_context, bits):
    def lower(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), lower


@register_jitable
def widened(bits):
    """The number whose bf16 bits these are."""
    return float_of_bits(u32(u32(bits) << u32(16)))


@register_jitable
def rounded(number):
    """The bits of the nearest bf16 number, ties to even."""
    bits = bits_of_float(number)
    nearest = (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)
    return u16(nearest) if number == number else u16(0x7FC0)


# Codes: the number of code k of a word, divided by the format's unit --------------------------------------------------
#
# A word is 16 bits of codes: four codes of four bits, or two of eight. Plane k of a row holds the number of code k of
# every word, so that a loop over a plane reads neighbouring words and needs no shuffles. Everything that a product
# contracts is in the order of planes, which changes no result but for the order of its sum.


@register_jitable
def e2m1(word, k):
    """Sign, exponent and mantissa go to their places in fp16, whose bias is larger by 14."""
    at_top = u16(word << u16(12 - 4 * k))
    return float_of_half(u16((at_top & u16(0x8000)) | ((at_top >> u16(3)) & u16(0x0E00))))


@register_jitable
def e4m3(word, k):
    """As `e2m1`, with a bias larger by 8. A NaN becomes 1.875: see `has_nan`."""
    at_top = u16(word << u16(8 - 8 * k))
    return float_of_half(u16((at_top & u16(0x8000)) | ((at_top >> u16(1)) & u16(0x3F80))))


@register_jitable
def four_bits(word, k):
    return f32(i32((word >> u16(4 * k)) & u16(0xF)))


@register_jitable
def eight_bits(word, k):
    return f32(i32((word >> u16(8 * k)) & u16(0xFF)))


@register_jitable
def is_nan(word, k):
    """Whether an e4m3 code is a NaN."""
    return (word >> u16(8 * k)) & u16(0x7F) == u16(0x7F)


@register_jitable
def has_nan(words):
    """Whether any e4m3 code is a NaN."""
    largest = u16(0)
    for j in range(len(words)):
        largest = max(largest, words[j] & u16(0x7F), (words[j] >> u16(8)) & u16(0x7F))
    return largest == u16(0x7F)


class Codes(NamedTuple):
    """How to read the codes of a format: `number` times `unit`, less the zero point of an integer."""

    number: object
    unit: float = 1.0
    can_be_nan: bool = False


CODES = {
    "mxfp4": Codes(e2m1, 2.0**14),
    "nvfp4": Codes(e2m1, 2.0**14),
    "fp8": Codes(e4m3, 2.0**8, can_be_nan=True),
    "int8": Codes(eight_bits),
    "int4": Codes(four_bits),
}


# Scales: the number of a stored one -----------------------------------------------------------------------------------


@register_jitable
def looked_up(stored, table):
    return table[stored]


@register_jitable
def as_stored(stored, table):
    return stored


@register_jitable
def of_bf16(stored, table):
    return widened(stored)


@register_jitable
def of_half(stored, table):
    return float_of_half(stored)


SCALES = {
    torch.uint8: looked_up,
    torch.float8_e4m3fn: looked_up,
    torch.float32: as_stored,
    torch.bfloat16: of_bf16,
    torch.float16: of_half,
}


# Loops over codes -----------------------------------------------------------------------------------------------------


class CodeLoops(NamedTuple):
    """The compiled loops of one kind of projection. `stored`: see `stored.StoredCodes`; `step`: the words of a group.

    few_rows(stored, step, experts, bounds, x, y, first, last)
        y[r, o] = x[r] . projection(experts[p])[o] for bounds[p] <= r < bounds[p+1] and first <= o < last
    decode(stored, step, expert, row, words, out, first, last)
        out[i] = planes of projection(expert)[row + i] over `words`, (first, last), for first <= i < last; fp32
    decode_to_bf16
        the same, rounded, as bits
    """

    few_rows: object
    decode: object
    decode_to_bf16: object


def code_loops(name, scale_dtype, has_zeros):
    """Return the loops over codes of a format with scales of a dtype, with zero points or without."""
    kind = FORMATS[name]
    zero_point = kind.zero_point if kind.is_integer else 0
    return loops_over(CODES[name], SCALES[scale_dtype], 16 // kind.bits, kind.rows, zero_point, has_zeros)


@cache
def loops_over(codes_of, scale, planes, block_rows, zero_point, has_zeros):
    """Return the loops of all formats that these describe: mxfp4 and nvfp4 have the same."""
    number, unit, can_be_nan = codes_of

    @register_jitable
    def spread(stored, expert, o, group, step, scale_of, zero_of):
        """Write the scale and the zero point of every word of row o, from `group` on."""
        _, scales, table, factors, zeros = stored
        for g in range(-(-len(scale_of) // step)):
            here = slice(g * step, (g + 1) * step)
            scale_of[here] = scale(scales[expert, o // block_rows, group + g], table) * factors[expert]
            if has_zeros:
                zero_of[here] = f32(zeros[expert, o, group + g])

    @register_jitable
    def zero_at(zero_of, j):
        return zero_of[j] if has_zeros else f32(zero_point)

    @register_jitable
    def dot(word, zero, x, j):
        """The product of a word's numbers with x at the same places."""
        total = (number(word, 0) - zero) * x[0, j] + (number(word, 1) - zero) * x[1, j]
        if planes == 4:
            total += (number(word, 2) - zero) * x[2, j] + (number(word, 3) - zero) * x[3, j]
        return total

    @register_jitable
    def dots_1(words, scale_of, zero_of, x_0):
        y_0 = f32(0)
        for j in range(len(words)):
            y_0 += dot(words[j], zero_at(zero_of, j), x_0, j) * scale_of[j]
        return y_0

    @register_jitable
    def dots_2(words, scale_of, zero_of, x_0, x_1):
        y_0 = y_1 = f32(0)
        for j in range(len(words)):
            word, zero = words[j], zero_at(zero_of, j)
            y_0 += dot(word, zero, x_0, j) * scale_of[j]
            y_1 += dot(word, zero, x_1, j) * scale_of[j]
        return y_0, y_1

    @register_jitable
    def dots_4(words, scale_of, zero_of, x_0, x_1, x_2, x_3):
        y_0 = y_1 = y_2 = y_3 = f32(0)
        for j in range(len(words)):
            word, zero = words[j], zero_at(zero_of, j)
            y_0 += dot(word, zero, x_0, j) * scale_of[j]
            y_1 += dot(word, zero, x_1, j) * scale_of[j]
            y_2 += dot(word, zero, x_2, j) * scale_of[j]
            y_3 += dot(word, zero, x_3, j) * scale_of[j]
        return y_0, y_1, y_2, y_3

    def few_rows(stored, step, experts, bounds, x, y, first, last):
        codes, u = stored[0], f32(unit)  # multiplies sums: a scale times u may be infinite
        scale_of, zero_of = np.empty(codes.shape[2], f32), np.empty(codes.shape[2], f32)
        for p in range(len(experts)):
            e, end = experts[p], bounds[p + 1]
            for o in range(first, last):
                spread(stored, e, o, 0, step, scale_of, zero_of)
                words, r = codes[e, o], bounds[p]
                while r + 4 <= end:
                    y_0, y_1, y_2, y_3 = dots_4(words, scale_of, zero_of, x[r], x[r + 1], x[r + 2], x[r + 3])
                    y[r, o], y[r + 1, o], y[r + 2, o], y[r + 3, o] = u * y_0, u * y_1, u * y_2, u * y_3
                    r += 4
                if r + 2 <= end:
                    y_0, y_1 = dots_2(words, scale_of, zero_of, x[r], x[r + 1])
                    y[r, o], y[r + 1, o] = u * y_0, u * y_1
                    r += 2
                if r < end:
                    y[r, o] = u * dots_1(words, scale_of, zero_of, x[r])
                if can_be_nan and has_nan(words):
                    y[bounds[p] : end, o] = f32(np.nan)

    def decoder(to_bf16):
        def decode(stored, step, expert, row, word_range, out, first, last):
            codes, (start, stop) = stored[0], word_range
            size = stop - start
            scale_of, zero_of = np.empty(size, f32), np.empty(size, f32)
            for i in range(first, last):
                spread(stored, expert, row + i, start // step, step, scale_of, zero_of)
                words = codes[expert, row + i, start:stop]
                for k in range(planes):
                    plane = out[i, k * size : (k + 1) * size]
                    for j in range(size):
                        found = (number(words[j], k) - zero_at(zero_of, j)) * f32(unit) * scale_of[j]
                        plane[j] = rounded(found) if to_bf16 else found
                if can_be_nan and has_nan(words):
                    for k in range(planes):
                        for j in range(size):
                            if is_nan(words[j], k):
                                out[i, k * size + j] = rounded(f32(np.nan)) if to_bf16 else f32(np.nan)

        return compiled(decode)

    return CodeLoops(compiled(few_rows, fastmath=SUMS), decoder(False), decoder(True))


# Activations: those with a gate times its sigmoid ---------------------------------------------------------------------


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

    Gate and up are cut at `limit` as `activations` says; for bf16 all arrays but those of rows hold bits.

    forward(h, alpha, limit, offset, a, first, last)
        writes the activation a [m, n] of the rows first <= i < last
    backward(h, grad_a, w, alpha, limit, offset, grad_h, weighted_a, grad_w, first, last)
        writes w * a to weighted_a, a . grad_a to grad_w [m] fp32, and to grad_h the gradient that w * grad_a gives
    """

    forward: object
    backward: object


@cache
def activation_loops(is_bf16):
    """Return the loops over rows in bf16, or in fp32."""

    @register_jitable
    def number(stored):
        return widened(stored) if is_bf16 else stored

    @register_jitable
    def stored(number):
        return rounded(number) if is_bf16 else number

    @register_jitable
    def parts(gate, up, alpha, limit, offset):
        """What is activated, its sigmoid, and what it is multiplied by."""
        g = at_most(number(gate), limit)
        return g, sigmoid(alpha * g), at_least(at_most(number(up), limit), -limit) + offset

    def forward(h, alpha, limit, offset, a, first, last):
        n, alpha, limit, offset = a.shape[1], f32(alpha), f32(limit), f32(offset)
        for i in range(first, last):
            gate, up, out = h[i, :n], h[i, n:], a[i]
            for j in range(n):
                g, s, u = parts(gate[j], up[j], alpha, limit, offset)
                out[j] = stored(g * s * u)

    def backward(h, grad_a, w, alpha, limit, offset, grad_h, weighted_a, grad_w, first, last):
        n, alpha, limit, offset = grad_a.shape[1], f32(alpha), f32(limit), f32(offset)
        terms = np.empty(n, f32)
        for i in range(first, last):
            gate, up, grad, out = h[i, :n], h[i, n:], grad_a[i], weighted_a[i]
            grad_gate, grad_up, weight = grad_h[i, :n], grad_h[i, n:], w[i]
            for j in range(n):
                g, s, u = parts(gate[j], up[j], alpha, limit, offset)
                a, da = g * s * u, number(grad[j])
                terms[j] = a * da
                out[j] = stored(a * weight)
                slope = s * (f32(1) + alpha * g * (f32(1) - s))  # d (g * sigmoid(alpha * g)) / d g
                cut_gate, cut_up = number(gate[j]) > limit, abs(number(up[j])) > limit
                grad_gate[j] = stored(f32(0) if cut_gate else weight * da * u * slope)
                grad_up[j] = stored(f32(0) if cut_up else weight * da * g * s)
            grad_w[i] = sum_of(terms)

    return ActivationLoops(compiled(forward, fastmath=FUSED), compiled(backward, fastmath=FUSED))
