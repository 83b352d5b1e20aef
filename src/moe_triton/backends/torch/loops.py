"""Loops over codes that numba compiles for the processor at hand (`pip install moe-triton[cpu]`).

torch's element-wise operations take several passes over memory; here intermediate numbers stay in registers. `fused`
says whether these loops run, and imports this module at the first use: importing numba takes half a second. What numba
keeps on disk of the loops of a file is valid until this file changes: whoever changes what `activation_loops` and
`small_loops` import from here, or one from the other, removes what is kept of them.

Each element of a result is computed by one thread in a fixed order: the bits depend on neither the threads nor the run.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, config, njit, types
from numba.extending import intrinsic, register_jitable

from moe_triton.backends.torch.processor import this_processor
from moe_triton.backends.torch.vectors import BFloatType
from moe_triton.quantization.formats import FORMATS

f32, i32, u16, u32 = np.float32, np.int32, np.uint16, np.uint32
FUSED = {"contract"}  # lets a product and a sum become one instruction
SUMS = {"reassoc", "contract", "nsz"}  # lets a sum be cut into as many partial ones as a vector has lanes


def compiles_for_another() -> bool:
    """Return whether numba compiles for another processor than this (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES)."""
    return bool(config.CPU_NAME or config.CPU_FEATURES)


HAS_BF16 = this_processor().has("avx512_bf16") and not compiles_for_another()


def compiled(function, **options):
    """Compile at the first call, and keep the result on disk where there is a writable folder for it."""
    options |= {"nogil": True, "error_model": "numpy"}  # a check for a divisor of zero would forbid vectors
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # numba found no such folder
        return njit(function, **options)


def named(*traits):
    """Give a nested function a name of its own, made of what its kinds differ in.

    Numba finds compiled functions by their names, and numbers those of the same name as they come: of two kinds that
    different processes compiled and kept on disk, a third would take one for the other.
    """

    def renamed(function):
        function.__qualname__ += "".join(f"_{getattr(trait, '__name__', trait)}" for trait in traits)
        return function

    return renamed


def started(function, **options):
    """Compile a function of a record's address, which threads of a library can call, and keep the result as above."""
    options |= {"error_model": "numpy"}
    try:
        return cfunc(types.void(types.intp), cache=True, **options)(function)
    except RuntimeError:
        return cfunc(types.void(types.intp), **options)(function)


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


@intrinsic
def shifted_with_sign(typing_context, bits, count):
    """16 bits moved to lower places, with the highest one in all places that this leaves free."""

    def lower(context, builder, signature, arguments):
        return builder.ashr(*arguments)

    return types.uint16(types.uint16, types.uint16), lower


@intrinsic
def write_four(typing_context, numbers, place, x):
    """numbers[place : place + 4] = x, in one store: LLVM makes none of its own for so few."""

    def lower(context, builder, signature, arguments):
        four = ir.VectorType(ir.FloatType(), 4)
        first = builder.gep(context.make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])
        splat = builder.insert_element(ir.Constant(four, ir.Undefined), arguments[2], ir.IntType(32)(0))
        splat = builder.shuffle_vector(splat, splat, ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4))
        builder.store(splat, builder.bitcast(first, four.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(numbers, types.intp, types.float32), lower


@register_jitable
def widened(bits):
    """The number whose bf16 bits these are."""
    return float_of_bits(u32(u32(bits) << u32(16)))


@intrinsic
def truncated(typing_context, number):
    """`rounded` by AVX512-BF16, of which LLVM makes one instruction for a whole vector. Subnormal numbers become 0."""

    def lower(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], BFloatType()), ir.IntType(16))

    return types.uint16(types.float32), lower


@register_jitable
def rounded(number):
    """The bits of the nearest bf16 number, ties to even."""
    bits = bits_of_float(number)
    nearest = (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)
    return u16(nearest) if number == number else u16(0x7FC0)


@register_jitable
def quickly_rounded(number):
    """As `rounded`; a subnormal number may become 0."""
    if HAS_BF16:
        return truncated(number)
    return rounded(number)


# Codes: the number of code k of a word, divided by the format's unit --------------------------------------------------
#
# A word is 16 bits of codes: four codes of four bits, or two of eight. Plane k of a row holds the number of code k of
# every word, so that a loop over a plane reads neighbouring words and needs no shuffles. Everything that a product
# contracts is in the order of planes, which changes no result but for the order of its sum.


@register_jitable
def e2m1(word, k):
    """Sign, exponent and mantissa go to their places in fp16, whose bias is larger by 14; a shift repeats the sign."""
    return float_of_half(shifted_with_sign(u16(word << u16(12 - 4 * k)), u16(3)) & u16(0x8E00))


@register_jitable
def e4m3(word, k):
    """As `e2m1`, with a bias larger by 8. A NaN becomes 1.875: see `has_nan`."""
    return float_of_half(shifted_with_sign(u16(word << u16(8 - 8 * k)), u16(1)) & u16(0xBF80))


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
    found = u16(0)
    for j in range(len(words)):
        found |= u16((words[j] & u16(0x7F7F)) + u16(0x0101))  # carries into a byte's last bit where all others are set
    return found & u16(0x8080) != u16(0)


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
    traits = (number, unit, can_be_nan, scale, planes, block_rows, zero_point, has_zeros)

    @register_jitable
    @named(*traits)
    def spread(stored, expert, o, group, step, scale_of, zero_of):
        """Write the scale and the zero point of every word of row o, from `group` on."""
        _, scales, table, factors, zeros = stored
        of_row, factor, num_groups = scales[expert, o // block_rows], factors[expert], -(-len(scale_of) // step)
        if (step == 4 or step == 8) and len(scale_of) % step == 0:
            for g in range(num_groups):
                found = scale(of_row[group + g], table) * factor
                write_four(scale_of, g * step, found)
                if step == 8:
                    write_four(scale_of, g * step + 4, found)
        else:
            for g in range(num_groups):
                scale_of[g * step : (g + 1) * step] = scale(of_row[group + g], table) * factor
        if has_zeros:
            for g in range(num_groups):
                zero_of[g * step : (g + 1) * step] = f32(zeros[expert, o, group + g])

    @register_jitable
    @named(*traits)
    def zero_at(zero_of, j):
        return zero_of[j] if has_zeros else f32(zero_point)

    @register_jitable
    @named(*traits)
    def dot(word, zero, x, j):
        """The product of a word's numbers with x at the same places."""
        total = (number(word, 0) - zero) * x[0, j] + (number(word, 1) - zero) * x[1, j]
        if planes == 4:
            total += (number(word, 2) - zero) * x[2, j] + (number(word, 3) - zero) * x[3, j]
        return total

    @register_jitable
    @named(*traits)
    def dots_1(words, scale_of, zero_of, x_0):
        y_0 = f32(0)
        for j in range(len(words)):
            y_0 += dot(words[j], zero_at(zero_of, j), x_0, j) * scale_of[j]
        return y_0

    @register_jitable
    @named(*traits)
    def dots_2(words, scale_of, zero_of, x_0, x_1):
        y_0 = y_1 = f32(0)
        for j in range(len(words)):
            word, zero = words[j], zero_at(zero_of, j)
            y_0 += dot(word, zero, x_0, j) * scale_of[j]
            y_1 += dot(word, zero, x_1, j) * scale_of[j]
        return y_0, y_1

    @register_jitable
    @named(*traits)
    def dots_3(words, scale_of, zero_of, x_0, x_1, x_2):
        y_0 = y_1 = y_2 = f32(0)
        for j in range(len(words)):
            word, zero = words[j], zero_at(zero_of, j)
            y_0 += dot(word, zero, x_0, j) * scale_of[j]
            y_1 += dot(word, zero, x_1, j) * scale_of[j]
            y_2 += dot(word, zero, x_2, j) * scale_of[j]
        return y_0, y_1, y_2

    @register_jitable
    @named(*traits)
    def dots_4(words, scale_of, zero_of, x_0, x_1, x_2, x_3):
        y_0 = y_1 = y_2 = y_3 = f32(0)
        for j in range(len(words)):
            word, zero = words[j], zero_at(zero_of, j)
            y_0 += dot(word, zero, x_0, j) * scale_of[j]
            y_1 += dot(word, zero, x_1, j) * scale_of[j]
            y_2 += dot(word, zero, x_2, j) * scale_of[j]
            y_3 += dot(word, zero, x_3, j) * scale_of[j]
        return y_0, y_1, y_2, y_3

    @named(*traits)
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
                if r + 3 == end:
                    y_0, y_1, y_2 = dots_3(words, scale_of, zero_of, x[r], x[r + 1], x[r + 2])
                    y[r, o], y[r + 1, o], y[r + 2, o] = u * y_0, u * y_1, u * y_2
                    r += 3
                if r + 2 == end:
                    y_0, y_1 = dots_2(words, scale_of, zero_of, x[r], x[r + 1])
                    y[r, o], y[r + 1, o] = u * y_0, u * y_1
                    r += 2
                if r < end:
                    y[r, o] = u * dots_1(words, scale_of, zero_of, x[r])
                if can_be_nan and has_nan(words):
                    y[bounds[p] : end, o] = f32(np.nan)

    def decoder(to_bf16):
        @named(*traits, to_bf16)
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
