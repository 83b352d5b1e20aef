"""Products of words by tiles whose right side lies in panels, as functions that numba's compiled loops call.

A panel holds 32 columns (16 where these are all) of a factor for every k, one k after another: a tile reads it in
order, from cache. A word is a number in fp32, or two neighbours along k in bf16. Each number of a result is a sum in
the order of k: its bits depend on neither the threads nor its neighbours.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

import numpy as np
from numba import njit

from moe_triton.backends.torch.addresses import prefetch
from moe_triton.backends.torch.loops import named
from moe_triton.backends.torch.panel_vectors import spread_row, transpose
from moe_triton.backends.torch.vectors import LANES, LINE, ROWS, WORD, tile

PANEL = 2 * LANES  # columns
AHEAD = 16  # rows from the one that is copied to the one that is asked for


@njit
def memory(words):
    """Memory for words that begins before `first_line` of it."""
    return np.empty(words + LINE // WORD, np.float32)


@njit
def first_line(memory):
    return -(-memory.ctypes.data // LINE) * LINE


@njit
def transposed_panel(source, step, size_k, columns, out, width):
    """A panel of words, [size_k, width], of columns that lie `step` bytes apart, each with its words one by one."""
    for j in range(0, width, LANES):
        for k in range(0, size_k, LANES):
            source_jk, out_jk = source + j * step + k * WORD, out + (k * width + j) * WORD
            for i in range(LANES):
                prefetch(source_jk + (LANES + i) * step)
            transpose(source_jk, step, columns - j, min(LANES, size_k - k), out_jk, width * WORD)


def product_by(vectors, is_bf16, has_instruction, is_wide=False, more="scale"):
    """Return the product with panels of so many vectors; its last argument is what `tile` calls `more`."""
    size_out, width = 2 if is_bf16 and not is_wide else WORD, vectors * LANES
    whole, half = (
        tile(vectors, False, is_bf16, has_instruction, rows, more=more, is_wide=is_wide) for rows in (ROWS, ROWS // 2)
    )

    @named(is_bf16, has_instruction, vectors, is_wide, more)
    def product(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns, last):
        for p in range(0, num_rows, ROWS):
            left_p, out_p = left + p * left_row, out + p * out_row
            for q in range(0, num_columns, width):
                right_q, out_q = right + q * size_k * WORD, out_p + q * size_out
                rows, columns, step = num_rows - p, num_columns - q, width * WORD
                if rows > ROWS // 2:
                    whole(left_p, left_row, left_k, right_q, step, size_k, out_q, out_row, rows, columns, last)
                else:
                    half(left_p, left_row, left_k, right_q, step, size_k, out_q, out_row, rows, columns, last)

    return njit(product)


def panel_functions(is_bf16, has_instruction, is_wide=False):
    """Return spread, panels, product, wide_product and added, over numbers in bf16 or in fp32; steps are in bytes.

    wide_product is product where panels have 32 columns however many there are. is_wide: products are in fp32.
    """
    size = 2 if is_bf16 else 4
    per_word = WORD // size
    spread_one, spread_two = (spread_row(vectors, is_bf16) for vectors in (1, 2))

    by_one, by_two = (product_by(vectors, is_bf16, has_instruction, is_wide) for vectors in (1, 2))
    add_tile = tile(2, True, is_bf16, has_instruction)

    @njit
    @named(is_bf16, has_instruction, is_wide)
    def product(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns, scale):
        """out[p, q] = scale * sum over k < size_k of left[p, k] * right[k, q].

        `right` is in panels, with zeros behind the last column; these have 16 columns where there are no more.
        """
        if num_columns > LANES:
            by_two(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns, scale)
        else:
            by_one(left, left_row, left_k, right, size_k, out, out_row, num_rows, num_columns, scale)

    @njit
    @named(is_bf16, has_instruction)
    def added(left, left_row, right, size_k, out, out_row, num_rows, num_columns):
        """out[p, q] += sum over k < size_k of left[p, k] * right[k, q]; `right` is in panels of 32 columns."""
        for p in range(0, num_rows, ROWS):
            for q in range(0, num_columns, PANEL):
                left_p, right_q, out_pq = left + p * left_row, right + q * size_k * WORD, out + p * out_row + q * size
                rows, columns = num_rows - p, num_columns - q
                add_tile(left_p, left_row, WORD, right_q, PANEL * WORD, size_k, out_pq, out_row, rows, columns)

    @njit
    @named(is_bf16, has_instruction)
    def spread(source, step, num_rows, columns, words, width):
        """Write columns of rows, `step` bytes apart, as words[k, q], with zeros where rows or columns end."""
        for k in range(-(-num_rows // per_word)):
            lower, out = source + k * per_word * step, words + k * width * WORD
            for i in range(per_word):
                prefetch(lower + (AHEAD + i) * step)
            upper_columns = columns if per_word * k + 1 < num_rows else 0
            if width > LANES:
                spread_two(lower, lower + step, columns, upper_columns, out)
            else:
                spread_one(lower, lower + step, columns, upper_columns, out)

    @njit
    @named(is_bf16, has_instruction)
    def panels(source, step_k, step_q, size_k, columns, out, width):
        """Write a factor [size_k, columns] in panels of words, with zeros up to `width` in the last."""
        words = -(-size_k * size // WORD)
        for q in range(0, columns, width):
            source_q, out_q = source + q * step_q, out + q * words * WORD
            if step_k == size:
                transposed_panel(source_q, step_q, words, min(width, columns - q), out_q, width)
            else:
                spread(source_q, step_k, size_k, min(width, columns - q), out_q, width)

    return spread, panels, product, by_two, added
