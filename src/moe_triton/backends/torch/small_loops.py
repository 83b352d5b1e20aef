"""Loops that numba compiles for what takes torch dozens of short operations: dispatch, and experts of few narrow rows.

One call of a loop costs less than an operation of torch. See `loops` on what numba keeps on disk.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import numpy as np
from numba import njit
from numba.extending import register_jitable

from moe_triton.backends.torch.activation_loops import at_least, at_most, sigmoid, sum_of
from moe_triton.backends.torch.loops import FUSED, SUMS, compiled, f32


def sort_by_expert(experts, counts, offsets, source, position):
    """The fields of a Dispatch that drops nothing, of choices [S]; an id that is no expert's has no row."""
    num_experts, num_slots = len(counts), len(experts)
    counts[:] = 0
    for s in range(num_slots):
        if 0 <= experts[s] < num_experts:
            counts[experts[s]] += 1
    offsets[0] = 0
    for e in range(num_experts):
        offsets[e + 1] = offsets[e] + counts[e]
    following = offsets[:num_experts].copy()
    for s in range(num_slots):
        e = experts[s]
        position[s] = -1
        if 0 <= e < num_experts:
            position[s] = following[e]
            source[following[e]] = s
            following[e] += 1
    source[offsets[num_experts] :] = -1


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def dot(x, y):
    """Its own function, as `sum_of` is. Four at once take twice as long: each has fewer partial sums then."""
    total = f32(0)
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


@register_jitable
def add_rows(rows, factors, out):
    """out += factors @ rows, four rows in a pass over `out`."""
    i, count = 0, len(factors)
    while i + 4 <= count:
        f_0, f_1, f_2, f_3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        r_0, r_1, r_2, r_3 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        for j in range(len(out)):
            out[j] += f_0 * r_0[j] + f_1 * r_1[j] + f_2 * r_2[j] + f_3 * r_3[j]
        i += 4
    while i < count:
        f_0, r_0 = factors[i], rows[i]
        for j in range(len(out)):
            out[j] += f_0 * r_0[j]
        i += 1


@register_jitable
def halves(h, is_concatenated):
    """The gate and up parts of a row."""
    if is_concatenated:
        return h[: len(h) // 2], h[len(h) // 2 :]
    return h[0::2], h[1::2]


def experts_forward(x, w, offsets, source, up, down, is_concatenated, alpha, limit, offset, kept, out):
    """Add to `out` [T, d] the weighted outputs of the rows in expert order; `kept` gets the pre-activation if not [0].

    alpha, limit, offset: see `activation_loops.ActivationLoops`.
    """
    alpha, limit, offset = f32(alpha), f32(limit), f32(offset)
    top_k, h, a = w.shape[1], np.empty(up.shape[1], f32), np.empty(down.shape[2], f32)
    gate, lift = halves(h, is_concatenated)
    for e in range(len(offsets) - 1):
        for r in range(offsets[e], offsets[e + 1]):
            t, k = source[r] // top_k, source[r] % top_k
            for p in range(len(h)):
                h[p] = dot(up[e, p], x[t])
            if len(kept):
                kept[r] = h
            for j in range(len(a)):
                g = at_most(gate[j], limit)
                a[j] = g * sigmoid(alpha * g) * (at_least(at_most(lift[j], limit), -limit) + offset)
            for o in range(out.shape[1]):
                out[t, o] += w[t, k] * dot(down[e, o], a)


def experts_backward(
    x, w, offsets, source, up, down, is_concatenated, alpha, limit, offset,
    kept, grad_out, grad_x, grad_w, grad_up, grad_down,
):  # fmt: skip
    """Add to the gradients that are not [0], in zeros; without a kept pre-activation it is computed again."""
    alpha, limit, offset = f32(alpha), f32(limit), f32(offset)
    (num_experts, width, d), n, top_k = up.shape, down.shape[2], w.shape[1]
    most = 0
    for e in range(num_experts):
        most = max(most, offsets[e + 1] - offsets[e])
    # of one expert's rows: what its outer products read, in the columns that each needs
    xs, as_ = np.empty((most, d), f32), np.empty((most, n), f32)
    grad_ys, grad_hs = np.empty((d, most), f32), np.empty((width, most), f32)
    h, grad_h, grad_a, terms = np.empty(width, f32), np.empty(width, f32), np.empty(n, f32), np.empty(n, f32)
    gate, lift = halves(h, is_concatenated)
    grad_gate, grad_lift = halves(grad_h, is_concatenated)
    for e in range(num_experts):
        first, size = offsets[e], offsets[e + 1] - offsets[e]
        for i in range(size):
            t, k, a = source[first + i] // top_k, source[first + i] % top_k, as_[i]
            weight = w[t, k]
            for p in range(width):
                h[p] = kept[first + i, p] if len(kept) else dot(up[e, p], x[t])
            grad_a[:] = 0
            add_rows(down[e], grad_out[t], grad_a)
            for j in range(n):
                g, u = at_most(gate[j], limit), at_least(at_most(lift[j], limit), -limit) + offset
                s = sigmoid(alpha * g)
                slope = s * (f32(1) + alpha * g * (f32(1) - s))  # d (g * sigmoid(alpha * g)) / d g
                terms[j] = g * s * u * grad_a[j]
                a[j] = weight * (g * s * u)
                grad_gate[j] = f32(0) if gate[j] > limit else weight * grad_a[j] * u * slope
                grad_lift[j] = f32(0) if abs(lift[j]) > limit else weight * grad_a[j] * g * s
            if len(grad_w):
                grad_w[t, k] = sum_of(terms)
            if len(grad_x):
                add_rows(up[e], grad_h, grad_x[t])
            xs[i], grad_ys[:, i], grad_hs[:, i] = x[t], grad_out[t], grad_h
        if len(grad_down):
            for o in range(d):
                add_rows(as_, grad_ys[o, :size], grad_down[e, o])
        if len(grad_up):
            for p in range(width):
                add_rows(xs, grad_hs[p, :size], grad_up[e, p])


sort_by_expert = compiled(sort_by_expert)
experts_forward = compiled(experts_forward, fastmath=FUSED)
experts_backward = compiled(experts_backward, fastmath=FUSED)
