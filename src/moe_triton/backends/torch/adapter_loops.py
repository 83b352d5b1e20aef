"""Narrow products of adapters, which numba compiles for processors with vectors of 512 bits.

A library computes products with 16 columns, or with 16 numbers to contract, at a half to a third of the speed of wide
ones. Here both are sums over k of left[p, k] * right[k, q], made in tiles of 8 rows and up to 32 columns: the sums
stay in registers, and a number on the left multiplies vectors on the right.

What is multiplied are words of 32 bits: a number in fp32, or two neighbours along k in bf16, whose products are added
in fp32. Each number of a result is a sum in the order of k: its bits depend on neither the threads nor its neighbours.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from ctypes import Structure, c_double, c_int64
from functools import cache

import numpy as np
from numba import carray, from_dtype, njit, types

from moe_triton.backends.torch.addresses import next_of, pause, pointer_to, value_of
from moe_triton.backends.torch.loops import named, started
from moe_triton.backends.torch.vectors import LANES, ROWS, WORD, spread_row, tile, transpose

DONE = 8  # bytes from the start of a record to `done`
PIECE_ROWS, PIECE_COLUMNS = 32, 128  # that a thread takes at a time
LINE = 64  # bytes of a cache line


def fields(names):
    """Numbers in 64 bits, which are addresses, sizes, and steps in bytes; those of a record of any step come first.

    next           the number of the first piece that no thread has taken yet
    done           pieces that are finished
    then           the address of the step that follows, 0 for none
    is_gradient    whether the record is a Gradient
    parts          the address of num_parts times (expert, its first row, the row past its last)
    """
    shared = ("next", "done", "then", "is_gradient", "parts", "num_parts")
    return [(name, c_int64) for name in (*shared, *names.split())]


class Narrow(Structure):
    """t = scale * x @ into[e] for the rows of every part, and y += t @ out_of[e].

    into [E, x_size, rank] and out_of [E, rank, columns] have steps _e, _k and _q from one number to the next in each
    dimension; in the last or the last but one, numbers lie one by one. t_columns: rank up to whole vectors; columns: of
    y, 0 for no y.
    """

    _fields_ = [
        *fields("x x_row x_size into into_e into_k into_q t t_row t_columns rank"),
        *((name, c_int64) for name in ("out_of", "out_of_e", "out_of_k", "out_of_q", "y", "y_row", "columns")),
        ("scale", c_double),
    ]


class Gradient(Structure):
    """out[e] = narrow.T @ wide over the rows of every part, or with is_transposed wide.T @ narrow."""

    _fields_ = fields("narrow narrow_row rank wide wide_row columns is_transposed out out_step out_row")


as_integers = pointer_to(types.int64)
as_narrow, as_gradient = (pointer_to(from_dtype(np.dtype(record))) for record in (Narrow, Gradient))


@njit
def memory(words):
    """Memory for words that begins before `first_line` of it."""
    return np.empty(words + LINE // WORD, np.float32)


@njit
def first_line(memory):
    return -(-memory.ctypes.data // LINE) * LINE


@njit
def transposed_panel(source, step, size_k, columns, out, width):
    """A panel of words, [size_k, width], of columns that lie `step` bytes apart, each with its words one by one."""
    for j in range(0, width, LANES):
        for k in range(0, size_k, LANES):
            source_jk, out_jk = source + j * step + k * WORD, out + (k * width + j) * WORD
            transpose(source_jk, step, columns - j, min(LANES, size_k - k), out_jk, width * WORD)


def loops_over(is_bf16, has_instruction):
    """Return the loops of the two kinds of steps, which return the address of the step that follows."""
    size = 2 if is_bf16 else 4
    per_word = WORD // size
    spread_one, spread_two = (spread_row(vectors, is_bf16) for vectors in (1, 2))

    def product_by(vectors):
        run = tile(vectors, False, is_bf16, has_instruction, is_scaled=True)
        width = vectors * LANES

        @named(is_bf16, has_instruction, vectors)
        def product(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns, scale):
            for p in range(0, num_rows, ROWS):
                left_p, out_p = left + p * left_row, out + p * out_row
                for q in range(0, num_columns, width):
                    right_q, out_q = right + q * size_k * WORD, out_p + q * size
                    rows, columns = num_rows - p, num_columns - q
                    run(left_p, left_row, left_k, right_q, width * WORD, size_k, out_q, out_row, rows, columns, scale)

        return njit(product)

    by_one, by_two, add_tile = product_by(1), product_by(2), tile(2, True, is_bf16, has_instruction)

    @njit
    @named(is_bf16, has_instruction)
    def product(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns, scale):
        """out[p, q] = scale * sum over k < size_k of left[p, k] * right[k, q].

        `right` is in panels: 32 columns for every k, with zeros where there are no more; 16 where these are all.
        """
        if num_columns > LANES:
            by_two(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns, scale)
        else:
            by_one(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns, scale)

    @njit
    @named(is_bf16, has_instruction)
    def added(left, left_row, right, size_k, out, out_row, num_rows, num_columns):
        """out[p, q] += sum over k < size_k of left[p, k] * right[k, q]; `right` is in panels of 32 columns."""
        for p in range(0, num_rows, ROWS):
            for q in range(0, num_columns, 2 * LANES):
                left_p, right_q, out_pq = left + p * left_row, right + q * size_k * WORD, out + p * out_row + q * size
                rows, columns = num_rows - p, num_columns - q
                add_tile(left_p, left_row, WORD, right_q, 2 * LANES * WORD, size_k, out_pq, out_row, rows, columns)

    @njit
    @named(is_bf16, has_instruction)
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
    @named(is_bf16, has_instruction)
    def panels(source, step_k, step_q, size_k, columns, out, width):
        """Write a factor [size_k, columns] in panels of words, with zeros up to `width` in the last."""
        words = size_k * size // WORD
        for q in range(0, columns, width):
            source_q, out_q = source + q * step_q, out + q * words * WORD
            if step_k == size:
                transposed_panel(source_q, step_q, words, min(width, columns - q), out_q, width)
            else:
                spread(source_q, step_k, size_k, min(width, columns - q), out_q, width)

    @njit
    @named(is_bf16, has_instruction)
    def narrow(address):
        job = carray(as_narrow(address), 1)[0]
        parts = carray(as_integers(job.parts), (job.num_parts, 3))
        mine, piece, scale = next_of(address), 0, np.float32(job.scale)
        panel, x_words, rank_words = min(job.t_columns, 2 * LANES), job.x_size * size // WORD, job.rank * size // WORD
        # as it lies, a factor may be one panel
        is_panel = size == WORD and job.rank == panel and job.into_q == size and job.into_k == panel * WORD
        packed = memory(x_words * job.t_columns + rank_words * -(-job.columns // (2 * LANES)) * 2 * LANES)
        packed_of, into = -1, first_line(packed)
        out_of = into + x_words * job.t_columns * WORD
        for p in range(len(parts)):
            e, start, stop = parts[p, 0], parts[p, 1], parts[p, 2]
            for i in range(start, stop, PIECE_ROWS):
                if piece == mine:
                    if packed_of != p:
                        packed_of, into_e, out_of_e = p, job.into + e * job.into_e, job.out_of + e * job.out_of_e
                        if is_panel:
                            into = into_e
                        else:
                            panels(into_e, job.into_k, job.into_q, job.x_size, job.rank, into, panel)
                        panels(out_of_e, job.out_of_k, job.out_of_q, job.rank, job.columns, out_of, 2 * LANES)
                    rows = min(PIECE_ROWS, stop - i)
                    x, t, y = job.x + i * job.x_row, job.t + i * job.t_row, job.y + i * job.y_row
                    product(x, job.x_row, WORD, into, x_words, t, job.t_row, rows, job.t_columns, scale)
                    added(t, job.t_row, out_of, rank_words, y, job.y_row, rows, job.columns)
                    next_of(address + DONE)
                    mine = next_of(address)
                piece += 1
        packed[0] = 0  # its memory lives until here
        while job.then != 0 and value_of(address + DONE) < piece:
            pause()
        return job.then

    @njit
    @named(is_bf16, has_instruction)
    def gradient_of(job, e, start, rows, begin, narrows):
        """The gradient of PIECE_COLUMNS columns from `begin` on, or as many as there are, of a part."""
        rank, width, size_k = job.narrow_row // size, 2 * LANES, -(-rows // per_word)
        panel = min(rank, width)
        panel_step, wides, one = size_k * panel * WORD, narrows + size_k * rank * WORD, np.float32(1)
        for i in range(0, rank, panel):
            source = job.narrow + start * job.narrow_row + i * size
            spread(source, job.narrow_row, rows, panel, narrows + i // panel * panel_step, panel)
        for q in range(begin, min(begin + PIECE_COLUMNS, job.columns), width):
            columns, out = min(width, job.columns - q), job.out + e * job.out_step
            spread(job.wide + start * job.wide_row + q * size, job.wide_row, rows, columns, wides, width)
            if job.is_transposed:
                out += q * job.out_row
                product(wides, WORD, width * WORD, narrows, size_k, out, job.out_row, columns, job.rank, one)
            else:
                for i in range(0, job.rank, panel):
                    left, out_i = narrows + i // panel * panel_step, out + i * job.out_row + q * size
                    rows_i = min(panel, job.rank - i)
                    by_two(left, WORD, panel * WORD, wides, size_k, out_i, job.out_row, rows_i, columns, one)

    @njit
    @named(is_bf16, has_instruction)
    def gradient(address):
        job = carray(as_gradient(address), 1)[0]
        parts = carray(as_integers(job.parts), (job.num_parts, 3))
        longest = 0
        for p in range(len(parts)):
            longest = max(longest, parts[p, 2] - parts[p, 1])
        packed = memory(-(-longest // per_word) * (job.narrow_row // size + 2 * LANES))
        mine, piece = next_of(address), 0
        for p in range(len(parts)):
            e, start, stop = parts[p, 0], parts[p, 1], parts[p, 2]
            for begin in range(0, job.columns, PIECE_COLUMNS):
                if piece == mine:
                    gradient_of(job, e, start, stop - start, begin, first_line(packed))
                    mine = next_of(address)
                piece += 1
        packed[0] = 0  # its memory lives until here
        return job.then

    return narrow, gradient, panels, added


# Functions of the address of a step, which take this and all that follow. Several threads may run one at once, and
# share the work. What they call are globals: numba would not find again on disk a function that closes over others.
narrow_fp32, gradient_fp32, panels_fp32, added_fp32 = loops_over(is_bf16=False, has_instruction=False)
narrow_bf16, gradient_bf16, panels_bf16, added_bf16 = loops_over(is_bf16=True, has_instruction=True)
narrow_halves, gradient_halves, *_ = loops_over(is_bf16=True, has_instruction=False)


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
    if is_bf16:
        steps = steps_bf16 if has_instruction else steps_halves
    return started(steps)
