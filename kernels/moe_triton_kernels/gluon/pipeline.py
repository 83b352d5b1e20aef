"""What the warp-specialized kernels share: the ring of shared memory stages, the loads into it, the products from it.

A program is three partitions. The producer (few registers) fills the stages of a ring; two consumer warpgroups (four
warps each, most of the registers) multiply what is in them and write the results:

    cooperative  both consumers work on the same tile, half of its rows each, and both release every stage
    ping-pong    a consumer takes every other tile to itself: one multiplies while the other writes its tile

A stage holds BLOCK_M rows of A and BLOCK_N columns of B for BLOCK_K steps of the contraction. Two mbarriers guard it:

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

    size_columns is the width of the result: gated, there are as many gate columns as up columns in B. BLOCK_N counts
    the columns of B in a tile, gate and up together; PARTS is the number of column blocks of the epilogue. Where gate
    and up lie in pairs, B has twice the columns and GATED is False: only the epilogue knows of pairs.
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

    @gluon.constexpr_function
    def __init__(self, tiles, size_k, size_columns, GATHERED, GATED, K_CONTIGUOUS, TILE):
        self.table, self.num_tiles, self.offsets = tiles  # by position: Triton 3.6 knows no names of fields here
        self.size_k = size_k
        self.size_columns = size_columns
        self.GATHERED = gl.constexpr(GATHERED)
        self.GATED = gl.constexpr(GATED)
        self.K_CONTIGUOUS = gl.constexpr(K_CONTIGUOUS)
        form = [gl.constexpr(value) for value in TILE]
        self.PING_PONG, self.BLOCK_M, self.BLOCK_N, self.BLOCK_K, self.STAGES, self.GROUP, self.PARTS, self.EVEN_K = (
            form
        )


@aggregate
class Ring:
    """A [STAGES, BLOCK_M, BLOCK_K], B [STAGES, 1, BLOCK_N, BLOCK_K] or its transpose, and the barriers of both."""

    a: gl.shared_memory_descriptor
    b: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, a, b, full, empty, turn):
        self.a = a
        self.b = b
        self.full = full
        self.empty = empty
        self.turn = turn


@gluon.jit
def make_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """NUMBER mbarriers whose phase completes with COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def make_ring(work, DTYPE: gl.constexpr, PRODUCER_THREADS: gl.constexpr):
    ROWS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    MATRIX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    a = gl.allocate_shared_memory(DTYPE, [work.STAGES, work.BLOCK_M, work.BLOCK_K], ROWS)
    if work.K_CONTIGUOUS:
        b = gl.allocate_shared_memory(DTYPE, [work.STAGES, 1, work.BLOCK_N, work.BLOCK_K], MATRIX)
    else:
        b = gl.allocate_shared_memory(DTYPE, [work.STAGES, 1, work.BLOCK_K, work.BLOCK_N], MATRIX)
    full = make_barriers(work.STAGES, 1 + PRODUCER_THREADS if work.GATHERED else 1)
    empty = make_barriers(work.STAGES, 1 if work.PING_PONG else 2)
    turn = make_barriers(2, 1)
    fence_async_shared()  # TMA arrives at the barriers through the asynchronous proxy
    return Ring(a, b, full, empty, turn)


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
    TMA_BYTES: gl.constexpr = 2 * work.BLOCK_K * (work.BLOCK_N if work.GATHERED else work.BLOCK_N + work.BLOCK_M)
    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])  # 16 bytes a thread
    num_m, num_n = count_tiles(work)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        expert, first_row, end_row, tile_n = locate(work, tile, num_m, num_n)
        if places is not None:
            expert = ((gl.load(places.table + expert) - places.first) // places.STEP).to(gl.int32)
        if work.GATHERED:
            rows = first_row + gl.arange(0, work.BLOCK_M, layout=gl.SliceLayout(1, GATHER))
            slots = gl.load(source + gl.minimum(rows, end_row - 1))
            tokens = a + (slots // TOP_K).to(gl.int64) * work.size_k
            k = gl.arange(0, work.BLOCK_K, layout=gl.SliceLayout(0, GATHER))
            pointers = tokens[:, None] + k[None, :]
        for k0 in range(0, work.size_k, work.BLOCK_K):
            mbarrier.wait(ring.empty.index(stage), phase ^ 1)
            full = ring.full.index(stage)
            mbarrier.expect(full, TMA_BYTES)
            for half in gl.static_range(FACTOR):
                n0 = half * work.size_columns + tile_n * WIDTH
                b = ring.b.index(stage)
                if work.K_CONTIGUOUS:
                    tma_load(weight, [expert, n0, k0], full, b.slice(half * WIDTH, WIDTH, dim=1))
                else:
                    tma_load(weight, [expert, k0, n0], full, b.slice(half * WIDTH, WIDTH, dim=2))
            if work.GATHERED:
                if work.EVEN_K:
                    cp_async(ring.a.index(stage), pointers + k0)
                else:
                    cp_async(ring.a.index(stage), pointers + k0, (k < work.size_k - k0)[None, :])
                cp_async_arrive(full, increment_count=False)
            else:
                tma_load(a, [first_row, k0], full, ring.a.index(stage))
            stage, phase = advance(stage, phase, work.STAGES)


@gluon.jit
def consumer_tiles(work, CONSUMER: gl.constexpr):
    """(first tile, tiles from one to the next, number of the first among the program's tiles) of a consumer."""
    if work.PING_PONG:
        first = gl.program_id(0) + CONSUMER * gl.num_programs(0)
        return first, 2 * gl.num_programs(0), gl.to_tensor(CONSUMER)
    else:
        return gl.program_id(0), gl.num_programs(0), gl.to_tensor(0)


@gluon.jit
def multiply(work, ring, CONSUMER: gl.constexpr, number):
    """The product of the program's tile `number`: fp32 [BLOCK_M, BLOCK_N], of which a cooperative consumer has half.

    Same order of the contraction as in the plain kernels.
    """
    ROWS: gl.constexpr = work.BLOCK_M if work.PING_PONG else work.BLOCK_M // 2
    FIRST_ROW: gl.constexpr = 0 if work.PING_PONG else CONSUMER * ROWS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.BLOCK_N, 16])
    acc = gl.zeros([ROWS, work.BLOCK_N], gl.float32, LAYOUT)
    num_steps = gl.cdiv(work.size_k, work.BLOCK_K)
    stage = number * num_steps % work.STAGES
    phase = number * num_steps // work.STAGES % 2
    previous = stage
    if work.PING_PONG:  # the first turn is consumer 0's: on a fresh barrier it waits for the phase before the first
        mbarrier.wait(ring.turn.index(CONSUMER), (number // 2 + CONSUMER + 1) % 2)
    for step in range(num_steps):
        mbarrier.wait(ring.full.index(stage), phase)
        if work.GATHERED:
            fence_async_shared()
        a = ring.a.index(stage).slice(FIRST_ROW, ROWS, dim=0)
        b = ring.b.index(stage)
        if work.K_CONTIGUOUS:
            b = b.reshape((work.BLOCK_N, work.BLOCK_K)).permute((1, 0))
        else:
            b = b.reshape((work.BLOCK_K, work.BLOCK_N))
        acc = warpgroup_mma(a, b, acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # the product before this one has read its stage
        mbarrier.arrive(ring.empty.index(previous), count=1, pred=step > 0)
        previous = stage
        stage, phase = advance(stage, phase, work.STAGES)
    if work.PING_PONG:
        mbarrier.arrive(ring.turn.index(1 - CONSUMER), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.empty.index(previous), count=1)
    return acc


@gluon.constexpr_function
def store_layout(columns, vectors=1):
    """Registers of a block of 4 warps that is to be stored: 16 bytes a thread, side by side along the row.

    vectors: so many times 16 bytes a thread, and as many times the columns.
    """
    threads = columns // 8
    return gl.BlockedLayout([1, 8 * vectors], [32 // threads, threads], [4, 1], [1, 0])


@gluon.jit
def store_block(out_rows, row_mask, first, size, value, LAYOUT: gl.constexpr):
    """Store value [rows, columns] to the columns from `first` on, as far as they are less than `size`."""
    value = gl.convert_layout(value, LAYOUT)
    columns = first + gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    gl.store(out_rows[:, None] + columns[None, :], value, mask=row_mask[:, None] & (columns < size)[None, :])
