"""Narrow products of adapters, which numba compiles for processors with vectors of 512 bits.

A library computes products with 16 columns, or with 16 numbers to contract, at a half to a third of the speed of wide
ones. Here both are made in the tiles of `panels`.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from ctypes import Structure, c_double, c_int64
from functools import cache

import numpy as np
from numba import carray, from_dtype, njit, types

from moe_triton.backends.torch.addresses import next_of, pause, pointer_to, value_of
from moe_triton.backends.torch.loops import named, started
from moe_triton.backends.torch.panel_vectors import transpose
from moe_triton.backends.torch.panels import AHEAD, PANEL, first_line, memory, panel_functions
from moe_triton.backends.torch.row_loops import floats_at
from moe_triton.backends.torch.vectors import LANES, WORD, tile

WAITS = -1
DONE = 8  # bytes from the start of a record to `done`
PIECE_ROWS, PIECE_COLUMNS = 32, 128  # that a thread takes at a time


def fields(names):
    """Numbers in 64 bits, which are addresses, sizes, and steps in bytes; those of a record of any step come first.

    next           the number of the first piece that no thread has taken yet
    done           pieces that are finished
    then           the address of the step that follows, 0 for none; WAITS: none, but the threads wait for each other
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


def loops_over(is_bf16, has_instruction):
    """Return the loops of the two kinds of steps, which return the address of the step that follows."""
    size = 2 if is_bf16 else 4
    per_word = WORD // size
    spread, panels, product, wide_product, added = panel_functions(is_bf16, has_instruction)
    read_tile = tile(1, False, is_bf16, has_instruction, LANES, AHEAD)

    @njit
    @named(is_bf16, has_instruction)
    def narrow(address):
        job = carray(as_narrow(address), 1)[0]
        parts = carray(as_integers(job.parts), (job.num_parts, 3))
        mine, piece, scale = next_of(address), 0, np.float32(job.scale)
        panel, x_words, rank_words = min(job.t_columns, PANEL), job.x_size * size // WORD, job.rank * size // WORD
        # as it lies, a factor may be one panel
        is_panel = size == WORD and job.rank == panel and job.into_q == size and job.into_k == panel * WORD
        packed = memory(x_words * job.t_columns + rank_words * -(-job.columns // PANEL) * PANEL)
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
                        panels(out_of_e, job.out_of_k, job.out_of_q, job.rank, job.columns, out_of, PANEL)
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
        rank, width, size_k = job.narrow_row // size, PANEL, -(-rows // per_word)
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
                    wide_product(left, WORD, panel * WORD, wides, size_k, out_i, job.out_row, rows_i, columns, one)

    @njit
    @named(is_bf16, has_instruction)
    def gradient_in_place(job, e, start, rows, begin, square):
        """The same in fp32, where a number is a word: nothing is copied. square: memory for LANES x LANES numbers."""
        for q in range(begin, min(begin + PIECE_COLUMNS, job.columns), LANES):
            wide, columns = job.wide + start * job.wide_row + q * size, min(LANES, job.columns - q)
            for i in range(0, job.rank, LANES):
                narrow, rank = job.narrow + start * job.narrow_row + i * size, min(LANES, job.rank - i)
                out, step = square, LANES * size
                if not job.is_transposed:
                    out, step = job.out + e * job.out_step + i * job.out_row + q * size, job.out_row
                read_tile(narrow, size, job.narrow_row, wide, job.wide_row, rows, out, step, rank, columns)
                if job.is_transposed:
                    out = job.out + e * job.out_step + q * job.out_row + i * size
                    if rank == LANES:
                        transpose(square, LANES * size, LANES, columns, out, job.out_row)
                    else:
                        found = floats_at(square, LANES, LANES)
                        for j in range(columns):
                            row = floats_at(out + j * job.out_row, 1, rank)[0]
                            for k in range(rank):
                                row[k] = found[k, j]

    @njit
    @named(is_bf16, has_instruction)
    def gradient(address):
        job = carray(as_gradient(address), 1)[0]
        parts = carray(as_integers(job.parts), (job.num_parts, 3))
        longest = 0
        for p in range(len(parts)):
            longest = max(longest, parts[p, 2] - parts[p, 1])
        words = -(-longest // per_word) * (job.narrow_row // size + PANEL) if is_bf16 else LANES * LANES
        packed = memory(words)
        mine, piece = next_of(address), 0
        for p in range(len(parts)):
            e, start, stop = parts[p, 0], parts[p, 1], parts[p, 2]
            for begin in range(0, job.columns, PIECE_COLUMNS):
                if piece == mine:
                    if is_bf16:
                        gradient_of(job, e, start, stop - start, begin, first_line(packed))
                    else:
                        gradient_in_place(job, e, start, stop - start, begin, first_line(packed))
                    mine = next_of(address)
                piece += 1
        packed[0] = 0  # its memory lives until here
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
    while address > 0:
        address = gradient_fp32(address) if is_gradient(address) else narrow_fp32(address)


def steps_bf16(address):
    while address > 0:
        address = gradient_bf16(address) if is_gradient(address) else narrow_bf16(address)


def steps_halves(address):
    while address > 0:
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
