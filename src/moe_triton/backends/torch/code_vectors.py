"""Products of few bf16 rows with projections in codes of four bits, for processors that multiply pairs of bf16.

A vector has 32 codes: one instruction looks up their numbers in a table of 32, all exact in bf16. See `row_loops` on
records and threads.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from ctypes import Structure
from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from moe_triton.backends.torch.loops import float_of_half, named, started, widened
from moe_triton.backends.torch.row_loops import fields
from moe_triton.backends.torch.vectors import (
    LANES,
    ask_for,
    call,
    constants,
    floats,
    load,
    multiply_add,
    next_of,
    pointer_to,
    splat,
    sums_of_vectors,
    up_to,
    word_type,
    words,
)

NUMBERS = 2 * LANES  # of a vector
BYTES = NUMBERS // 2  # of their codes
OUTS = 64  # rows of a projection that a thread takes at a time
TILE = 4  # rows of a projection in a tile

byte_vector = ir.VectorType(ir.IntType(8), LANES)
shorts = ir.VectorType(ir.IntType(16), NUMBERS)


class FewCodes(Structure):
    """y[r] = projection(expert) @ x[r] for the rows of every part: x in bf16, y in fp32; steps are in bytes.

    numbers       the address of the bf16 numbers of 32 codes; with zero points, code c less z has number c - z + 15
    codes         [E, size_out, size_in / 2] bytes
    scales        [E, size_out, groups]: bytes whose numbers are in `table` (kind 0), bf16 (1), fp16 (2) or fp32 (3)
    zeros         [E, size_out, groups] bytes; address 0 for none
    factors       [E] fp32, which all scales of an expert are multiplied by
    parts         the address of num_parts times (expert, its first row, the row past its last)
    """

    _fields_ = fields(
        "x x_row y y_row numbers codes scales kind table zeros factors group size_in size_out parts num_parts"
    )


as_job, as_parts, as_floats, as_halves, as_bytes = (
    pointer_to(number)
    for number in (from_dtype(np.dtype(FewCodes)), types.int64, types.float32, types.uint16, types.uint8)
)


def coded_dots(rows, has_zeros, has_halves):
    """Return a function that writes up to `rows` x TILE sums of x[p] . numbers(codes[q]) in size_v vectors.

    scales: fp32, of the groups of a row; the next row's are scales_row bytes further. shifts: what is added to the
    codes of a group, as 32 bits, in the same places. has_halves: a group has half a vector's codes; else 2^group of
    them.
    """

    def lower(context, builder, signature, arguments):
        x, x_row, codes, codes_row, scales, shifts, scales_row, *others = arguments
        group, table, size_v, out, out_row, num_rows, num_outs = others
        integer = x.type
        p_s, q_s = up_to(builder, rows, num_rows), up_to(builder, TILE, num_outs)
        numbers = builder.load(builder.inttoptr(table, shorts.as_pointer()), align=2)
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
                    builder.add(codes, builder.mul(q, codes_row)), builder.mul(loop.index, integer(BYTES))
                )
                ask_for(builder, builder.add(start, builder.mul(codes_row, integer(TILE))))  # of the next tile
                found = builder.zext(load(builder, start, byte_vector), words)
                low = builder.and_(found, constants(words, 0xF))
                high = builder.and_(builder.shl(found, constants(words, 12)), constants(words, 0xF0000))
                index = builder.or_(low, high)
                row = builder.mul(q, scales_row)
                if has_zeros:
                    index = builder.add(index, of_groups(builder.add(shifts, row), at, word_type))
                index = builder.bitcast(index, shorts)
                vectors.append(call(builder, "llvm.x86.avx512.permvar.hi.512", shorts, numbers, index))
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
def read_scales(job, e, o, num_outs, groups, scales, shifts):
    """The scales of num_outs rows from o on, as fp32, and what is added to their codes."""
    factor = carray(as_floats(job.factors), e + 1)[e]
    first, size = (e * job.size_out + o) * groups, num_outs * groups
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
            shifts[g] = (15 - np.int32(zeros[g])) * 0x10001


def loop_over(has_zeros, has_halves):
    """Return the loop over the pieces of a FewCodes; see `coded_dots`."""
    four, two, one = (coded_dots(rows, has_zeros, has_halves) for rows in (4, 2, 1))

    @njit
    @named(has_zeros, has_halves)
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
    @named(has_zeros, has_halves)
    def few_codes(address):
        job = carray(as_job(address), 1)[0]
        parts = carray(as_parts(job.parts), (job.num_parts, 3))
        groups, codes_row, group = job.size_in // job.group, job.size_in // 2, 0
        while 1 << group < job.group:
            group += 1
        scales, shifts = np.empty(OUTS * groups, np.float32), np.zeros(OUTS * groups, np.int32)
        scales_row, size_v, x_row, y_row = 4 * groups, job.size_in // NUMBERS, job.x_row, job.y_row
        mine, piece = next_of(address), 0
        for part in range(len(parts)):
            e, start, stop = parts[part, 0], parts[part, 1], parts[part, 2]
            for first in range(0, job.size_out, OUTS):
                if piece == mine:
                    count = min(OUTS, job.size_out - first)
                    read_scales(job, e, first, count, groups, scales, shifts)
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


few_plain, few_shifted, few_halved = loop_over(False, False), loop_over(True, False), loop_over(False, True)


# Functions of a FewCodes's address. What they call are globals: see `adapter_loops`.
def plain_codes(address):
    few_plain(address)


def shifted_codes(address):
    few_shifted(address)


def halved_codes(address):
    few_halved(address)


@cache
def few_codes_loop(group, has_zeros):
    """Return the function of the address of a FewCodes whose scales belong to so many codes."""
    return started(halved_codes if group < NUMBERS else shifted_codes if has_zeros else plain_codes)
