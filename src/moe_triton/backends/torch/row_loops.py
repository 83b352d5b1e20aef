"""Loops that numba compiles: they gather rows, sum each token's rows, and turn rows in bf16 into fp32 and back.

Each is a function of the address of a record, which all of torch's threads run at once: a thread takes the next piece
of rows until there is none. What is computed for a row depends on neither the threads nor its neighbours. See `loops`
on what numba keeps on disk.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from ctypes import Structure, c_int64
from functools import cache

import numpy as np
from numba import carray, from_dtype, types
from numba.extending import register_jitable

from moe_triton.backends.torch.addresses import next_of, pointer_to, prefetch
from moe_triton.backends.torch.loops import f32, named, quickly_rounded, started, widened
from moe_triton.backends.torch.vectors import LINE

GATHERED, COMBINED = 64, 16  # rows of a piece
WIDENED = 1 << 14  # numbers of a piece
AHEAD = 4  # rows from the one that is read to the one that is asked for: most are not in cache


def fields(names):
    """Numbers in 64 bits, which are addresses and sizes; `next` counts the pieces that threads have taken."""
    return [(name, c_int64) for name in ("next", *names.split())]


class Gather(Structure):
    """out[i] = source[index[i]] for num_rows rows of so many words of 16 bits."""

    _fields_ = fields("source out index num_rows words")


class Combine(Structure):
    """out[t] = sum over k of weights[t, k] * rows[position[t, k]], in fp32 and in the order of k.

    A position that is negative, or num_rows or more, adds nothing. weights: fp32; address 0 for weights of 1.
    """

    _fields_ = fields("rows position weights out num_rows num_tokens top_k columns")


class Widening(Structure):
    """wide = narrow for `size` numbers in fp32 and in bf16; or rounded = wide + narrow, of which address 0 is none."""

    _fields_ = fields("wide narrow rounded size")


as_gather, as_combine, as_widening = (
    pointer_to(from_dtype(np.dtype(record))) for record in (Gather, Combine, Widening)
)
as_bits, as_floats, as_indices = (pointer_to(number) for number in (types.uint16, types.float32, types.int32))


# Arrays at addresses. Closures of a loop may name these, but not the functions of `addresses`: numba would not find the
# loop again on disk.
@register_jitable
def bits_at(address, num_rows, columns):
    return carray(as_bits(address), (num_rows, columns))


@register_jitable
def floats_at(address, num_rows, columns):
    return carray(as_floats(address), (num_rows, columns))


@register_jitable
def indices_at(address, num_rows, columns):
    return carray(as_indices(address), (num_rows, columns))


@register_jitable
def prefetch_row(address, size):
    for byte in range(0, size, LINE):
        prefetch(address + byte)


@cache
def gather_loop():
    """Return the function of a Gather's address."""

    def gather(address):
        job = carray(as_gather(address), 1)[0]
        index = indices_at(job.index, 1, job.num_rows)[0]
        first = next_of(address) * GATHERED
        while first < job.num_rows:
            for i in range(first, min(first + GATHERED, job.num_rows)):
                if i + AHEAD < job.num_rows:
                    prefetch_row(job.source + 2 * index[i + AHEAD] * job.words, 2 * job.words)
                source = bits_at(job.source + 2 * index[i] * job.words, 1, job.words)[0]
                out = bits_at(job.out + 2 * i * job.words, 1, job.words)[0]
                for j in range(job.words):
                    out[j] = source[j]
            first = next_of(address) * GATHERED

    return started(gather)


@cache
def combine_loop(is_bf16):
    """Return the function of a Combine's address, over rows in bf16 or fp32."""

    @register_jitable
    @named(is_bf16)
    def number(stored):
        return widened(stored) if is_bf16 else stored

    @register_jitable
    @named(is_bf16)
    def stored(number):
        return quickly_rounded(number) if is_bf16 else number

    @register_jitable
    @named(is_bf16)
    def weighted(weight, number_of_row):
        """Rounded, as another rank's rows are that come with their weights."""
        return number(stored(weight * number(number_of_row)))

    @register_jitable
    @named(is_bf16)
    def row(address, place, columns):
        if is_bf16:
            return bits_at(address + 2 * place * columns, 1, columns)[0]
        else:
            return floats_at(address + 4 * place * columns, 1, columns)[0]

    @named(is_bf16)
    def combine(address):
        job = carray(as_combine(address), 1)[0]
        columns = job.columns
        position = indices_at(job.position, job.num_tokens, job.top_k)
        weights = floats_at(job.weights, job.num_tokens, job.top_k)
        places, factors = np.empty(job.top_k, np.int64), np.empty(job.top_k, f32)
        sums, first = np.empty(columns, f32), next_of(address) * COMBINED
        while first < job.num_tokens:
            for t in range(first, min(first + COMBINED, job.num_tokens)):
                count = 0
                for k in range(job.top_k):
                    if 0 <= position[t, k] < job.num_rows:
                        places[count], factors[count] = position[t, k], f32(1)
                        if job.weights != 0:
                            factors[count] = weights[t, k]
                        count += 1
                sums[:] = 0
                i = 0
                while i + 4 <= count:  # four rows in a pass over the sums
                    r_0, r_1 = row(job.rows, places[i], columns), row(job.rows, places[i + 1], columns)
                    r_2, r_3 = row(job.rows, places[i + 2], columns), row(job.rows, places[i + 3], columns)
                    w_0, w_1, w_2, w_3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
                    for j in range(columns):
                        sums[j] += weighted(w_0, r_0[j])
                        sums[j] += weighted(w_1, r_1[j])
                        sums[j] += weighted(w_2, r_2[j])
                        sums[j] += weighted(w_3, r_3[j])
                    i += 4
                while i < count:
                    r_0, w_0 = row(job.rows, places[i], columns), factors[i]
                    for j in range(columns):
                        sums[j] += weighted(w_0, r_0[j])
                    i += 1
                out = row(job.out, t, columns)
                for j in range(columns):
                    out[j] = stored(sums[j])
            first = next_of(address) * COMBINED

    return started(combine)


def widen(address):
    job = carray(as_widening(address), 1)[0]
    first = next_of(address) * WIDENED
    while first < job.size:
        count = min(WIDENED, job.size - first)
        wide, narrow = floats_at(job.wide + 4 * first, 1, count)[0], bits_at(job.narrow + 2 * first, 1, count)[0]
        for j in range(count):
            wide[j] = widened(narrow[j])
        first = next_of(address) * WIDENED


def round_sum(address):
    job = carray(as_widening(address), 1)[0]
    first = next_of(address) * WIDENED
    while first < job.size:
        count = min(WIDENED, job.size - first)
        wide, rounded = floats_at(job.wide + 4 * first, 1, count)[0], bits_at(job.rounded + 2 * first, 1, count)[0]
        if job.narrow != 0:
            narrow = bits_at(job.narrow + 2 * first, 1, count)[0]
            for j in range(count):
                rounded[j] = quickly_rounded(wide[j] + widened(narrow[j]))
        else:
            for j in range(count):
                rounded[j] = quickly_rounded(wide[j])
        first = next_of(address) * WIDENED


@cache
def widening_loop():
    """Return the function of a Widening's address that widens."""
    return started(widen)


@cache
def rounding_loop():
    """Return the function of a Widening's address that rounds a sum."""
    return started(round_sum)
