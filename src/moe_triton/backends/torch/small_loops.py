"""Loops that numba compiles for the experts of few rows: a whole pass in one call, on one thread.

They fill in the records of other loops and call these one after another: where rows are few, records that Python fills
in take longer than the work. See `loops` on what numba keeps on disk.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from ctypes import Structure, c_double
from functools import cache

import numpy as np
from numba import carray, from_dtype
from numba.extending import register_jitable

from moe_triton.backends.torch.activation_loops import Activation, as_activation
from moe_triton.backends.torch.addresses import call_at, pointer_to
from moe_triton.backends.torch.looped import LEFT_BYTES, MANY_ROWS, PANEL_BYTES, RIGHT_BYTES, taken
from moe_triton.backends.torch.loops import started
from moe_triton.backends.torch.panels import first_line, memory
from moe_triton.backends.torch.product_loops import Outer, Product, as_outer, as_product
from moe_triton.backends.torch.row_loops import fields, floats_at, indices_at
from moe_triton.backends.torch.vectors import WORD


class FewRows(Structure):
    """A call of the experts in fp32, forward or backward, in dense tensors; address 0 is for one that is not there.

    gate_up, down   [num_experts, width, d] and [num_experts, d, n]
    kept            the pre-activation [S, width], which `forward` writes and `backward` reads
    grad_hidden     a gradient that `backward` writes, as those after it
    multiply        the address of the loop over a Product whose matrices are in rows
    multiply_back   that of the one whose matrices are in columns
    outer           that of the loop over an Outer
    activate        that of the loop over an Activation
    """

    _fields_ = fields(
        "num_tokens num_experts top_k d width n hidden weights offsets source gate_up down kept out "
        "grad_out grad_hidden grad_weights grad_gate_up grad_down multiply multiply_back outer activate"
    )
    _fields_ += [(name, c_double) for name in ("alpha", "limit", "offset")]


as_few_rows = pointer_to(from_dtype(np.dtype(FewRows)))
RECORD = max(len(record._fields_) for record in (Product, Outer, Activation))  # numbers of 64 bits
register_jitable(taken)


@register_jitable
def write_parts(offsets, first, step, parts):
    """Write (address, first row, the row past its last) of every expert with rows, and return their number."""
    count = 0
    for e in range(len(offsets) - 1):
        if offsets[e + 1] > offsets[e]:
            parts[count, 0], parts[count, 1], parts[count, 2] = first + e * step, offsets[e], offsets[e + 1]
            count += 1
    return count


@register_jitable
def multiply(by, offsets, matrices, step, x, size_in, y, size_out):
    """y [S, size_out] = x [S, size_in] times the matrices [E, size_out, size_in] of the rows' experts.

    step: bytes from one row of a matrix to the next; or from one column, where `by` is for matrices in columns.
    """
    record, parts = np.zeros(RECORD, np.int64), np.empty((len(offsets) - 1, 3), np.int64)
    job = carray(as_product(record.ctypes.data), 1)[0]
    job.num_parts = write_parts(offsets, matrices, size_in * size_out * WORD, parts)
    job.parts, job.step, job.size_in, job.size_out = parts.ctypes.data, step, size_in, size_out
    job.x, job.x_row, job.y, job.y_row = x, size_in * WORD, y, size_out * WORD
    job.columns, job.many, job.threads = taken(size_in * WORD, size_out, PANEL_BYTES, 1), MANY_ROWS, 1
    call_at(by, record.ctypes.data)
    record[0] = parts[0, 0] = 0  # their memory lives until here


@register_jitable
def multiply_outer(by, offsets, left, size_out, right, size_in, out):
    """out [E, size_out, size_in] = left.T @ right over the rows of every expert; zeros for one without rows."""
    size, longest = size_out * size_in, 0
    for e in range(len(offsets) - 1):
        longest = max(longest, offsets[e + 1] - offsets[e])
        if offsets[e + 1] == offsets[e]:
            floats_at(out + e * size * WORD, 1, size)[:] = 0
    record, parts = np.zeros(RECORD, np.int64), np.empty((len(offsets) - 1, 3), np.int64)
    job = carray(as_outer(record.ctypes.data), 1)[0]
    job.num_parts, job.parts = write_parts(offsets, out, size * WORD, parts), parts.ctypes.data
    job.left, job.left_row, job.right, job.right_row = left, size_out * WORD, right, size_in * WORD
    job.size_out, job.size_in, job.step = size_out, size_in, size_in * WORD
    job.outs = taken(longest * WORD, size_out, LEFT_BYTES, 1)
    job.columns = taken(longest * WORD, size_in, RIGHT_BYTES, 1)
    call_at(by, record.ctypes.data)
    record[0] = parts[0, 0] = 0  # their memory lives until here


@register_jitable
def activate(job, num_rows, h, a, w, grad_h, weighted_a, grad_w):
    """Call the loop of the job over an Activation of these addresses."""
    record = np.zeros(RECORD, np.int64)
    of = carray(as_activation(record.ctypes.data), 1)[0]
    of.num_rows, of.n, of.h, of.a, of.w = num_rows, job.n, h, a, w
    of.grad_h, of.weighted_a, of.grad_w = grad_h, weighted_a, grad_w
    of.alpha, of.limit, of.offset = job.alpha, job.limit, job.offset
    call_at(job.activate, record.ctypes.data)
    record[0] = 0  # its memory lives until here


@register_jitable
def gather(job, offsets, source, values, out):
    """out[r] = values[token of row r]."""
    values, out = floats_at(values, job.num_tokens, job.d), floats_at(out, len(source), job.d)
    for r in range(offsets[-1]):
        row, token = out[r], values[source[r] // job.top_k]
        for j in range(job.d):
            row[j] = token[j]


@register_jitable
def scatter(job, offsets, source, rows, weights, out):
    """out[t] = the sum of the token's rows, times their weights [S], if there are any."""
    rows, out = floats_at(rows, len(source), job.d), floats_at(out, job.num_tokens, job.d)
    weights = floats_at(weights, 1, len(source) if weights else 0)[0]
    out[:] = 0
    for r in range(offsets[-1]):
        row, token = rows[r], out[source[r] // job.top_k]
        weight = weights[source[r]] if len(weights) else np.float32(1)
        for j in range(job.d):
            token[j] += weight * row[j]


def few_rows(address):
    """The output of a FewRows."""
    job = carray(as_few_rows(address), 1)[0]
    S, E, d, n, width = job.num_tokens * job.top_k, job.num_experts, job.d, job.n, job.width
    offsets, source = indices_at(job.offsets, 1, E + 1)[0], indices_at(job.source, 1, S)[0]
    num_rows = offsets[E]
    work = memory(num_rows * (2 * d + n + width))
    x = first_line(work)
    y = x + num_rows * d * WORD
    a = y + num_rows * d * WORD
    h = job.kept if job.kept else a + num_rows * n * WORD
    gather(job, offsets, source, job.hidden, x)
    multiply(job.multiply, offsets, job.gate_up, d * WORD, x, d, h, width)
    activate(job, num_rows, h, a, 0, 0, 0, 0)
    multiply(job.multiply, offsets, job.down, n * WORD, a, n, y, d)
    scatter(job, offsets, source, y, job.weights, job.out)
    work[0] = 0  # its memory lives until here


def few_rows_backward(address):
    """The gradients of a FewRows; without a kept pre-activation it is computed again."""
    job = carray(as_few_rows(address), 1)[0]
    S, E, d, n, width = job.num_tokens * job.top_k, job.num_experts, job.d, job.n, job.width
    offsets, source = indices_at(job.offsets, 1, E + 1)[0], indices_at(job.source, 1, S)[0]
    num_rows = offsets[E]
    work = memory(num_rows * (2 * d + 2 * n + 2 * width + 2))
    x = first_line(work)
    grad_y = x + num_rows * d * WORD
    grad_a = grad_y + num_rows * d * WORD
    a = grad_a + num_rows * n * WORD
    grad_h = a + num_rows * n * WORD
    h = grad_h + num_rows * width * WORD
    w = h + num_rows * width * WORD
    grad_w = w + num_rows * WORD
    gather(job, offsets, source, job.hidden, x)
    gather(job, offsets, source, job.grad_out, grad_y)
    weights, of_rows = floats_at(job.weights, 1, S)[0], floats_at(w, 1, num_rows)[0]
    for r in range(num_rows):
        of_rows[r] = weights[source[r]]
    if job.kept:
        h = job.kept
    else:
        multiply(job.multiply, offsets, job.gate_up, d * WORD, x, d, h, width)
    multiply(job.multiply_back, offsets, job.down, n * WORD, grad_y, d, grad_a, n)
    activate(job, num_rows, h, grad_a, w, grad_h, a, grad_w)
    if job.grad_weights:
        grad_weights, of_rows = floats_at(job.grad_weights, 1, S)[0], floats_at(grad_w, 1, num_rows)[0]
        grad_weights[:] = 0
        for r in range(num_rows):
            grad_weights[source[r]] = of_rows[r]
    if job.grad_down:
        multiply_outer(job.outer, offsets, grad_y, d, a, n, job.grad_down)
    if job.grad_gate_up:
        multiply_outer(job.outer, offsets, grad_h, width, x, d, job.grad_gate_up)
    if job.grad_hidden:  # its rows lie where those of grad_y were
        multiply(job.multiply_back, offsets, job.gate_up, d * WORD, grad_h, width, grad_y, d)
        scatter(job, offsets, source, grad_y, 0, job.grad_hidden)
    work[0] = 0  # its memory lives until here


@cache
def few_rows_loop():
    """Return the function of a FewRows' address that computes its output."""
    return started(few_rows)


@cache
def few_rows_backward_loop():
    """Return the function of a FewRows' address that computes its gradients."""
    return started(few_rows_backward)
