"""Vectors of 512 bits in LLVM's terms, as functions that numba's compiled loops call: what writes panels (`panels`).

See `loops` on what numba keeps on disk.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from moe_triton.backends.torch.vectors import (
    LANES,
    WORD,
    first_lanes,
    floats,
    load,
    load_first,
    pairs_of,
    store,
    store_first,
    word_type,
    words,
)


def spread_row(vectors, is_bf16):
    """Return a function that writes words: the columns of a row in fp32, of two rows in bf16, and zeros behind them."""

    def lower(context, builder, signature, arguments):
        lower_row, upper_row, lower_columns, upper_columns, out = arguments
        integer = lower_row.type
        for v in range(vectors):
            found, *upper = [
                load_first(builder, builder.add(row, integer(v * LANES * (2 if is_bf16 else 4))), mask, is_bf16)
                for row, columns in ((lower_row, lower_columns), (upper_row, upper_columns))[: 1 + is_bf16]
                for mask in (first_lanes(builder, builder.sub(columns, integer(v * LANES))),)
            ]
            if is_bf16:  # both are the upper halves of words
                found = pairs_of(builder, found, upper[0])
            store(builder, found, builder.add(out, integer(v * LANES * WORD)))
        return context.get_dummy_value()

    @intrinsic
    def run(typing_context, lower_row, upper_row, lower_columns, upper_columns, out):
        return types.void(*[types.intp] * 5), lower

    return run


@intrinsic
def transpose(typing_context, source, step, num_rows, num_columns, out, out_step):
    """out[j, i] = source[i, j] of up to 16 rows and 16 columns of words; steps are in bytes.

    A row of `out` is a whole vector: zeros stand for the rows that the source lacks.
    """

    def lower(context, builder, signature, arguments):
        source, step, num_rows, num_columns, out, out_step = arguments
        integer, none = source.type, source.type(0)

        def turned(rows):
            half = LANES // 2
            while half:  # squares of this size change places across the diagonal
                for i in range(LANES):
                    if not i & half:
                        pair = rows[i], rows[i + half]
                        places = [
                            [lane if not lane & half else LANES + lane - half for lane in range(LANES)],
                            [lane + half if not lane & half else LANES + lane for lane in range(LANES)],
                        ]
                        rows[i], rows[i + half] = (
                            builder.shuffle_vector(*pair, ir.Constant(words, [word_type(lane) for lane in lanes]))
                            for lanes in places
                        )
                half //= 2
            return rows

        def lanes_if(index, limit, count):
            has = builder.icmp_signed("<", integer(index), limit)
            return first_lanes(builder, builder.select(has, count, none))

        starts = [builder.add(source, builder.mul(integer(i), step)) for i in range(LANES)]
        places = [builder.add(out, builder.mul(integer(j), out_step)) for j in range(LANES)]
        whole = [builder.icmp_signed(">=", count, integer(LANES)) for count in (num_rows, num_columns)]
        with builder.if_else(builder.and_(*whole)) as (is_whole, is_not):  # masks would take as long as all else
            with is_whole:
                for row, place in zip(turned([load(builder, at, floats) for at in starts]), places, strict=True):
                    store(builder, row, place)
            with is_not:
                masks = [lanes_if(i, num_rows, num_columns) for i in range(LANES)]
                rows = turned([load_first(builder, *row, is_bf16=False) for row in zip(starts, masks, strict=True)])
                for j, (row, place) in enumerate(zip(rows, places, strict=True)):
                    store_first(builder, row, place, lanes_if(j, num_columns, integer(LANES)), is_bf16=False)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), lower
