"""Products of few bf16 rows with projections in codes, for processors that multiply pairs of bf16.

A vector has 32 codes, whose numbers are all exact in bf16. See `row_loops` on records and threads.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from ctypes import Structure
from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from moe_triton.backends.torch.addresses import next_of, pointer_to
from moe_triton.backends.torch.loops import float_of_half, named, started, widened
from moe_triton.backends.torch.row_loops import fields
from moe_triton.backends.torch.vectors import (
    LANES,
    BFloatType,
    ask_for,
    call,
    constants,
    floats,
    load,
    multiply_add,
    splat,
    sums_of_vectors,
    up_to,
    word_type,
    words,
)

NUMBERS = 2 * LANES  # of a vector
OUTS = 64  # rows of a projection that a thread takes at a time; divides those of a block
TILE = 4  # rows of a projection in a tile

byte_type, short_type = ir.IntType(8), ir.IntType(16)
shorts = ir.VectorType(short_type, NUMBERS)


class FewCodes(Structure):
    """y[r] = projection(expert) @ x[r] for the rows of every part: x in bf16, y in fp32; steps are in bytes.

    numbers       the address of the bf16 numbers that codes are looked up in; see the functions that read them
    codes         [E, size_out, codes_row] bytes
    scales        [E, ceil(size_out / block), groups], for `block` rows and `group` columns each: bytes whose numbers
                  are in `table` (kind 0), bf16 (1), fp16 (2) or fp32 (3)
    zeros         [E, size_out, groups] bytes; address 0 for none
    factors       [E] fp32, which all scales of an expert are multiplied by
    parts         the address of num_parts times (expert, its first row, the row past its last)
    """

    _fields_ = fields(
        "x x_row y y_row numbers codes codes_row scales kind table zeros factors block group size_in size_out parts"
        " num_parts"
    )


as_job, as_parts, as_floats, as_halves, as_bytes = (
    pointer_to(number)
    for number in (from_dtype(np.dtype(FewCodes)), types.int64, types.float32, types.uint16, types.uint8)
)


# Functions that read the bf16 numbers of a vector's codes.
#
# numbers: as many vectors of a table as TABLES says; shift: what is added to the codes of a group, or None


def four_bits(builder, start, numbers, shift):
    """Looked up in a table of 32; with shifts, code c less z is c - z + 15 there."""
    found = builder.zext(load(builder, start, ir.VectorType(byte_type, LANES)), words)
    low = builder.and_(found, constants(words, 0xF))
    high = builder.and_(builder.shl(found, constants(words, 12)), constants(words, 0xF0000))
    index = builder.or_(low, high)
    if shift is not None:
        index = builder.add(index, shift)
    index = builder.bitcast(index, shorts)
    return call(builder, "llvm.x86.avx512.permvar.hi.512", shorts, numbers[0], index)


def eight_bits(builder, start, numbers, shift):
    """Integers: one of up to 8 bits and a sign is exact in bf16. Without shifts 128 is the code of 0."""
    shift, halves = constants(words, -128) if shift is None else shift, []
    for half in range(2):
        place = builder.add(start, start.type(half * LANES))
        codes = builder.zext(load(builder, place, ir.VectorType(byte_type, LANES)), words)
        halves.append(builder.sitofp(builder.add(codes, shift), floats))
    pairs = ir.VectorType(BFloatType(), NUMBERS)
    return call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", pairs, *reversed(halves))


def e4m3(builder, start, numbers, shift):
    """Looked up in a table of 128 by all bits but the sign."""
    codes = builder.zext(load(builder, start, ir.VectorType(byte_type, NUMBERS)), shorts)
    below, above = (
        call(builder, "llvm.x86.avx512.vpermi2var.hi.512", shorts, first, codes, second)
        for first, second in (numbers[:2], numbers[2:])
    )
    is_above = builder.icmp_signed("!=", builder.and_(codes, constants(shorts, 64)), constants(shorts, 0))
    sign = builder.and_(builder.shl(codes, constants(shorts, 8)), constants(shorts, 0x8000))
    return builder.or_(builder.select(is_above, above, below), sign)


TABLES = {four_bits: 1, eight_bits: 0, e4m3: 4}


def coded_dots(rows, read, has_zeros, has_halves):
    """Return a function that writes up to `rows` x TILE sums of x[p] . numbers(codes[q]) in size_v vectors.

    scales: fp32, of the groups of a row; the next row's are scales_row bytes further. shifts: what is added to the
    codes of a group, as 32 bits, in the same places. has_halves: a group has half a vector's codes; else 2^group of
    them.
    """
    vector_bytes = LANES if read is four_bits else NUMBERS

    def lower(context, builder, signature, arguments):
        x, x_row, codes, codes_row, scales, shifts, scales_row, *others = arguments
        group, table, size_v, out, out_row, num_rows, num_outs = others
        integer = x.type
        p_s, q_s = up_to(builder, rows, num_rows), up_to(builder, TILE, num_outs)
        numbers = [load(builder, builder.add(table, integer(2 * NUMBERS * i)), shorts) for i in range(TABLES[read])]
        sums = [[cgutils.alloca_once_value(builder, constants(floats, 0.0)) for _ in q_s] for _ in p_s]
        lanes = ir.Constant(words, [word_type(j) for j in range(LANES)])
        is_first = builder.icmp_signed("<", lanes, constants(words, LANES // 2))

        def of_groups(address, at, element):
            """The elements of a vector's group, or of those of both halves."""
            found = [
                splat(builder, load(builder, builder.add(address, builder.mul(index, integer(4))), element))
                for index in at
            ]
            return builder.select(is_first, *found) if has_halves else found[0]

        with cgutils.for_range(builder, size_v) as loop:
            if has_halves:
                at = [builder.add(builder.mul(loop.index, integer(2)), integer(more)) for more in (0, 1)]
            else:
                at = [builder.lshr(builder.mul(loop.index, integer(NUMBERS)), group)]
            vectors, factors = [], []
            for q in q_s:
                start = builder.add(
                    builder.add(codes, builder.mul(q, codes_row)), builder.mul(loop.index, integer(vector_bytes))
                )
                ask_for(builder, builder.add(start, builder.mul(codes_row, integer(TILE))))  # of the next tile
                row = builder.mul(q, scales_row)
                shift = of_groups(builder.add(shifts, row), at, word_type) if has_zeros else None
                vectors.append(builder.bitcast(read(builder, start, numbers, shift), words))
                factors.append(of_groups(builder.add(scales, row), at, ir.FloatType()))
            step = builder.mul(loop.index, integer(NUMBERS * 2))
            for of_row, p in zip(sums, p_s, strict=True):
                x_p = load(builder, builder.add(builder.add(x, builder.mul(p, x_row)), step), words)
                for total, vector, factor in zip(of_row, vectors, factors, strict=True):
                    product = multiply_add(builder, x_p, vector, constants(floats, 0.0), True, True)
                    added = call(builder, f"llvm.fma.v{LANES}f32", floats, product, factor, builder.load(total))
                    builder.store(added, total)
        for of_row, p in zip(sums, p_s, strict=True):
            found = sums_of_vectors(builder, [builder.load(total) for total in of_row])
            for j, q in enumerate(q_s):
                place = builder.add(builder.add(out, builder.mul(p, out_row)), builder.mul(q, integer(4)))
                number = builder.extract_element(found, word_type(j * LANES // TILE))
                builder.store(number, builder.inttoptr(place, number.type.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def run(
        typing_context,
        x, x_row, codes, codes_row, scales, shifts, scales_row, group, table, size_v, out, out_row, num_rows, num_outs,
    ):  # fmt: skip
        return types.void(*[types.intp] * 14), lower

    return run


@njit
def read_scales(job, e, o, num_outs, groups, shift_of, scales, shifts):
    """The scales of num_outs rows from o on, or of their block, as fp32, and what is added to their codes."""
    factor, blocks = carray(as_floats(job.factors), e + 1)[e], -(-job.size_out // job.block)
    first, size = (e * blocks + o // job.block) * groups, (num_outs if job.block == 1 else 1) * groups
    if job.kind == 0:
        table, stored = carray(as_floats(job.table), 256), carray(as_bytes(job.scales + first), size)
        for g in range(size):
            scales[g] = table[stored[g]] * factor
    elif job.kind == 3:
        numbers = carray(as_floats(job.scales + 4 * first), size)
        for g in range(size):
            scales[g] = numbers[g] * factor
    else:
        halves = carray(as_halves(job.scales + 2 * first), size)
        for g in range(size):
            scales[g] = (widened(halves[g]) if job.kind == 1 else float_of_half(halves[g])) * factor
    if job.zeros != 0:
        zeros = carray(as_bytes(job.zeros + first), size)
        for g in range(size):
            shifts[g] = (shift_of[0] - np.int32(zeros[g])) * shift_of[1]


def loop_over(read, has_zeros=False, has_halves=False):
    """Return the loop over the pieces of a FewCodes; see `coded_dots`."""
    four, two, one = (coded_dots(rows, read, has_zeros, has_halves) for rows in (4, 2, 1))
    shift_of = (15, 0x10001) if read is four_bits else (0, 1)  # zero point 0, and the factor of the others

    @njit
    @named(read, has_zeros, has_halves)
    def tile(x, x_row, codes, codes_row, scales, shifts, scales_row, group, table, size_v, y, y_row, rows, outs):
        """The sums of the next rows, whose number is returned."""
        if rows > 2:
            four(x, x_row, codes, codes_row, scales, shifts, scales_row, group, table, size_v, y, y_row, rows, outs)
        elif rows == 2:
            two(x, x_row, codes, codes_row, scales, shifts, scales_row, group, table, size_v, y, y_row, rows, outs)
        else:
            one(x, x_row, codes, codes_row, scales, shifts, scales_row, group, table, size_v, y, y_row, rows, outs)
        return 4 if rows > 2 else rows

    @njit
    @named(read, has_zeros, has_halves)
    def few_codes(address):
        job = carray(as_job(address), 1)[0]
        parts = carray(as_parts(job.parts), (job.num_parts, 3))
        groups, codes_row, group = -(-job.size_in // job.group), job.codes_row, 0
        while 1 << group < job.group:
            group += 1
        scales, shifts = np.empty(OUTS * groups, np.float32), np.zeros(OUTS * groups, np.int32)
        scales_row, size_v, x_row, y_row = 4 * groups, job.size_in // NUMBERS, job.x_row, job.y_row
        if job.block > 1:
            scales_row = 0
        mine, piece = next_of(address), 0
        for part in range(len(parts)):
            e, start, stop = parts[part, 0], parts[part, 1], parts[part, 2]
            for first in range(0, job.size_out, OUTS):
                if piece == mine:
                    count = min(OUTS, job.size_out - first)
                    read_scales(job, e, first, count, groups, shift_of, scales, shifts)
                    for i in range(0, count, TILE):
                        codes = job.codes + (e * job.size_out + first + i) * codes_row
                        scale, shift = scales.ctypes.data + i * scales_row, shifts.ctypes.data + i * scales_row
                        row = start
                        while row < stop:
                            x, y = job.x + row * x_row, job.y + row * y_row + 4 * (first + i)
                            row += tile(
                                x, x_row, codes, codes_row, scale, shift, scales_row, group,
                                job.numbers, size_v, y, y_row, stop - row, count - i,
                            )  # fmt: skip
                    mine = next_of(address)
                piece += 1
        scales[0], shifts[0] = 0, 0  # their memory lives until here

    return few_codes


four_plain, four_shifted = loop_over(four_bits), loop_over(four_bits, has_zeros=True)
four_halved = loop_over(four_bits, has_halves=True)
eight_plain, eight_shifted = loop_over(eight_bits), loop_over(eight_bits, has_zeros=True)
e4m3_plain = loop_over(e4m3)


# Functions of a FewCodes's address. What they call are globals: see `adapter_loops`.
def four_bit_codes(address):
    four_plain(address)


def shifted_four_bit_codes(address):
    four_shifted(address)


def halved_four_bit_codes(address):
    four_halved(address)


def eight_bit_codes(address):
    eight_plain(address)


def shifted_eight_bit_codes(address):
    eight_shifted(address)


def e4m3_codes(address):
    e4m3_plain(address)


@cache
def few_codes_loop(name, group, has_zeros):
    """Return the function of the address of a FewCodes of a format, whose scales belong to so many columns."""
    if name == "fp8":
        return started(e4m3_codes)
    if name == "int8":
        return started(shifted_eight_bit_codes if has_zeros else eight_bit_codes)
    if group < NUMBERS:
        return started(halved_four_bit_codes)
    return started(shifted_four_bit_codes if has_zeros else four_bit_codes)
