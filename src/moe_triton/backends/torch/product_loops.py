"""Products of rows with experts' matrices, which numba compiles for processors with vectors of 512 bits.

With many rows, some columns of a matrix are copied into panels in a thread's own cache, and multiplied from there:
see `panels`. With few rows the copy would take longer than the product, so that the matrix is read where it is. In both
cases a number's sum depends on its row and its column only, neither on other rows nor on the threads, but the order of
the sums differs, and only from panels is what an adapter adds part of the same sum. See `row_loops` on records and
threads.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from ctypes import Structure
from functools import cache

import numpy as np
from numba import carray, from_dtype, njit, types

from moe_triton.backends.torch.addresses import call_at, finish_streams, next_of, pointer_to
from moe_triton.backends.torch.loops import named, started
from moe_triton.backends.torch.panels import PANEL, first_line, memory, panel_functions, product_by
from moe_triton.backends.torch.row_loops import fields, prefetch_row
from moe_triton.backends.torch.vectors import LANES, ROWS, WORD, dots, tile

AHEAD = 16  # rows from the one that is read to the one that is asked for


class Product(Structure):
    """y[r] = matrix @ x[r] for the rows of every part, and where there is a t, y += t @ out_of[e]; steps are in bytes.

    parts    the address of num_parts times (address of an expert's matrix, its first row, the row past its last)
    step     from one row of a matrix [size_out, size_in] to the next; or from one column, where these are dense
    columns  of y that a thread takes at a time
    many     how many rows of a part are multiplied from panels
    threads  that run the loop
    narrow   the address of the `adapter_loops.Narrow` that makes t and is waited for, 0 for none
    by       that of the loop that takes it
    t        of an adapter; rank and out_of as in that record
    experts  the address of num_parts times (expert, .., ..), where there is one
    """

    _fields_ = fields(
        "x x_row step y y_row size_in size_out parts num_parts columns many threads "
        "experts narrow by t t_row rank out_of out_of_e out_of_k out_of_q"
    )


class Outer(Structure):
    """out[e] = left.T @ right over the rows of every part; steps are in bytes.

    parts             the address of num_parts times (address of out[e], its first row, the row past its last)
    outs, columns     of left and right, both multiples of PANEL: what a thread takes at a time
    streams           1: out is written past the caches where it can be: see `tile`
    """

    _fields_ = fields("left left_row right right_row step size_out size_in parts num_parts outs columns streams")


as_product, as_outer, as_parts = (
    pointer_to(number) for number in (from_dtype(np.dtype(Product)), from_dtype(np.dtype(Outer)), types.int64)
)


def few_by_rows(is_bf16, has_instruction):
    """Return the product of few rows with a matrix in rows, where it is."""
    size = 2 if is_bf16 else 4
    eight, four, two, one = (dots(*tile, is_bf16, has_instruction) for tile in ((8, 3), (4, 6), (2, 8), (1, 8)))

    @njit
    @named(is_bf16, has_instruction)
    def few(x, x_row, matrix, step, size_k, y, y_row, num_rows, num_outs):
        words = size_k * size // WORD
        row = 0
        while row < num_rows:
            left, x_r, y_r = num_rows - row, x + row * x_row, y + row * y_row
            if left > 4:
                for o in range(0, num_outs, 3):
                    eight(x_r, x_row, matrix + o * step, step, words, y_r + o * size, y_row, left, num_outs - o)
                row += 8
            elif left > 2:
                for o in range(0, num_outs, 6):
                    four(x_r, x_row, matrix + o * step, step, words, y_r + o * size, y_row, left, num_outs - o)
                row += 4
            elif left == 2:
                for o in range(0, num_outs, 8):
                    two(x_r, x_row, matrix + o * step, step, words, y_r + o * size, y_row, left, num_outs - o)
                row += 2
            else:
                for o in range(0, num_outs, 8):
                    one(x_r, x_row, matrix + o * step, step, words, y_r + o * size, y_row, left, num_outs - o)
                row += 1

    return few


def few_by_columns(is_bf16):
    """Return the product of few rows with a matrix in columns, where it is."""
    size = 2 if is_bf16 else 4
    eight, four, two, one = (
        tile(vectors, False, is_bf16, is_bf16, rows, AHEAD) for rows, vectors in ((8, 2), (4, 4), (2, 8), (1, 8))
    )

    @njit
    @named(is_bf16)
    def few(x, x_row, matrix, step, size_k, y, y_row, num_rows, num_columns):
        row, words = 0, size_k * size // WORD
        while row < num_rows:
            rows, x_r, y_r = num_rows - row, x + row * x_row, y + row * y_row
            if rows > 4:
                for q in range(0, num_columns, 2 * LANES):
                    matrix_q, y_q, more = matrix + q * size, y_r + q * size, num_columns - q
                    eight(x_r, x_row, WORD, matrix_q, step, words, y_q, y_row, rows, more)
                row += 8
            elif rows > 2:
                for q in range(0, num_columns, 4 * LANES):
                    matrix_q, y_q, more = matrix + q * size, y_r + q * size, num_columns - q
                    four(x_r, x_row, WORD, matrix_q, step, words, y_q, y_row, rows, more)
                row += 4
            elif rows == 2:
                for q in range(0, num_columns, 8 * LANES):
                    matrix_q, y_q, more = matrix + q * size, y_r + q * size, num_columns - q
                    two(x_r, x_row, WORD, matrix_q, step, words, y_q, y_row, rows, more)
                row += 2
            else:
                for q in range(0, num_columns, 8 * LANES):
                    matrix_q, y_q, more = matrix + q * size, y_r + q * size, num_columns - q
                    one(x_r, x_row, WORD, matrix_q, step, words, y_q, y_row, rows, more)
                row += 1

    return few


def adder(panels, added, is_bf16):
    """Return what adds an adapter's part to some columns of a part's rows, right after their product."""
    size = 2 if is_bf16 else 4

    @njit
    @named(is_bf16)
    def add_adapter(job, p, start, first, y, num_rows, columns):
        if job.narrow != 0:
            words = job.rank * size // WORD
            packed = memory(words * -(-columns // PANEL) * PANEL)
            e, right = carray(as_parts(job.experts), (job.num_parts, 3))[p, 0], first_line(packed)
            source = job.out_of + e * job.out_of_e + first * job.out_of_q
            panels(source, job.out_of_k, job.out_of_q, job.rank, columns, right, PANEL)
            added(job.t + start * job.t_row, job.t_row, right, words, y, job.y_row, num_rows, columns)
            packed[0] = 0  # its memory lives until here

    return add_adapter


def product_over(is_bf16, is_in_rows, few, is_wide=False):
    """Return the loop over a Product whose matrices are in rows or in columns.

    few: the product of fewer rows than `many`; None where all are multiplied from panels. is_wide: y is in fp32.
    """
    size = 2 if is_bf16 else 4
    size_out = WORD if is_wide else size
    _, panels, _, _, added = panel_functions(is_bf16, is_bf16)
    add_adapter = adder(panels, added, is_bf16)
    whole, half = (tile(2, False, is_bf16, is_bf16, rows, more="left", is_wide=is_wide) for rows in (ROWS, ROWS // 2))
    has_few = few is not None

    @njit
    @named(is_bf16, is_in_rows, is_wide)
    def fill(job, p, matrix, first, columns, words, out):
        """Write panels of `columns` of a part's matrix, from `first` on, and below each what an adapter adds to it."""
        step_k, step_o = (size, job.step) if is_in_rows else (job.step, size)
        rank = job.rank * size // WORD
        for q in range(0, columns, PANEL):
            out_q, columns_q = out + q * (words + rank) * WORD, min(PANEL, columns - q)
            panels(matrix + q * step_o, step_k, step_o, job.size_in, columns_q, out_q, PANEL)
            if rank > 0:
                e = carray(as_parts(job.experts), (job.num_parts, 3))[p, 0]
                source = job.out_of + e * job.out_of_e + (first + q) * job.out_of_q
                below = out_q + words * PANEL * WORD
                panels(source, job.out_of_k, job.out_of_q, job.rank, columns_q, below, PANEL)

    @njit
    @named(is_bf16, is_in_rows, is_wide)
    def multiply(x, x_row, right, words, y, y_row, num_rows, num_columns, t, t_row, rank):
        """Multiply up to ROWS rows by the columns of all panels."""
        for q in range(0, num_columns, PANEL):
            right_q, y_q, columns = right + q * (words + rank) * WORD, y + q * size_out, num_columns - q
            if num_rows > ROWS // 2:
                whole(x, x_row, WORD, right_q, PANEL * WORD, words, y_q, y_row, num_rows, columns, t, t_row, rank)
            else:
                half(x, x_row, WORD, right_q, PANEL * WORD, words, y_q, y_row, num_rows, columns, t, t_row, rank)

    @njit
    @named(is_bf16, is_in_rows, is_wide)
    def product(address):
        job = carray(as_product(address), 1)[0]
        if job.narrow != 0:
            call_at(job.by, job.narrow)
        parts = carray(as_parts(job.parts), (job.num_parts, 3))
        words, rank = job.size_in * size // WORD, job.rank * size // WORD
        step_o = job.step if is_in_rows else size
        packed = memory((words + rank) * -(-job.columns // PANEL) * PANEL)
        right, pieces = first_line(packed), -(-job.size_out // job.columns)  # of each part
        mine = next_of(address)
        while mine < pieces * len(parts):
            p, o = mine // pieces, mine % pieces * job.columns
            start, num_rows = parts[p, 1], parts[p, 2] - parts[p, 1]
            x, y = job.x + start * job.x_row, job.y + start * job.y_row + o * size_out
            matrix, columns = parts[p, 0] + o * step_o, min(job.columns, job.size_out - o)
            soon = mine + job.threads  # most likely this thread's next piece
            if has_few and num_rows < job.many:
                few(x, job.x_row, matrix, job.step, job.size_in, y, job.y_row, num_rows, columns)
                add_adapter(job, p, start, o, y, num_rows, columns)
            else:
                fill(job, p, matrix, o, columns, words, right)
                following, lines = 0, 0
                if soon < pieces * len(parts):  # comes into the cache meanwhile
                    following = parts[soon // pieces, 0] + soon % pieces * job.columns * step_o
                    lines = min(job.columns, job.size_out - soon % pieces * job.columns) if is_in_rows else job.size_in
                length = job.size_in * size if is_in_rows else job.columns * size
                for r in range(0, num_rows, ROWS):
                    for line in range(lines * r // num_rows, min(lines * (r + ROWS) // num_rows, lines)):
                        prefetch_row(following + line * job.step, length)
                    x_r, y_r, t_r = x + r * job.x_row, y + r * job.y_row, job.t + (start + r) * job.t_row
                    rows = min(ROWS, num_rows - r)
                    multiply(x_r, job.x_row, right, words, y_r, job.y_row, rows, columns, t_r, job.t_row, rank)
            mine = next_of(address)
        packed[0] = 0  # its memory lives until here

    return product


def outer_over(is_bf16):
    """Return the loop over an Outer."""
    size = 2 if is_bf16 else 4
    _, panels, _, _, _ = panel_functions(is_bf16, is_bf16)
    streamed = product_by(2, is_bf16, is_bf16, more="streams")

    @njit
    @named(is_bf16)
    def outer(address):
        job = carray(as_outer(address), 1)[0]
        parts = carray(as_parts(job.parts), (job.num_parts, 3))
        longest, streams = 0, job.streams
        for p in range(len(parts)):
            longest = max(longest, parts[p, 2] - parts[p, 1])
        words = -(-longest * size // WORD)
        packed = memory(words * (job.outs + job.columns))
        mine, piece, rights, held = next_of(address), 0, first_line(packed), -1
        lefts = rights + words * job.columns * WORD
        for p in range(len(parts)):
            start, num_rows = parts[p, 1], parts[p, 2] - parts[p, 1]
            size_k = -(-num_rows * size // WORD)
            for q in range(0, job.size_in, job.columns):
                right, columns = job.right + start * job.right_row + q * size, min(job.columns, job.size_in - q)
                first = piece  # of those that share these columns
                for o in range(0, job.size_out, job.outs):
                    if piece == mine:
                        if held != first:
                            held = first
                            panels(right, job.right_row, size, num_rows, columns, rights, PANEL)
                        left, outs = job.left + start * job.left_row + o * size, min(job.outs, job.size_out - o)
                        panels(left, job.left_row, size, num_rows, outs, lefts, PANEL)
                        out = parts[p, 0] + o * job.step + q * size
                        for i in range(0, outs, PANEL):
                            left_i, out_i, outs_i = lefts + i * size_k * WORD, out + i * job.step, min(PANEL, outs - i)
                            streamed(
                                left_i, WORD, PANEL * WORD, rights, size_k, out_i, job.step, outs_i, columns, streams
                            )
                        mine = next_of(address)
                    piece += 1
        finish_streams()
        packed[0] = 0  # its memory lives until here

    return outer


rows_fp32 = product_over(False, True, few_by_rows(False, False))
rows_bf16 = product_over(True, True, few_by_rows(True, True))
columns_fp32, columns_bf16 = (product_over(is_bf16, False, few_by_columns(is_bf16)) for is_bf16 in (False, True))
rows_wide = product_over(True, True, None, is_wide=True)
outers_fp32, outers_bf16 = outer_over(False), outer_over(True)


# Functions of a record's address. What they call are globals: see `adapter_loops`.
def product_by_rows_fp32(address):
    rows_fp32(address)


def product_by_rows_bf16(address):
    rows_bf16(address)


def product_by_columns_fp32(address):
    columns_fp32(address)


def product_by_columns_bf16(address):
    columns_bf16(address)


def product_by_rows_wide(address):
    rows_wide(address)


def outer_fp32(address):
    outers_fp32(address)


def outer_bf16(address):
    outers_bf16(address)


@cache
def product_loop(is_bf16, is_in_rows, is_wide=False):
    """Return the function of a Product's address; is_wide: of matrices in rows in bf16, whose products are in fp32."""
    if is_wide:
        return started(product_by_rows_wide)
    if is_in_rows:
        return started(product_by_rows_bf16 if is_bf16 else product_by_rows_fp32)
    return started(product_by_columns_bf16 if is_bf16 else product_by_columns_fp32)


@cache
def outer_loop(is_bf16):
    """Return the function of an Outer's address."""
    return started(outer_bf16 if is_bf16 else outer_fp32)
