"""What the warp-specialized kernels share: the ring of shared memory stages, the loads into it, the products from it.

A program is three partitions. The producer (few registers) fills the stages of a ring; two consumer warpgroups (four
warps each, most of the registers) multiply what is in them and write the results:

    cooperative  both consumers work on the same tile, half of its rows each, and both release every stage
    ping-pong    a consumer takes every other tile to itself: one multiplies while the other writes its tile

A stage holds the rows of A that each consumer of a tile has, one block behind the other, and BLOCK_N columns of B, for
BLOCK_K steps of the contraction. Two mbarriers guard it, and a third one where the programs of a cluster share B (see
`cluster`):

    full[stage]   the copies have landed: one arrival with the byte count of the TMA loads and, where A is gathered, one
                  of every producer thread once its cp.async copies are done
    empty[stage]  every consumer of the stage has finished the product that read it

Step s of a program, its tiles one after another, uses stage s % STAGES for the (s // STAGES)-th time. A consumer waits
for `full` in phase (s // STAGES) % 2; the producer waits for `empty` in the other one, so the first pass over a fresh
ring does not block. `turn` (ping-pong only) lets one consumer at a time issue its products: it waits for its own
barrier before a tile, and arrives at the other's once the tile's products are issued. That is not only for speed: a
wait knows a phase by its parity alone, and a consumer that skips a tile must not be two phases ahead of a barrier.

cp.async writes through the generic proxy and the matrix unit reads through the asynchronous one: where A is gathered,
the consumer puts a proxy fence between the wait and the product. `tests/kernels/test_gluon_pipeline.py` runs this
source in an emulator of the barriers, in random orders of events.
"""

# annotations have to be values here: Triton reads those of an aggregate
from moe_triton_kernels.gluon.cluster import (
    acquire,
    drain,
    load_columns,
    make_common_barriers,
    matrix_in_memory,
    one_in_each,
    release,
    rows_apart,
    rows_in_memory,
)
from moe_triton_kernels.gluon.names import (
    aggregate,
    cp_async,
    cp_async_arrive,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from moe_triton_kernels.grouped_gemm import tile_order
from moe_triton_kernels.tiles import load_tile


@aggregate
class Work:
    """What every partition of a program knows: the tiles, the sizes, and the form of the kernel, a RingTile among it.

    size_columns is the width of the result: gated, there are as many gate columns as up columns in B. BLOCK_M counts
    the rows of a tile, of all CTAS of a cluster together; each of its CONSUMERS has ROWS of them. BLOCK_N counts the
    columns of B in a tile, gate and up together; PARTS is the number of column blocks of the epilogue. Where gate and
    up lie in pairs, B has twice the columns and GATED is False: only the epilogue knows of pairs.
    """

    table: gl.tensor
    num_tiles: gl.tensor
    offsets: gl.tensor
    size_k: gl.tensor
    size_columns: gl.tensor
    GATHERED: gl.constexpr
    GATED: gl.constexpr
    K_CONTIGUOUS: gl.constexpr
    PING_PONG: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    BLOCK_K: gl.constexpr
    STAGES: gl.constexpr
    GROUP: gl.constexpr
    PARTS: gl.constexpr
    EVEN_K: gl.constexpr
    CTAS: gl.constexpr
    CONSUMERS: gl.constexpr
    ROWS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tiles, size_k, size_columns, GATHERED, GATED, K_CONTIGUOUS, TILE):
        self.table, self.num_tiles, self.offsets = tiles  # by position: Triton 3.6 knows no names of fields here
        self.size_k = size_k
        self.size_columns = size_columns
        self.GATHERED = gl.constexpr(GATHERED)
        self.GATED = gl.constexpr(GATED)
        self.K_CONTIGUOUS = gl.constexpr(K_CONTIGUOUS)
        form = [gl.constexpr(value) for value in TILE]
        self.PING_PONG, self.BLOCK_M, self.BLOCK_N, self.BLOCK_K, self.STAGES, self.GROUP = form[:6]
        self.PARTS, self.EVEN_K, self.CTAS = form[6:]
        consumers = 1 if TILE[0] else 2
        self.CONSUMERS, self.ROWS = gl.constexpr(consumers), gl.constexpr(TILE[1] // consumers)


@aggregate
class Ring:
    """A [CONSUMERS * STAGES, ROWS, BLOCK_K], B [STAGES, 1, BLOCK_N, BLOCK_K] or its transpose, and their barriers.

    released: of a cluster (see `cluster`); without one it is `empty` again, and not used.
    """

    a: gl.shared_memory_descriptor
    b: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor
    released: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, a, b, full, empty, turn, released):
        self.a = a
        self.b = b
        self.full = full
        self.empty = empty
        self.turn = turn
        self.released = released


@gluon.jit
def make_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr, CTAS: gl.constexpr):
    """NUMBER mbarriers in each CTA whose phase completes with COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, CTAS], mbarrier.MBarrierLayout(one_in_each(CTAS)))
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def make_ring(work, DTYPE: gl.constexpr, PRODUCER_THREADS: gl.constexpr):
    ROWS: gl.constexpr = rows_in_memory(work.CTAS)
    MATRIX: gl.constexpr = matrix_in_memory(work.CTAS)
    a = gl.allocate_shared_memory(DTYPE, [work.CONSUMERS * work.STAGES, work.ROWS, work.BLOCK_K], ROWS)
    if work.K_CONTIGUOUS:
        b = gl.allocate_shared_memory(DTYPE, [work.STAGES, 1, work.BLOCK_N, work.BLOCK_K], MATRIX)
    else:
        b = gl.allocate_shared_memory(DTYPE, [work.STAGES, 1, work.BLOCK_K, work.BLOCK_N], MATRIX)
    full = make_barriers(work.STAGES, 1 + PRODUCER_THREADS if work.GATHERED else 1, work.CTAS)
    empty = make_barriers(work.STAGES, work.CONSUMERS, work.CTAS)
    turn = make_barriers(2, 1, work.CTAS)
    released = make_common_barriers(work.STAGES, work.CONSUMERS) if work.CTAS > 1 else empty
    fence_async_shared()  # TMA arrives at the barriers through the asynchronous proxy
    return Ring(a, b, full, empty, turn, released)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The stage and the phase of the next step."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def count_tiles(work):
    """The tile rows and the tile columns of the launch."""
    return gl.load(work.num_tiles), gl.cdiv(work.size_columns, work.BLOCK_N // 2 if work.GATED else work.BLOCK_N)


@gluon.jit
def locate(work, tile, num_m, num_n):
    """Tile number -> (expert, first row, end row, tile column): the same walk as in the plain kernels."""
    tile_m, tile_n = tile_order(tile, num_m, num_n, work.GROUP)
    expert, first_row, end_row = load_tile(work.table, work.offsets, tile_m, work.BLOCK_M)
    return expert, first_row, end_row, tile_n


@gluon.constexpr_function
def gather_layout(CTAS):
    """Pointers to 64 columns, in 4 warps: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0], rows_apart(CTAS))


@gluon.jit
def token_pointers(work, a, source, first_row, end_row, k, TOP_K: gl.constexpr, LAYOUT: gl.constexpr):
    """Pointers to the token rows of one consumer, at these columns: [ROWS, k]."""
    rows = first_row + gl.arange(0, work.ROWS, layout=gl.SliceLayout(1, LAYOUT))
    slots = gl.load(source + gl.minimum(rows, end_row - 1))
    tokens = a + (slots // TOP_K).to(gl.int64) * work.size_k
    return tokens[:, None] + k[None, :]


@gluon.jit
def produce(work, ring, a, source, weight, places, TOP_K: gl.constexpr):
    """The producer partition: every step of every tile, as soon as its stage is empty.

    a is a descriptor of A, or, gathered, a pointer to the token rows, of which row r takes source[r] // TOP_K. weight
    is a descriptor of the experts' matrices, each of which TMA fills up with zeros; places (None: a stack) makes an
    expert's coordinate of its address. What a tile has past its expert's rows are its neighbours': they give results
    that nobody stores. Past the end of k both sides are zeros.
    """
    FACTOR: gl.constexpr = 2 if work.GATED else 1
    WIDTH: gl.constexpr = work.BLOCK_N // FACTOR
    LOADED_ROWS: gl.constexpr = 0 if work.GATHERED else work.BLOCK_M // work.CTAS
    TMA_BYTES: gl.constexpr = 2 * work.BLOCK_K * (work.BLOCK_N + LOADED_ROWS)
    GATHER: gl.constexpr = gather_layout(work.CTAS)
    num_m, num_n = count_tiles(work)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        expert, first_row, end_row, tile_n = locate(work, tile, num_m, num_n)
        if places is not None:
            expert = ((gl.load(places.table + expert) - places.first) // places.STEP).to(gl.int32)
        if work.GATHERED:
            k = gl.arange(0, work.BLOCK_K, layout=gl.SliceLayout(0, GATHER))
            first = token_pointers(work, a, source, first_row, end_row, k, TOP_K, GATHER)
            last = first
            if work.CONSUMERS == 2:
                last = token_pointers(work, a, source, first_row + work.ROWS, end_row, k, TOP_K, GATHER)
            pointers = first, last
        for k0 in range(0, work.size_k, work.BLOCK_K):
            acquire(ring, stage, phase, work.CTAS)
            full = ring.full.index(stage)
            mbarrier.expect(full, TMA_BYTES)
            for half in gl.static_range(FACTOR):
                n0 = half * work.size_columns + tile_n * WIDTH
                b = ring.b.index(stage)
                if work.K_CONTIGUOUS:
                    load_columns(weight, [expert, n0, k0], full, b.slice(half * WIDTH, WIDTH, dim=1), work.CTAS)
                else:
                    load_columns(weight, [expert, k0, n0], full, b.slice(half * WIDTH, WIDTH, dim=2), work.CTAS)
            for i in gl.static_range(work.CONSUMERS):
                rows_of_a = ring.a.index(work.CONSUMERS * stage + i)
                if work.GATHERED:
                    if work.EVEN_K:
                        cp_async(rows_of_a, pointers[i] + k0)
                    else:
                        cp_async(rows_of_a, pointers[i] + k0, (k < work.size_k - k0)[None, :])
                else:
                    tma_load(a, [first_row + i * work.ROWS, k0], full, rows_of_a)
            if work.GATHERED:
                cp_async_arrive(full, increment_count=False)
            stage, phase = advance(stage, phase, work.STAGES)
    drain(ring, stage, phase, work.STAGES, work.CTAS)


@gluon.jit
def consumer_tiles(work, CONSUMER: gl.constexpr):
    """(first tile, tiles from one to the next, number of the first among the program's tiles) of a consumer."""
    if work.PING_PONG:
        first = gl.program_id(0) + CONSUMER * gl.num_programs(0)
        return first, 2 * gl.num_programs(0), gl.to_tensor(CONSUMER)
    else:
        return gl.program_id(0), gl.num_programs(0), gl.to_tensor(0)


@gluon.jit
def skip(work, ring, stage, phase, num_steps):
    """Release as many stages as they come, without a product."""
    for _ in range(num_steps):
        mbarrier.wait(ring.full.index(stage), phase)
        release(ring, stage, True, work.CTAS)
        stage, phase = advance(stage, phase, work.STAGES)


@gluon.constexpr_function
def accumulator_layout(columns, CTAS):
    """Registers of a consumer's product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16], rows_apart(CTAS))


@gluon.jit
def multiply(work, ring, CONSUMER: gl.constexpr, number, num_rows):
    """The product of the program's tile `number`: fp32 [ROWS, BLOCK_N], what this consumer has of it.

    Same order of the contraction as in the plain kernels. num_rows: of the expert, from the tile's first row on. Where
    all of them are the other consumer's, this one only releases the stages, and the product is zero.
    """
    acc = gl.zeros([work.ROWS, work.BLOCK_N], gl.float32, accumulator_layout(work.BLOCK_N, work.CTAS))
    num_steps = gl.cdiv(work.size_k, work.BLOCK_K)
    MAY_BE_IDLE: gl.constexpr = CONSUMER % work.CONSUMERS > 0  # the first one has rows in every tile
    num_products = gl.where(num_rows > CONSUMER * work.ROWS, num_steps, 0) if MAY_BE_IDLE else num_steps
    stage = number * num_steps % work.STAGES
    phase = number * num_steps // work.STAGES % 2
    previous = stage
    if work.PING_PONG:  # the first turn is consumer 0's: on a fresh barrier it waits for the phase before the first
        mbarrier.wait(ring.turn.index(CONSUMER), (number // 2 + CONSUMER + 1) % 2)
    for step in range(num_products):
        mbarrier.wait(ring.full.index(stage), phase)
        if work.GATHERED:
            fence_async_shared()
        a = ring.a.index(work.CONSUMERS * stage + CONSUMER % work.CONSUMERS)
        b = ring.b.index(stage)
        if work.K_CONTIGUOUS:
            b = b.reshape((work.BLOCK_N, work.BLOCK_K)).permute((1, 0))
        else:
            b = b.reshape((work.BLOCK_K, work.BLOCK_N))
        acc = warpgroup_mma(a, b, acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # the product before this one has read its stage
        release(ring, previous, step > 0, work.CTAS)
        previous = stage
        stage, phase = advance(stage, phase, work.STAGES)
    if work.PING_PONG:
        mbarrier.arrive(ring.turn.index(1 - CONSUMER), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if MAY_BE_IDLE:
        release(ring, previous, num_products > 0, work.CTAS)
        skip(work, ring, stage, phase, num_steps - num_products)
    else:
        release(ring, previous, True, work.CTAS)
    return acc


@gluon.constexpr_function
def store_layout(columns, CTAS, vectors=1):
    """Registers of a block of 4 warps that is to be stored: 16 bytes a thread, side by side along the row.

    vectors: so many times 16 bytes a thread, and as many times the columns.
    """
    threads = columns // 8
    return gl.BlockedLayout([1, 8 * vectors], [32 // threads, threads], [4, 1], [1, 0], rows_apart(CTAS))


@gluon.jit
def store_block(out_rows, row_mask, first, size, value, LAYOUT: gl.constexpr):
    """Store value [rows, columns] to the columns from `first` on, as far as they are less than `size`."""
    value = gl.convert_layout(value, LAYOUT)
    columns = first + gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    gl.store(out_rows[:, None] + columns[None, :], value, mask=row_mask[:, None] & (columns < size)[None, :])
