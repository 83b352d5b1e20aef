"""Products of rows with experts' matrices, which numba compiles for processors with vectors of 512 bits.

A library copies a matrix into an order of its own before it multiplies, which with few rows takes longer than the
product. These loops read it where it is: sums of a tile stay in registers. A number's sum depends on its row and its
column only, not on how many rows there are, nor on the threads. See `row_loops` on records and threads.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from ctypes import Structure
from functools import cache

import numpy as np
from numba import carray, from_dtype, njit, types

from moe_triton.backends.torch.adapter_loops import (
    added_bf16,
    added_fp32,
    first_line,
    memory,
    narrow_bf16,
    narrow_fp32,
    panels_bf16,
    panels_fp32,
)
from moe_triton.backends.torch.addresses import next_of, pointer_to
from moe_triton.backends.torch.loops import named, started
from moe_triton.backends.torch.row_loops import fields
from moe_triton.backends.torch.vectors import LANES, WORD, dots, tile

PIECE, COLUMNS = 96, 128  # columns of a result that a thread takes at a time, of matrices in rows and in columns
PANEL = 2 * LANES  # columns of an adapter's factor that are added at a time
MANY_ROWS = 64  # from which a copy of columns pays: rows that are 2^n bytes apart share few places of a cache
IN_CACHE = 1 << 15  # numbers of the rows that are read for every few rows of a gradient
AHEAD = 16  # rows from the one that is read to the one that is asked for


class Product(Structure):
    """y[r] = matrix @ x[r] for the rows of every part, and where there is a t, y += t @ out_of[e]; steps are in bytes.

    parts    the address of num_parts times (address of an expert's matrix, its first row, the row past its last)
    step     from one row of a matrix [size_out, size_in] to the next; or from one column, where these are dense
    narrow   the address of the `adapter_loops.Narrow` that makes t, with a step that follows, 0 for none
    t        of an adapter; rank and out_of as in that record
    experts  the address of num_parts times (expert, .., ..), where there is one
    """

    _fields_ = fields(
        "x x_row step y y_row size_in size_out parts num_parts "
        "experts narrow t t_row rank out_of out_of_e out_of_k out_of_q"
    )


class Outer(Structure):
    """out[e] = left.T @ right over the rows of every part, fp32; steps are in bytes.

    parts    the address of num_parts times (address of out[e], its first row, the row past its last)
    """

    _fields_ = fields("left left_row right right_row step size_out size_in parts num_parts")


as_product, as_outer, as_parts, as_floats = (
    pointer_to(number)
    for number in (from_dtype(np.dtype(Product)), from_dtype(np.dtype(Outer)), types.int64, types.float32)
)


def by_rows(is_bf16, has_instruction, add_adapter):
    """Return the loop over a Product whose matrices are in rows."""
    size = 2 if is_bf16 else 4
    eight, four, two, one = (dots(*tile, is_bf16, has_instruction) for tile in ((8, 3), (4, 6), (2, 8), (1, 8)))

    @njit
    @named(is_bf16, has_instruction)
    def part(x, x_row, matrix, step, words, y, y_row, num_rows, num_outs):
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

    @njit
    @named(is_bf16, has_instruction)
    def product(address):
        job = carray(as_product(address), 1)[0]
        parts = carray(as_parts(job.parts), (job.num_parts, 3))
        mine, piece, words = next_of(address), 0, job.size_in * size // WORD
        for p in range(len(parts)):
            start, num_rows = parts[p, 1], parts[p, 2] - parts[p, 1]
            for o in range(0, job.size_out, PIECE):
                if piece == mine:
                    x, y = job.x + start * job.x_row, job.y + start * job.y_row + o * size
                    matrix, columns = parts[p, 0] + o * job.step, min(PIECE, job.size_out - o)
                    part(x, job.x_row, matrix, job.step, words, y, job.y_row, num_rows, columns)
                    add_adapter(job, p, start, o, y, num_rows, columns)
                    mine = next_of(address)
                piece += 1

    return product


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


def by_columns():
    """Return the loop over some columns of a product, in fp32, whose right side is in rows of numbers."""
    eight, four, two, one = (
        tile(vectors, False, False, False, rows, AHEAD) for rows, vectors in ((8, 2), (4, 4), (2, 8), (1, 8))
    )

    @njit
    def part(left, left_row, left_k, right, right_k, size_k, out, out_row, num_rows, num_columns):
        row = 0
        while row < num_rows:
            rows, left_r, out_r = num_rows - row, left + row * left_row, out + row * out_row
            if rows > 4:
                for q in range(0, num_columns, 2 * LANES):
                    right_q, out_q, more = right + q * WORD, out_r + q * WORD, num_columns - q
                    eight(left_r, left_row, left_k, right_q, right_k, size_k, out_q, out_row, rows, more)
                row += 8
            elif rows > 2:
                for q in range(0, num_columns, 4 * LANES):
                    right_q, out_q, more = right + q * WORD, out_r + q * WORD, num_columns - q
                    four(left_r, left_row, left_k, right_q, right_k, size_k, out_q, out_row, rows, more)
                row += 4
            elif rows == 2:
                for q in range(0, num_columns, 8 * LANES):
                    right_q, out_q, more = right + q * WORD, out_r + q * WORD, num_columns - q
                    two(left_r, left_row, left_k, right_q, right_k, size_k, out_q, out_row, rows, more)
                row += 2
            else:
                for q in range(0, num_columns, 8 * LANES):
                    right_q, out_q, more = right + q * WORD, out_r + q * WORD, num_columns - q
                    one(left_r, left_row, left_k, right_q, right_k, size_k, out_q, out_row, rows, more)
                row += 1

    return part


columns_fp32 = by_columns()
add_fp32, add_bf16 = adder(panels_fp32, added_fp32, False), adder(panels_bf16, added_bf16, True)
rows_fp32, rows_bf16 = by_rows(False, False, add_fp32), by_rows(True, True, add_bf16)


@njit
def copied(source, step, num_rows, columns):
    """Columns of fp32 rows, `step` bytes apart, one row after another."""
    out = np.empty((num_rows, COLUMNS), np.float32)
    for i in range(num_rows):
        row = carray(as_floats(source + i * step), columns)
        for j in range(columns):
            out[i, j] = row[j]
    return out


# Functions of a record's address. What they call are globals: see `adapter_loops`.
def product_fp32(address):
    job = carray(as_product(address), 1)[0]
    if job.narrow != 0:
        narrow_fp32(job.narrow)
    rows_fp32(address)


def product_bf16(address):
    job = carray(as_product(address), 1)[0]
    if job.narrow != 0:
        narrow_bf16(job.narrow)
    rows_bf16(address)


def product_by_columns(address):
    job = carray(as_product(address), 1)[0]
    if job.narrow != 0:
        narrow_fp32(job.narrow)
    parts = carray(as_parts(job.parts), (job.num_parts, 3))
    mine, piece = next_of(address), 0
    for p in range(len(parts)):
        start, num_rows = parts[p, 1], parts[p, 2] - parts[p, 1]
        for q in range(0, job.size_out, COLUMNS):
            if piece == mine:
                x, y = job.x + start * job.x_row, job.y + start * job.y_row + q * WORD
                matrix, columns = parts[p, 0] + q * WORD, min(COLUMNS, job.size_out - q)
                if num_rows >= MANY_ROWS:
                    panel = copied(matrix, job.step, job.size_in, columns)
                    right, step = panel.ctypes.data, COLUMNS * WORD
                    columns_fp32(x, job.x_row, WORD, right, step, job.size_in, y, job.y_row, num_rows, columns)
                    panel[0, 0] = 0  # its memory lives until here
                else:
                    columns_fp32(x, job.x_row, WORD, matrix, job.step, job.size_in, y, job.y_row, num_rows, columns)
                add_fp32(job, p, start, q, y, num_rows, columns)
                mine = next_of(address)
            piece += 1


def outer_fp32(address):
    job = carray(as_outer(address), 1)[0]
    parts = carray(as_parts(job.parts), (job.num_parts, 3))
    mine, piece = next_of(address), 0
    for p in range(len(parts)):
        start, num_rows = parts[p, 1], parts[p, 2] - parts[p, 1]
        for o in range(0, job.size_out, PIECE):
            if piece == mine:
                left, outs = job.left + start * job.left_row + o * WORD, min(PIECE, job.size_out - o)
                width = max(IN_CACHE // num_rows // COLUMNS, 1) * COLUMNS
                for q in range(0, job.size_in, width):
                    right = job.right + start * job.right_row + q * WORD
                    out, columns = parts[p, 0] + o * job.step + q * WORD, min(width, job.size_in - q)
                    columns_fp32(left, WORD, job.left_row, right, job.right_row, num_rows, out, job.step, outs, columns)
                mine = next_of(address)
            piece += 1


@cache
def product_loop(is_bf16, is_in_rows):
    """Return the function of a Product's address; of matrices in columns, in fp32."""
    return started(product_by_columns if not is_in_rows else product_bf16 if is_bf16 else product_fp32)


@cache
def outer_loop():
    """Return the function of an Outer's address."""
    return started(outer_fp32)
