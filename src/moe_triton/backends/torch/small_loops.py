"""Loops that numba compiles for what takes torch dozens of short operations: routing, dispatch, and few narrow rows.

One call of a loop costs less than an operation of torch. See `loops` on what numba keeps on disk.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import numpy as np
from numba import njit
from numba.extending import register_jitable

from moe_triton.backends.torch.activation_loops import at_least, at_most, exp, sigmoid, sum_of
from moe_triton.backends.torch.loops import FUSED, SUMS, compiled, f32

SCORES = {"softmax": 0, "topk_softmax": 1, "sigmoid": 2}
EPS = f32(1e-20)  # `reference.EPS`
INFINITY = f32(np.inf)

# Routing --------------------------------------------------------------------------------------------------------------


@register_jitable
def choose(keys, ids, best):
    """Write the indices of the highest keys, highest first; the lower one wins a tie, and NaN counts as -inf."""
    top_k, found = len(ids), 0
    for e in range(len(keys)):
        key = keys[e] if keys[e] == keys[e] else -INFINITY
        if found < top_k or key > best[top_k - 1]:
            place = min(found, top_k - 1)
            while place > 0 and key > best[place - 1]:
                best[place], ids[place] = best[place - 1], ids[place - 1]
                place -= 1
            best[place], ids[place] = key, e
            found = min(found + 1, top_k)


@register_jitable
def softmax(x, out):
    """Write the softmax of x, and return the logarithm of the sum of its exponentials."""
    highest, total = -INFINITY, f32(0)
    for e in range(len(x)):
        highest = at_least(highest, x[e])
    for e in range(len(x)):
        out[e] = exp(x[e] - highest)
    for e in range(len(x)):
        total += out[e]
    for e in range(len(x)):
        out[e] /= total
    return highest if abs(highest) == INFINITY else highest + np.log(total)


@register_jitable
def chosen(x, ids, score, out):
    """Write what the weights are made of: the scores x of the chosen experts, or the softmax of their logits x.

    A negative id is no expert's.
    """
    for k in range(len(ids)):
        out[k] = x[ids[k]] if ids[k] >= 0 else -INFINITY if score == 1 else f32(0)
    if score == 1:
        softmax(out, out)
        for k in range(len(ids)):
            if ids[k] < 0:
                out[k] = f32(0)  # also where there is no expert at all


def route(logits, keys, given, mask, score, normalize, scale, experts, weights, counts, score_sums, z_sum):
    """`route_forward` of `keys`, what the choice is made by; the sums are made in fp64.

    given [T, K] and mask [T]: as there, or empty.
    """
    (num_tokens, num_experts), top_k = logits.shape, experts.shape[1]
    scores, best = np.empty(num_experts, f32), np.empty(top_k, f32)
    sums, z = np.zeros(num_experts), 0.0
    counts[:] = 0
    for t in range(num_tokens):
        row, ids, w = logits[t], experts[t], weights[t]
        if len(mask) and not mask[t]:
            ids[:], w[:] = -1, 0
            continue
        if len(given):
            ids[:] = given[t]
        if not len(given) or ids.max() == ids.min() == -1:
            choose(keys[t], ids, best)
        log_sum = softmax(row, scores)
        z += log_sum * log_sum
        divisor = f32(1)
        if score == 2:
            divisor = EPS
            for e in range(num_experts):
                scores[e] = sigmoid(row[e])
            for e in range(num_experts):
                divisor += scores[e]
        for e in range(num_experts):
            sums[e] += scores[e] / divisor
        chosen(row if score == 1 else scores, ids, score, w)
        total = EPS
        for k in range(top_k):
            if ids[k] >= 0:
                counts[ids[k]] += 1
            total += w[k]
        for k in range(top_k):
            w[k] = (w[k] / total if normalize else w[k]) * f32(scale)
    score_sums[:] = sums
    z_sum[0] = z


def route_backward(
    logits, experts, grad_weights, grad_score_sums, grad_z_sum, score, normalize, scale, grad_logits
):  # fmt: skip
    """Write the gradient of the logits, given those of the three outputs of `route` that have one.

    A choice that is negative has none, and neither has a token whose choices are all -1.
    """
    (num_tokens, num_experts), top_k = logits.shape, experts.shape[1]
    probs, scores = np.empty(num_experts, f32), np.empty(num_experts, f32)
    raw, grad_raw = np.empty(top_k, f32), np.empty(top_k, f32)
    for t in range(num_tokens):
        row, ids, grad = logits[t], experts[t], grad_logits[t]
        if ids.max() == ids.min() == -1:
            grad[:] = 0
            continue
        log_sum = softmax(row, probs)
        divisor, of_scores = f32(1), probs
        if score == 2:
            divisor, of_scores = EPS, scores
            for e in range(num_experts):
                scores[e] = sigmoid(row[e])
            for e in range(num_experts):
                divisor += scores[e]
        chosen(row if score == 1 else of_scores, ids, score, raw)
        total, mean = EPS, f32(0)
        for k in range(top_k):
            grad_raw[k] = grad_weights[t, k] * f32(scale)
            total += raw[k]
            mean += grad_raw[k] * raw[k]
        for k in range(top_k):
            if normalize:
                grad_raw[k] = (grad_raw[k] - mean / total) / total
        mean = f32(0)
        for e in range(num_experts):
            grad[e] = grad_score_sums[e]
            mean += grad[e] * of_scores[e] / divisor
        if score == 0:
            for k in range(top_k):
                if ids[k] >= 0:
                    grad[ids[k]] += grad_raw[k]
                    mean += grad_raw[k] * raw[k]
        for e in range(num_experts):
            grad[e] = (grad[e] - mean) / divisor
        if score == 2:
            for k in range(top_k):
                if ids[k] >= 0:
                    grad[ids[k]] += grad_raw[k]
        for e in range(num_experts):
            grad[e] *= of_scores[e] * (f32(1) - scores[e]) if score == 2 else of_scores[e]
        if score == 1:
            mean = f32(0)
            for k in range(top_k):
                mean += grad_raw[k] * raw[k]
            for k in range(top_k):
                if ids[k] >= 0:
                    grad[ids[k]] += raw[k] * (grad_raw[k] - mean)
        if grad_z_sum != 0:  # d logsumexp(l)**2 / dl = 2 * logsumexp(l) * softmax(l)
            for e in range(num_experts):
                grad[e] += f32(2 * grad_z_sum) * log_sum * probs[e]


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


# Experts: swiglu and gpt-oss's activation, fp32 -----------------------------------------------------------------------


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


route = compiled(route, fastmath=FUSED)
route_backward = compiled(route_backward, fastmath=FUSED)
sort_by_expert = compiled(sort_by_expert)
experts_forward = compiled(experts_forward, fastmath=FUSED)
experts_backward = compiled(experts_backward, fastmath=FUSED)
