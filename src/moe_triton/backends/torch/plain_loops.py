"""Products of few rows in fp32 that numba compiles for any processor, over the records of `product_loops`.

See `loops` on what numba keeps on disk.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from functools import cache

import numpy as np
from numba import carray, njit
from numba.extending import register_jitable

from moe_triton.backends.torch.loops import FUSED, SUMS, f32, started
from moe_triton.backends.torch.product_loops import as_outer, as_parts, as_product
from moe_triton.backends.torch.row_loops import floats_at
from moe_triton.backends.torch.vectors import LINE, WORD

COLUMNS = 256  # whose sums are made at a time, in a thread's first cache
TURNED_ROWS = 32  # of an expert, from which a product with columns of its matrix pays for turning it


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def dot(x, y):
    """Its own function, as `sum_of` is. Four at once take twice as long: each has fewer partial sums then."""
    total = f32(0)
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


@register_jitable
def number_at(address):
    return floats_at(address, 1, 1)[0, 0]


@register_jitable
def multiply_rows(left, left_row, left_k, num_rows, right, right_k, size_k, out, out_row, num_columns):
    """out[r] = sum over k of left[r, k] * right[k], of which both are dense in columns; steps are in bytes.

    Four rows and two k at a time; rows past the last are the last once more. The sums lie in one array, at distances
    that are known: else LLVM would make no vectors of them.
    """
    sums, last = np.empty(4 * COLUMNS, f32), num_rows - 1
    for q in range(0, num_columns, COLUMNS):
        columns = min(COLUMNS, num_columns - q)
        for r in range(0, num_rows, 4):
            l_0, l_1 = left + r * left_row, left + min(r + 1, last) * left_row
            l_2, l_3 = left + min(r + 2, last) * left_row, left + min(r + 3, last) * left_row
            sums[:] = 0
            for k in range(0, size_k - 1, 2):
                here, there = k * left_k, (k + 1) * left_k
                m_0 = floats_at(right + k * right_k + q * WORD, 1, columns)[0]
                m_1 = floats_at(right + (k + 1) * right_k + q * WORD, 1, columns)[0]
                x_0, z_0 = number_at(l_0 + here), number_at(l_0 + there)
                x_1, z_1 = number_at(l_1 + here), number_at(l_1 + there)
                x_2, z_2 = number_at(l_2 + here), number_at(l_2 + there)
                x_3, z_3 = number_at(l_3 + here), number_at(l_3 + there)
                for j in range(columns):
                    a, b = m_0[j], m_1[j]
                    sums[j] += x_0 * a + z_0 * b
                    sums[COLUMNS + j] += x_1 * a + z_1 * b
                    sums[2 * COLUMNS + j] += x_2 * a + z_2 * b
                    sums[3 * COLUMNS + j] += x_3 * a + z_3 * b
            if size_k % 2 == 1:
                here = (size_k - 1) * left_k
                m_0 = floats_at(right + (size_k - 1) * right_k + q * WORD, 1, columns)[0]
                x_0, x_1, x_2, x_3 = (
                    number_at(l_0 + here), number_at(l_1 + here), number_at(l_2 + here), number_at(l_3 + here)
                )  # fmt: skip
                for j in range(columns):
                    sums[j] += x_0 * m_0[j]
                    sums[COLUMNS + j] += x_1 * m_0[j]
                    sums[2 * COLUMNS + j] += x_2 * m_0[j]
                    sums[3 * COLUMNS + j] += x_3 * m_0[j]
            for i in range(min(4, num_rows - r)):
                row = floats_at(out + (r + i) * out_row + q * WORD, 1, columns)[0]
                for j in range(columns):
                    row[j] = sums[i * COLUMNS + j]


@register_jitable
def sum_rows(factors, rows, step, out):
    """out = factors @ rows, which lie `step` bytes apart, four rows in a pass over `out`."""
    size, i, count = len(out), 0, len(factors)
    out[:] = 0
    while i + 4 <= count:
        f_0, f_1, f_2, f_3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        first = rows + i * step
        r_0, r_1 = floats_at(first, 1, size)[0], floats_at(first + step, 1, size)[0]
        r_2, r_3 = floats_at(first + 2 * step, 1, size)[0], floats_at(first + 3 * step, 1, size)[0]
        for j in range(size):
            out[j] += f_0 * r_0[j] + f_1 * r_1[j] + f_2 * r_2[j] + f_3 * r_3[j]
        i += 4
    while i < count:
        f_0, r_0 = factors[i], floats_at(rows + i * step, 1, size)[0]
        for j in range(size):
            out[j] += f_0 * r_0[j]
        i += 1


def product_in_rows(address):
    """A Product whose matrices are dense in rows."""
    job = carray(as_product(address), 1)[0]
    parts = carray(as_parts(job.parts), (job.num_parts, 3))
    turned = np.empty((job.size_in, job.size_out), f32)
    for p in range(job.num_parts):
        matrix, start, num_rows = parts[p, 0], parts[p, 1], parts[p, 2] - parts[p, 1]
        x, y = job.x + start * job.x_row, job.y + start * job.y_row
        if num_rows < TURNED_ROWS:
            for r in range(num_rows):
                row = floats_at(x + r * job.x_row, 1, job.size_in)[0]
                out = floats_at(y + r * job.y_row, 1, job.size_out)[0]
                for o in range(job.size_out):
                    out[o] = dot(floats_at(matrix + o * job.step, 1, job.size_in)[0], row)
            continue
        for first in range(0, job.size_out, LINE // WORD):
            for k in range(job.size_in):
                for o in range(first, min(first + LINE // WORD, job.size_out)):
                    turned[k, o] = number_at(matrix + o * job.step + k * WORD)
        step = job.size_out * WORD
        multiply_rows(
            x, job.x_row, WORD, num_rows, turned.ctypes.data, step, job.size_in, y, job.y_row, job.size_out
        )  # fmt: skip
    turned[0, 0] = 0  # its memory lives until here


def product_in_columns(address):
    """A Product whose matrices are dense in columns."""
    job = carray(as_product(address), 1)[0]
    parts = carray(as_parts(job.parts), (job.num_parts, 3))
    for p in range(job.num_parts):
        matrix, start, num_rows = parts[p, 0], parts[p, 1], parts[p, 2] - parts[p, 1]
        x, y = job.x + start * job.x_row, job.y + start * job.y_row
        if num_rows > 2:
            multiply_rows(x, job.x_row, WORD, num_rows, matrix, job.step, job.size_in, y, job.y_row, job.size_out)
        else:
            for r in range(num_rows):
                row = floats_at(x + r * job.x_row, 1, job.size_in)[0]
                sum_rows(row, matrix, job.step, floats_at(y + r * job.y_row, 1, job.size_out)[0])


def outer_product(address):
    """An Outer."""
    job = carray(as_outer(address), 1)[0]
    parts = carray(as_parts(job.parts), (job.num_parts, 3))
    for p in range(job.num_parts):
        start, num_rows = parts[p, 1], parts[p, 2] - parts[p, 1]
        left, right = job.left + start * job.left_row, job.right + start * job.right_row
        multiply_rows(
            left, WORD, job.left_row, job.size_out, right, job.right_row, num_rows, parts[p, 0], job.step, job.size_in
        )  # fmt: skip


@cache
def plain_product_loop(is_in_rows):
    """Return the function of the address of a Product in fp32."""
    return started(product_in_rows if is_in_rows else product_in_columns, fastmath=FUSED)


@cache
def plain_outer_loop():
    """Return the function of the address of an Outer in fp32."""
    return started(outer_product, fastmath=FUSED)
