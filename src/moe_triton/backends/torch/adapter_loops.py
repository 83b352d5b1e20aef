"""Narrow products of adapters, which numba compiles for processors with vectors of 512 bits.

A library computes products with 16 columns, or with 16 numbers to contract, at a half to a third of the speed of wide
ones. Here both are sums over k of left[p, k] * right[k, q], made in tiles of 8 rows and up to 32 columns: the sums
stay in registers, and a number on the left multiplies vectors on the right.

What is multiplied are words of 32 bits: a number in fp32, or two neighbours along k in bf16, whose products are added
in fp32. Each number of a result is a sum in the order of k: its bits depend on neither the threads nor its neighbours.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from ctypes import Structure, c_int64
from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, config, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # of a vector
ROWS = 8  # of a tile: with two vectors each, 16 sums that do not wait for each other
WORD = 4  # bytes
DONE, SLOT = 8, 16  # bytes from the start of a record to `done` and to `slot`
PRODUCT = types.void(*[types.intp] * 9)  # addresses, steps and sizes: see `product`
PIECE_ROWS, PIECE_COLUMNS = 32, 128  # that a thread takes at a time

float_type, word_type, half_type = ir.FloatType(), ir.IntType(32), ir.IntType(16)
floats, words, halves = (ir.VectorType(element, LANES) for element in (float_type, word_type, half_type))


# Vectors in LLVM's terms ----------------------------------------------------------------------------------------------


class BFloatType(ir.Type):
    """The type that llvmlite lacks."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloatType)

    def __hash__(self):
        return hash(BFloatType)


def constants(vector_type, value):
    return ir.Constant(vector_type, [ir.Constant(vector_type.element, value)] * LANES)


def call(builder, name, result_type, *arguments):
    """Call one of LLVM's own functions."""
    function_type = ir.FunctionType(result_type, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def load(builder, address, element_type):
    return builder.load(builder.inttoptr(address, element_type.as_pointer()), typ=element_type, align=2)


def splat(builder, value):
    """A vector of equal elements."""
    vector_type = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), value, word_type(0))
    return builder.shuffle_vector(first, first, constants(words, 0))


def multiply_add(builder, left, right, sums, is_bf16, has_instruction):
    """Add the products of words to sums in fp32."""
    if not is_bf16:
        return call(
            builder, f"llvm.fma.v{LANES}f32", floats, *(builder.bitcast(x, floats) for x in (left, right)), sums
        )
    if has_instruction:
        pairs = [builder.bitcast(x, ir.VectorType(BFloatType(), 2 * LANES)) for x in (left, right)]
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", floats, sums, *pairs)
    for half in (
        lambda x: builder.and_(x, constants(words, 0xFFFF0000)),
        lambda x: builder.shl(x, constants(words, 16)),
    ):
        pair = [builder.bitcast(half(x), floats) for x in (left, right)]
        sums = call(builder, f"llvm.fma.v{LANES}f32", floats, *pair, sums)
    return sums


def first_lanes(builder, count):
    """The mask of so many lanes."""
    lanes = ir.Constant(words, [word_type(j) for j in range(LANES)])
    return builder.icmp_signed("<", lanes, splat(builder, builder.trunc(count, word_type)))


def load_first(builder, address, mask, is_bf16):
    """The numbers at `address`, as many as the mask says."""
    element, kind = (halves, "i16") if is_bf16 else (floats, "f32")
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    found = call(
        builder, f"llvm.masked.load.v{LANES}{kind}.p0", element, pointer, word_type(2), mask, constants(element, 0)
    )
    if not is_bf16:
        return found
    return builder.bitcast(builder.shl(builder.zext(found, words), constants(words, 16)), floats)


def store_first(builder, numbers, address, mask, is_bf16):
    """Write as many numbers as the mask says; to bf16 the nearest, ties to even."""
    if is_bf16:
        bits = builder.bitcast(numbers, words)
        odd = builder.and_(builder.lshr(bits, constants(words, 16)), constants(words, 1))
        nearest = builder.lshr(builder.add(builder.add(bits, constants(words, 0x7FFF)), odd), constants(words, 16))
        is_nan = builder.fcmp_unordered("uno", numbers, numbers)
        numbers = builder.trunc(builder.select(is_nan, constants(words, 0x7FC0), nearest), halves)
    kind = "i16" if is_bf16 else "f32"
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    call(builder, f"llvm.masked.store.v{LANES}{kind}.p0", ir.VoidType(), numbers, pointer, word_type(2), mask)


def tile(vectors, adds, is_bf16, has_instruction):
    """Return a function that writes, or adds, up to ROWS rows and vectors * LANES columns of a product.

    Steps are in bytes, sizes in words (k) and numbers. A row past the last is the last once more, with the same result.
    """

    def lower(context, builder, signature, arguments):
        left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns = arguments
        integer = left.type
        last = builder.sub(num_rows, integer(1))
        rows = [builder.select(builder.icmp_signed("<", integer(i), last), integer(i), last) for i in range(ROWS)]
        lefts = [builder.add(left, builder.mul(row, left_row)) for row in rows]
        sums = [[cgutils.alloca_once_value(builder, constants(floats, 0.0)) for _ in range(vectors)] for _ in rows]
        with cgutils.for_range(builder, size_k) as loop:
            right_now = builder.add(right, builder.mul(loop.index, integer(vectors * LANES * WORD)))
            rights = [load(builder, builder.add(right_now, integer(v * LANES * WORD)), words) for v in range(vectors)]
            step = builder.mul(loop.index, left_k)
            for of_row, start in zip(sums, lefts, strict=True):
                number = splat(builder, load(builder, builder.add(start, step), word_type))
                for total, vector in zip(of_row, rights, strict=True):
                    found = multiply_add(builder, number, vector, builder.load(total), is_bf16, has_instruction)
                    builder.store(found, total)
        masks = [first_lanes(builder, builder.sub(num_columns, integer(v * LANES))) for v in range(vectors)]
        size = LANES * (2 if is_bf16 else 4)
        places = [
            [builder.add(builder.add(out, builder.mul(row, out_row)), integer(v * size)) for v in range(vectors)]
            for row in rows
        ]
        found = [[builder.load(total) for total in of_row] for of_row in sums]
        if adds:  # all are read before any is written: rows past the last are added once
            found = [
                [
                    builder.fadd(load_first(builder, place, mask, is_bf16), total)
                    for place, mask, total in zip(at, masks, of_row, strict=True)
                ]
                for at, of_row in zip(places, found, strict=True)
            ]
        for at, of_row in zip(places, found, strict=True):
            for place, mask, total in zip(at, masks, of_row, strict=True):
                store_first(builder, total, place, mask, is_bf16)
        return context.get_dummy_value()

    @intrinsic
    def run(typing_context, left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns):
        return PRODUCT, lower

    return run


def spread_row(vectors, is_bf16):
    """Return a function that writes words: the columns of a row in fp32, of two rows in bf16, and zeros behind them."""

    def lower(context, builder, signature, arguments):
        lower_row, upper_row, lower_columns, upper_columns, out = arguments
        integer = lower_row.type
        for v in range(vectors):
            found, *upper = [
                load_first(builder, builder.add(row, integer(v * LANES * (2 if is_bf16 else 4))), mask, is_bf16)
                for row, columns in ((lower_row, lower_columns), (upper_row, upper_columns))[: 1 + is_bf16]
                for mask in (first_lanes(builder, builder.sub(columns, integer(v * LANES))),)
            ]
            if is_bf16:  # both are the upper halves of words
                lower_half = builder.lshr(builder.bitcast(found, words), constants(words, 16))
                found = builder.bitcast(builder.or_(builder.bitcast(upper[0], words), lower_half), floats)
            place = builder.add(out, integer(v * LANES * WORD))
            builder.store(found, builder.inttoptr(place, floats.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def run(typing_context, lower_row, upper_row, lower_columns, upper_columns, out):
        return types.void(*[types.intp] * 5), lower

    return run


@intrinsic
def next_of(typing_context, address):
    """The number at an address, which becomes larger by 1 in one step for all threads that see it."""

    def lower(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "seq_cst")

    return types.int64(types.intp), lower


@intrinsic
def value_of(typing_context, address):
    """The number at an address as other threads have left it."""

    def lower(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8, typ=ir.IntType(64))

    return types.int64(types.intp), lower


def pointer_to(number):
    """Return a function that makes an address a pointer to numbers of a numba type."""

    @intrinsic
    def pointer(typing_context, address):
        def lower(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.intp), lower

    return pointer


# Loops ----------------------------------------------------------------------------------------------------------------


def fields(names):
    """Numbers in 64 bits, which are addresses, sizes, and steps in bytes; those of a record of any step come first.

    next           the number of the first piece that no thread has taken yet
    done           pieces that are finished
    slot           threads that have taken a part of the scratch memory
    then           the address of the step that follows, 0 for none
    is_gradient    whether the record is a Gradient
    parts          the address of num_parts times (expert, its first row, the row past its last)
    """
    shared = ("next", "done", "slot", "then", "is_gradient", "parts", "num_parts")
    return [(name, c_int64) for name in (*shared, *names.split())]


class Narrow(Structure):
    """t = x @ into[e] for the rows of every part, and y += t @ out_of[e].

    x_words and rank_words are what is contracted; rank: the columns of t, whole vectors; columns: of y, 0 for no y.
    """

    _fields_ = fields("x x_row x_words into into_step t t_row rank out_of out_of_step rank_words y y_row columns")


class Gradient(Structure):
    """out[e] = narrow.T @ wide over the rows of every part, or with is_transposed wide.T @ narrow.

    scratch: memory for words, scratch_step for each thread: 32 more than the columns of narrow, for the longest part.
    """

    _fields_ = fields(
        "narrow narrow_row rank wide wide_row columns is_transposed out out_step out_row scratch scratch_step"
    )


as_integers = pointer_to(types.int64)
as_narrow, as_gradient = (pointer_to(from_dtype(np.dtype(record))) for record in (Narrow, Gradient))


def loops_over(is_bf16, has_instruction):
    """Return the loops of the two kinds of steps, which return the address of the step that follows."""
    size = 2 if is_bf16 else 4
    per_word = WORD // size
    spread_one, spread_two = (spread_row(vectors, is_bf16) for vectors in (1, 2))

    def product_by(vectors, adds):
        run = tile(vectors, adds, is_bf16, has_instruction)
        width = vectors * LANES

        def product(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns):
            for p in range(0, num_rows, ROWS):
                left_p, out_p = left + p * left_row, out + p * out_row
                for q in range(0, num_columns, width):
                    right_q, out_q = right + q * size_k * WORD, out_p + q * size
                    run(left_p, left_row, left_k, right_q, size_k, out_q, out_row, num_rows - p, num_columns - q)

        return njit(product)

    by_one, by_two, added = product_by(1, False), product_by(2, False), product_by(2, True)

    @njit
    def product(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns):
        """out[p, q] = sum over k < size_k of left[p, k] * right[k, q].

        `right` is in panels: 32 columns for every k, with zeros where there are no more; 16 where these are all.
        """
        if num_columns > LANES:
            by_two(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns)
        else:
            by_one(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns)

    @njit
    def spread(source, step, num_rows, columns, words, width):
        """Write columns of rows, `step` bytes apart, as words[k, q], with zeros where rows or columns end."""
        for k in range(-(-num_rows // per_word)):
            lower, out = source + k * per_word * step, words + k * width * WORD
            upper_columns = columns if per_word * k + 1 < num_rows else 0
            if width > LANES:
                spread_two(lower, lower + step, columns, upper_columns, out)
            else:
                spread_one(lower, lower + step, columns, upper_columns, out)

    @njit
    def narrow(address):
        job = carray(as_narrow(address), 1)[0]
        parts = carray(as_integers(job.parts), (job.num_parts, 3))
        mine, piece = next_of(address), 0
        for p in range(len(parts)):
            e, start, stop = parts[p, 0], parts[p, 1], parts[p, 2]
            into, out_of = job.into + e * job.into_step, job.out_of + e * job.out_of_step
            for i in range(start, stop, PIECE_ROWS):
                if piece == mine:
                    rows = min(PIECE_ROWS, stop - i)
                    x, t, y = job.x + i * job.x_row, job.t + i * job.t_row, job.y + i * job.y_row
                    product(x, job.x_row, WORD, into, job.x_words, t, job.t_row, rows, job.rank)
                    added(t, job.t_row, WORD, out_of, job.rank_words, y, job.y_row, rows, job.columns)
                    next_of(address + DONE)
                    mine = next_of(address)
                piece += 1
        while job.then != 0 and value_of(address + DONE) < piece:
            pass
        return job.then

    @njit
    def gradient_of(job, e, start, rows, begin, scratch):
        """The gradient of PIECE_COLUMNS columns from `begin` on, or as many as there are, of a part."""
        rank, width, size_k = job.narrow_row // size, 2 * LANES, -(-rows // per_word)
        panel, narrows = min(rank, width), scratch
        panel_step, wides = size_k * panel * WORD, narrows + size_k * rank * WORD
        for i in range(0, rank, panel):
            source = job.narrow + start * job.narrow_row + i * size
            spread(source, job.narrow_row, rows, panel, narrows + i // panel * panel_step, panel)
        for q in range(begin, min(begin + PIECE_COLUMNS, job.columns), width):
            columns, out = min(width, job.columns - q), job.out + e * job.out_step
            spread(job.wide + start * job.wide_row + q * size, job.wide_row, rows, columns, wides, width)
            if job.is_transposed:
                out += q * job.out_row
                product(wides, WORD, width * WORD, narrows, size_k, out, job.out_row, columns, job.rank)
            else:
                for i in range(0, job.rank, panel):
                    left, out_i = narrows + i // panel * panel_step, out + i * job.out_row + q * size
                    rows_i = min(panel, job.rank - i)
                    by_two(left, WORD, panel * WORD, wides, size_k, out_i, job.out_row, rows_i, columns)

    @njit
    def gradient(address):
        job = carray(as_gradient(address), 1)[0]
        parts = carray(as_integers(job.parts), (job.num_parts, 3))
        scratch = job.scratch + next_of(address + SLOT) * job.scratch_step
        mine, piece = next_of(address), 0
        for p in range(len(parts)):
            e, start, stop = parts[p, 0], parts[p, 1], parts[p, 2]
            for begin in range(0, job.columns, PIECE_COLUMNS):
                if piece == mine:
                    gradient_of(job, e, start, stop - start, begin, scratch)
                    mine = next_of(address)
                piece += 1
        return job.then

    return narrow, gradient


# Functions of the address of a step, which take this and all that follow. Several threads may run one at once, and
# share the work. What they call are globals: numba would not find again on disk a function that closes over others.
narrow_fp32, gradient_fp32 = loops_over(is_bf16=False, has_instruction=False)
narrow_bf16, gradient_bf16 = loops_over(is_bf16=True, has_instruction=True)
narrow_halves, gradient_halves = loops_over(is_bf16=True, has_instruction=False)


@njit
def is_gradient(address):
    return carray(as_narrow(address), 1)[0].is_gradient != 0


def steps_fp32(address):
    while address != 0:
        address = gradient_fp32(address) if is_gradient(address) else narrow_fp32(address)


def steps_bf16(address):
    while address != 0:
        address = gradient_bf16(address) if is_gradient(address) else narrow_bf16(address)


def steps_halves(address):
    while address != 0:
        address = gradient_halves(address) if is_gradient(address) else narrow_halves(address)


@cache
def adapter_loops(is_bf16, has_instruction):
    """Return the compiled function over numbers in bf16, or in fp32.

    has_instruction: the processor multiplies pairs in bf16; else both halves of a word are widened.
    """
    steps = steps_fp32
    if is_bf16:  # with these settings numba compiles for another processor
        steps = steps_bf16 if has_instruction and not (config.CPU_NAME or config.CPU_FEATURES) else steps_halves
    try:
        return cfunc(types.void(types.intp), cache=True)(steps)
    except RuntimeError:  # numba found no folder that it can write to
        return cfunc(types.void(types.intp))(steps)
