"""Vectors of 512 bits in LLVM's terms, as functions that numba's compiled loops call: tiles of products.

See `adapter_loops` on what is multiplied, and `loops` on what numba keeps on disk.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # of a vector
ROWS = 8  # of a tile: with two vectors each, 16 sums that do not wait for each other
WORD, LINE = 4, 64  # bytes, of a word and of a cache line
PRODUCT = [types.intp] * 10  # addresses, steps and sizes: see `tile`

float_type, word_type, half_type = ir.FloatType(), ir.IntType(32), ir.IntType(16)
floats, words, halves = (ir.VectorType(element, LANES) for element in (float_type, word_type, half_type))


class BFloatType(ir.Type):
    """The type that llvmlite lacks."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloatType)

    def __hash__(self):
        return hash(BFloatType)


def constants(vector_type, value):
    return ir.Constant(vector_type, [ir.Constant(vector_type.element, value)] * vector_type.count)


def call(builder, name, result_type, *arguments):
    """Call one of LLVM's own functions."""
    function_type = ir.FunctionType(result_type, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def load(builder, address, element_type):
    return builder.load(builder.inttoptr(address, element_type.as_pointer()), typ=element_type, align=2)


def store(builder, vector, address):
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=2)


def stream(builder, vector, address):
    """Write a vector past the caches, to a multiple of its size; `finish_streams` before another thread reads it."""
    size = LANES * (2 if vector.type == halves else 4)
    written = builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=size)
    written.set_metadata("nontemporal", builder.module.add_metadata([word_type(1)]))


def ask_for(builder, address):
    """Bring the cache line at an address, which may be any, into the cache."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, word_type(0), word_type(3), word_type(1))


def splat(builder, value):
    """A vector of equal elements."""
    vector_type = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), value, word_type(0))
    return builder.shuffle_vector(first, first, constants(words, 0))


def multiply_add(builder, left, right, sums, is_bf16, has_instruction):
    """Add the products of words to sums in fp32."""
    if not is_bf16:
        return call(
            builder, f"llvm.fma.v{LANES}f32", floats, *(builder.bitcast(x, floats) for x in (left, right)), sums
        )
    if has_instruction:
        pairs = [builder.bitcast(x, ir.VectorType(BFloatType(), 2 * LANES)) for x in (left, right)]
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", floats, sums, *pairs)
    for half in (
        lambda x: builder.and_(x, constants(words, 0xFFFF0000)),
        lambda x: builder.shl(x, constants(words, 16)),
    ):
        pair = [builder.bitcast(half(x), floats) for x in (left, right)]
        sums = call(builder, f"llvm.fma.v{LANES}f32", floats, *pair, sums)
    return sums


def first_lanes(builder, count):
    """The mask of so many lanes."""
    lanes = ir.Constant(words, [word_type(j) for j in range(LANES)])
    return builder.icmp_signed("<", lanes, splat(builder, builder.trunc(count, word_type)))


def load_first(builder, address, mask, is_bf16):
    """The numbers at `address`, as many as the mask says."""
    element, kind = (halves, "i16") if is_bf16 else (floats, "f32")
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    found = call(
        builder, f"llvm.masked.load.v{LANES}{kind}.p0", element, pointer, word_type(2), mask, constants(element, 0)
    )
    if not is_bf16:
        return found
    return builder.bitcast(builder.shl(builder.zext(found, words), constants(words, 16)), floats)


def pairs_of(builder, lower, upper):
    """Words of the numbers of two rows in bf16, from what `load_first` gives of them."""
    return builder.or_(builder.lshr(builder.bitcast(lower, words), constants(words, 16)), builder.bitcast(upper, words))


def nearest_bf16(builder, numbers, has_instruction=False):
    """The bits of the nearest bf16 numbers, ties to even; the instruction makes numbers below 2^-126 zeros."""
    if has_instruction:
        found = call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BFloatType(), LANES), numbers)
        return builder.bitcast(found, halves)
    bits = builder.bitcast(numbers, words)
    odd = builder.and_(builder.lshr(bits, constants(words, 16)), constants(words, 1))
    nearest = builder.lshr(builder.add(builder.add(bits, constants(words, 0x7FFF)), odd), constants(words, 16))
    is_nan = builder.fcmp_unordered("uno", numbers, numbers)
    return builder.trunc(builder.select(is_nan, constants(words, 0x7FC0), nearest), halves)


def sums_of_vectors(builder, vectors):
    """The sums of up to 16 vectors, a power of two, in a vector: that of vector j in lane j * 16 / their number.

    However many there are, lane i is added to i + 8, then to i + 4, i + 2 and i + 1.
    """

    def half_of_each(first, second, groups, begin):
        """Of two vectors of so many groups of lanes each, a half of every group."""
        group = LANES // groups
        lanes = [
            source * LANES + g * group + begin * (group // 2) + j
            for source in (0, 1)
            for g in range(groups)
            for j in range(group // 2)
        ]
        return builder.shuffle_vector(first, second, ir.Constant(words, [word_type(lane) for lane in lanes]))

    groups = 1
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(*(half_of_each(*pair, groups, begin) for begin in (0, 1))) for pair in pairs]
        groups *= 2
    total, step = vectors[0], LANES // groups // 2
    while step:
        lanes = ir.Constant(words, [word_type((lane + step) % LANES) for lane in range(LANES)])
        total = builder.fadd(total, builder.shuffle_vector(total, total, lanes))
        step //= 2
    return total


def store_first(builder, numbers, address, mask, is_bf16, has_instruction=False):
    """Write as many numbers as the mask says; in bf16 the nearest: see `nearest_bf16`."""
    if is_bf16:
        numbers = nearest_bf16(builder, numbers, has_instruction)
    kind = "i16" if is_bf16 else "f32"
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    call(builder, f"llvm.masked.store.v{LANES}{kind}.p0", ir.VoidType(), numbers, pointer, word_type(2), mask)


def up_to(builder, count, limit):
    """The numbers from 0 on, `count` of them; in the place of `limit` and more, the last one below it."""
    integer, last = limit.type, builder.sub(limit, limit.type(1))
    return [builder.select(builder.icmp_signed("<", integer(i), last), integer(i), last) for i in range(count)]


def tile(vectors, adds, is_bf16, has_instruction, num_rows=ROWS, ahead=0, more="", is_wide=False):
    """Return a function that writes, or adds, up to num_rows rows and vectors * LANES columns of a product.

    Steps are in bytes, sizes in words (k) and numbers. A row past the last is the last once more, with the same result.

    more: "scale", the last argument, a number in fp32, multiplies all sums before they are rounded; "left", the last
    three are another left factor, its step from row to row, and its words, whose right factor follows the first one;
    "streams", the last argument says whether whole vectors in rows that begin with a cache line are written past the
    caches, which takes half the time where what is written is read late.

    is_wide: what is written is in fp32 whatever is multiplied.

    ahead: how many rows of `right` before its use a row is asked for; 0 where `right` is in panels of full vectors,
    which are in cache. Elsewhere `right` is in rows of numbers, of which two make a row of words in bf16, and nothing
    behind the columns is read.
    """

    def lower(context, builder, signature, arguments):
        left, left_row, left_k, right, right_k, size_k, out, out_row, rows_left, num_columns, *others = arguments
        integer = left.type
        rows = up_to(builder, num_rows, rows_left)
        sums = [[cgutils.alloca_once_value(builder, constants(floats, 0.0)) for _ in range(vectors)] for _ in rows]
        masks = [first_lanes(builder, builder.sub(num_columns, integer(v * LANES))) for v in range(vectors)]

        def right_at(address, row, mask):
            if not ahead:
                return load(builder, address, words)
            found = load_first(builder, address, mask, is_bf16)
            if not is_bf16:
                return builder.bitcast(found, words)
            return pairs_of(builder, found, load_first(builder, builder.add(address, row), mask, is_bf16))

        rows_of_word = 2 if ahead and is_bf16 else 1
        offsets = [integer(v * LANES * WORD // rows_of_word) for v in range(vectors)]

        def multiply(left, left_row, left_k, right, size_k):
            lefts = [builder.add(left, builder.mul(row, left_row)) for row in rows]
            with cgutils.for_range(builder, size_k) as loop:
                right_now = builder.add(right, builder.mul(loop.index, builder.mul(right_k, integer(rows_of_word))))
                rights = [
                    right_at(builder.add(right_now, offset), right_k, mask)
                    for offset, mask in zip(offsets, masks, strict=True)
                ]
                for row in range(rows_of_word if ahead else 0):
                    soon = builder.add(right_now, builder.mul(right_k, integer(ahead + row)))
                    for offset in offsets[::rows_of_word]:  # of every cache line
                        ask_for(builder, builder.add(soon, offset))
                step = builder.mul(loop.index, left_k)
                for of_row, start in zip(sums, lefts, strict=True):
                    number = splat(builder, load(builder, builder.add(start, step), word_type))
                    for total, vector in zip(of_row, rights, strict=True):
                        found = multiply_add(builder, number, vector, builder.load(total), is_bf16, has_instruction)
                        builder.store(found, total)

        multiply(left, left_row, left_k, right, size_k)
        if more == "left":
            other, other_row, other_k = others
            multiply(other, other_row, integer(WORD), builder.add(right, builder.mul(size_k, right_k)), other_k)
        rounds = is_bf16 and not is_wide
        size = LANES * (2 if rounds else 4)
        places = [
            [builder.add(builder.add(out, builder.mul(row, out_row)), integer(v * size)) for v in range(vectors)]
            for row in rows
        ]
        found = [[builder.load(total) for total in of_row] for of_row in sums]
        if more == "scale":
            found = [[builder.fmul(total, splat(builder, others[0])) for total in of_row] for of_row in found]
        if adds:  # all are read before any is written: rows past the last are added once
            found = [
                [
                    builder.fadd(load_first(builder, place, mask, rounds), total)
                    for place, mask, total in zip(at, masks, of_row, strict=True)
                ]
                for at, of_row in zip(places, found, strict=True)
            ]
        stores = [
            (total, place, mask)
            for at, of_row in zip(places, found, strict=True)
            for place, mask, total in zip(at, masks, of_row, strict=True)
        ]

        def write_first():
            for total, place, mask in stores:
                store_first(builder, total, place, mask, rounds, has_instruction)

        if more == "streams":
            is_whole = builder.icmp_signed(">=", num_columns, integer(vectors * LANES))
            begins = builder.and_(builder.or_(out, out_row), integer(LINE - 1))
            is_line = builder.icmp_signed("==", begins, integer(0))
            asked = builder.icmp_signed("!=", others[0], integer(0))
            with builder.if_else(builder.and_(asked, builder.and_(is_whole, is_line))) as (streams, does_not):
                with streams:
                    for total, place, _ in stores:
                        stream(builder, nearest_bf16(builder, total, has_instruction) if rounds else total, place)
                with does_not:
                    write_first()
        else:
            write_first()
        return context.get_dummy_value()

    @intrinsic
    def run(typing_context, left, left_row, left_k, right, right_k, size_k, out, out_row, num_rows, num_columns):
        return types.void(*PRODUCT), lower

    @intrinsic
    def scaled(
        typing_context, left, left_row, left_k, right, right_k, size_k, out, out_row, num_rows, num_columns, scale
    ):
        return types.void(*PRODUCT, types.float32), lower

    @intrinsic
    def joined(
        typing_context, left, left_row, left_k, right, right_k, size_k, out, out_row, num_rows, num_columns,
        other, other_row, other_k,
    ):  # fmt: skip
        return types.void(*PRODUCT, *[types.intp] * 3), lower

    @intrinsic
    def streamed(
        typing_context, left, left_row, left_k, right, right_k, size_k, out, out_row, num_rows, num_columns, streams
    ):
        return types.void(*PRODUCT, types.intp), lower

    return {"": run, "scale": scaled, "left": joined, "streams": streamed}[more]


def dots(rows, outs, is_bf16, has_instruction):
    """Return a function that writes up to `rows` x `outs` numbers left[p] . right[q], of size_k words each.

    Steps are in bytes. A row past the last is the last once more, with the same result. The order of a sum depends on
    size_k only.
    """

    def lower(context, builder, signature, arguments):
        left, left_row, right, right_row, size_k, out, out_row, num_rows, num_outs = arguments
        integer = left.type

        p_s, q_s = up_to(builder, rows, num_rows), up_to(builder, outs, num_outs)
        lefts = [builder.add(left, builder.mul(p, left_row)) for p in p_s]
        rights = [builder.add(right, builder.mul(q, right_row)) for q in q_s]
        sums = [[cgutils.alloca_once_value(builder, constants(floats, 0.0)) for _ in q_s] for _ in p_s]

        def add(load_at):
            found = [load_at(start) for start in rights]
            for of_row, start in zip(sums, lefts, strict=True):
                number = load_at(start)
                for total, vector in zip(of_row, found, strict=True):
                    added = multiply_add(builder, number, vector, builder.load(total), is_bf16, has_instruction)
                    builder.store(added, total)

        with cgutils.for_range(builder, builder.udiv(size_k, integer(LANES))) as loop:
            step = builder.mul(loop.index, integer(LANES * WORD))
            for start in rights:  # of the next tile
                ask_for(builder, builder.add(builder.add(start, builder.mul(right_row, integer(outs))), step))
            add(lambda start: load(builder, builder.add(start, step), words))
        rest = builder.urem(size_k, integer(LANES))
        with builder.if_then(builder.icmp_signed("!=", rest, integer(0))):
            step, mask = builder.mul(builder.sub(size_k, rest), integer(WORD)), first_lanes(builder, rest)
            add(
                lambda start: builder.bitcast(load_first(builder, builder.add(start, step), mask, is_bf16=False), words)
            )
        size = integer(2 if is_bf16 else 4)
        places = [
            builder.add(builder.add(out, builder.mul(p, out_row)), builder.mul(q, size)) for p in p_s for q in q_s
        ]
        vectors = [builder.load(total) for of_row in sums for total in of_row]
        while vectors:
            count = 1 << min(len(vectors).bit_length() - 1, 4)
            found = sums_of_vectors(builder, vectors[:count])
            if is_bf16:
                found = nearest_bf16(builder, found, has_instruction)
            for j, place in enumerate(places[:count]):
                number = builder.extract_element(found, word_type(j * LANES // count))
                builder.store(number, builder.inttoptr(place, number.type.as_pointer()), align=2)
            vectors, places = vectors[count:], places[count:]
        return context.get_dummy_value()

    @intrinsic
    def run(typing_context, left, left_row, right, right_row, size_k, out, out_row, num_rows, num_outs):
        return types.void(*[types.intp] * 9), lower

    return run
