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
from moe_triton.backends.torch.vectors import WORD


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def dot(x, y):
    """Its own function, as `sum_of` is. Four at once take twice as long: each has fewer partial sums then."""
    total = f32(0)
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


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
    for p in range(job.num_parts):
        for r in range(parts[p, 1], parts[p, 2]):
            x = floats_at(job.x + r * job.x_row, 1, job.size_in)[0]
            y = floats_at(job.y + r * job.y_row, 1, job.size_out)[0]
            for o in range(job.size_out):
                y[o] = dot(floats_at(parts[p, 0] + o * job.step, 1, job.size_in)[0], x)


def product_in_columns(address):
    """A Product whose matrices are dense in columns."""
    job = carray(as_product(address), 1)[0]
    parts = carray(as_parts(job.parts), (job.num_parts, 3))
    for p in range(job.num_parts):
        for r in range(parts[p, 1], parts[p, 2]):
            x = floats_at(job.x + r * job.x_row, 1, job.size_in)[0]
            y = floats_at(job.y + r * job.y_row, 1, job.size_out)[0]
            sum_rows(x, parts[p, 0], job.step, y)


def outer_product(address):
    """An Outer."""
    job = carray(as_outer(address), 1)[0]
    parts = carray(as_parts(job.parts), (job.num_parts, 3))
    for p in range(job.num_parts):
        first, size = parts[p, 1], parts[p, 2] - parts[p, 1]
        factors = np.empty(size, f32)
        for o in range(job.size_out):
            for r in range(size):
                factors[r] = floats_at(job.left + (first + r) * job.left_row + o * WORD, 1, 1)[0, 0]
            out = floats_at(parts[p, 0] + o * job.step, 1, job.size_in)[0]
            sum_rows(factors, job.right + first * job.right_row, job.right_row, out)


@cache
def plain_product_loop(is_in_rows):
    """Return the function of the address of a Product in fp32."""
    return started(product_in_rows if is_in_rows else product_in_columns, fastmath=FUSED)


@cache
def plain_outer_loop():
    """Return the function of the address of an Outer in fp32."""
    return started(outer_product, fastmath=FUSED)
