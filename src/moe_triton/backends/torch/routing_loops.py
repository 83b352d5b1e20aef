"""Loops that numba compiles for routing: what takes torch dozens of operations, in one pass over the logits.

Each is a function of the address of a record, which all of torch's threads run at once, in pieces of PIECE tokens whose
sums are added in order: what is computed depends on neither the threads nor their number. See `loops` on what numba
keeps on disk.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from ctypes import Structure, c_double
from functools import cache

import numpy as np
from numba import carray, from_dtype, types
from numba.extending import register_jitable

from moe_triton.backends.torch.activation_loops import at_least, exp, sigmoid
from moe_triton.backends.torch.addresses import next_of, pointer_to
from moe_triton.backends.torch.loops import FUSED, compiled, f32, started
from moe_triton.backends.torch.row_loops import fields, floats_at, indices_at

PIECE = 256  # tokens that a thread takes at a time
DONE = 8  # bytes from the start of a Routing to `done`
EPS = f32(1e-20)  # `reference.EPS`
INFINITY = f32(np.inf)


class Routing(Structure):
    """`route_forward` of num_tokens tokens, in pieces within each of `sequences` sequences.

    logits, keys    [num_tokens, num_experts] fp32; keys: what the choice is made by
    given, mask     [num_tokens, top_k] int32 and [num_tokens] bool as there; address 0 for none
    score           of routing.LOOP_SCORES
    done            pieces that are finished
    of_pieces       counts, score_sums and z_sum of every piece, [pieces, 2 * num_experts + 1] fp64
    experts         [num_tokens, top_k] int32, which it writes, as all that follow
    weights         [num_tokens, top_k] fp32
    counts          [sequences, num_experts] int32
    score_sums      [sequences, num_experts] fp32
    z_sum           [1] fp32
    offsets         [num_experts + 1], source and position [num_tokens, top_k] int32: of the Dispatch without a
                    capacity, for one sequence only; address 0 where it is not wanted
    """

    _fields_ = fields(
        "done num_tokens num_experts top_k sequences logits keys given mask score normalize "
        "experts weights of_pieces counts score_sums z_sum offsets source position"
    )
    _fields_ += [("scale", c_double)]


class RoutingGradient(Structure):
    """The gradient of the logits, given those of the outputs of `Routing` that have one.

    grad_score_sums     [sequences, num_experts] fp32
    grad_logits         [num_tokens, num_experts] fp32, which it writes
    """

    _fields_ = fields(
        "num_tokens num_experts top_k sequences logits experts grad_weights grad_score_sums score normalize grad_logits"
    )
    _fields_ += [("scale", c_double), ("grad_z_sum", c_double)]


as_routing, as_gradient = (pointer_to(from_dtype(np.dtype(record))) for record in (Routing, RoutingGradient))
as_sums, as_flags = (pointer_to(number) for number in (types.float64, types.boolean))


@register_jitable
def sums_at(address, num_rows, columns):
    return carray(as_sums(address), (num_rows, columns))


@register_jitable
def flags_at(address, size):
    return carray(as_flags(address), size)


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
def are_none(ids):
    """Whether all are -1."""
    count = 0
    for k in range(len(ids)):
        count += ids[k] == -1
    return count == len(ids)


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


@register_jitable
def route(logits, keys, given, mask, score, normalize, scale, experts, weights, counts, score_sums):
    """Route the tokens of a piece, and return their z_sum; given [T, K] and mask [T]: or empty."""
    (num_tokens, num_experts), top_k = logits.shape, experts.shape[1]
    scores, best = np.empty(num_experts, f32), np.empty(top_k, f32)
    z = 0.0
    for e in range(num_experts):
        counts[e] = score_sums[e] = 0
    for t in range(num_tokens):
        row, ids, w = logits[t], experts[t], weights[t]
        if len(mask) and not mask[t]:
            for k in range(top_k):
                ids[k], w[k] = -1, f32(0)
            continue
        if len(given):
            for k in range(top_k):
                ids[k] = given[t, k]
        if not len(given) or are_none(ids):
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
            score_sums[e] += scores[e] / divisor
        chosen(row if score == 1 else scores, ids, score, w)
        total = EPS
        for k in range(top_k):
            if ids[k] >= 0:
                counts[ids[k]] += 1
            total += w[k]
        for k in range(top_k):
            w[k] = (w[k] / total if normalize else w[k]) * f32(scale)
    return z


@register_jitable
def route_backward(
    logits, experts, grad_weights, grad_score_sums, grad_z_sum, score, normalize, scale, grad_logits
):  # fmt: skip
    """Write the gradient of a piece's logits.

    A choice that is negative has none, and neither has a token whose choices are all -1.
    """
    (num_tokens, num_experts), top_k = logits.shape, experts.shape[1]
    probs, scores = np.empty(num_experts, f32), np.empty(num_experts, f32)
    raw, grad_raw = np.empty(top_k, f32), np.empty(top_k, f32)
    for t in range(num_tokens):
        row, ids, grad = logits[t], experts[t], grad_logits[t]
        if are_none(ids):
            for e in range(num_experts):
                grad[e] = f32(0)
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


@register_jitable
def add_pieces(of_pieces, each, counts, score_sums, z_sum):
    """Add what pieces have given, `each` of them for every sequence, in order."""
    (num_sequences, num_experts), z = counts.shape, 0.0
    total = np.empty(2 * num_experts)
    for b in range(num_sequences):
        for e in range(2 * num_experts):
            total[e] = 0
        for piece in range(b * each, (b + 1) * each):
            z += of_pieces[piece, 2 * num_experts]
            for e in range(2 * num_experts):
                total[e] += of_pieces[piece, e]
        for e in range(num_experts):
            counts[b, e], score_sums[b, e] = total[e], total[num_experts + e]
    z_sum[0] = z


@register_jitable
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


def route_pieces(address):
    job = carray(as_routing(address), 1)[0]
    (T, E, K), normalize = (job.num_tokens, job.num_experts, job.top_k), job.normalize != 0
    logits, keys = floats_at(job.logits, T, E), floats_at(job.keys, T, E)
    given, mask = indices_at(job.given, T if job.given else 0, K), flags_at(job.mask, T if job.mask else 0)
    experts, weights, size = indices_at(job.experts, T, K), floats_at(job.weights, T, K), T // job.sequences
    each = -(-size // PIECE)  # pieces of a sequence
    pieces = each * job.sequences
    of_pieces, mine, done = sums_at(job.of_pieces, pieces, 2 * E + 1), next_of(address), 0
    while mine < pieces:
        first = mine // each * size + mine % each * PIECE
        last = min(first + PIECE, (mine // each + 1) * size)
        of_pieces[mine, 2 * E] = route(
            logits[first:last], keys[first:last], given[first:last], mask[first:last], job.score, normalize, job.scale,
            experts[first:last], weights[first:last], of_pieces[mine, :E], of_pieces[mine, E : 2 * E],
        )  # fmt: skip
        done, mine = next_of(address + DONE) + 1, next_of(address)
    if done == pieces:  # this thread was the last
        add_pieces(
            of_pieces, each, indices_at(job.counts, job.sequences, E), floats_at(job.score_sums, job.sequences, E),
            floats_at(job.z_sum, 1, 1)[0],
        )  # fmt: skip
        if job.offsets:
            sort_by_expert(
                indices_at(job.experts, 1, T * K)[0], indices_at(job.counts, 1, E)[0],
                indices_at(job.offsets, 1, E + 1)[0], indices_at(job.source, 1, T * K)[0],
                indices_at(job.position, 1, T * K)[0],
            )  # fmt: skip


def route_pieces_backward(address):
    job = carray(as_gradient(address), 1)[0]
    (T, E, K), normalize = (job.num_tokens, job.num_experts, job.top_k), job.normalize != 0
    logits, experts, grad_weights = (
        floats_at(job.logits, T, E),
        indices_at(job.experts, T, K),
        floats_at(job.grad_weights, T, K),
    )
    grad_logits, grad_score_sums = floats_at(job.grad_logits, T, E), floats_at(job.grad_score_sums, job.sequences, E)
    size = T // job.sequences
    each, mine = -(-size // PIECE), next_of(address)
    while mine < each * job.sequences:
        first = mine // each * size + mine % each * PIECE
        last = min(first + PIECE, (mine // each + 1) * size)
        route_backward(
            logits[first:last], experts[first:last], grad_weights[first:last], grad_score_sums[mine // each],
            job.grad_z_sum, job.score, normalize, job.scale, grad_logits[first:last],
        )  # fmt: skip
        mine = next_of(address)


@cache
def dispatch_loop():
    """Return `sort_by_expert` over arrays of numpy."""
    return compiled(sort_by_expert)


@cache
def routing_loop():
    """Return the function of a Routing's address."""
    return started(route_pieces, fastmath=FUSED)


@cache
def routing_gradient_loop():
    """Return the function of a RoutingGradient's address."""
    return started(route_pieces_backward, fastmath=FUSED)
