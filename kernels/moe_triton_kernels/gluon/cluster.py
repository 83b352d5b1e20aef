"""Clusters of two CTAs (programs that run on neighbouring multiprocessors) that share B: one TMA multicast for both.

A cluster's tile is two tiles of one expert, one below the other. Gluon has one program for both CTAs: a layout says how
a tensor or a buffer lies over them. The rows of A and of the result are spread, half of them in each CTA; B is whole in
both. The first CTA issues the multicast load, which reads a block of B once from L2, writes it to
the shared memory of both CTAs, and reports the bytes to `full` of each. Everything else a CTA does for itself.

So a stage has one barrier more, in the first CTA only, at which the consumers of both arrive:

    released[stage]   every consumer in the cluster has finished the product that read the stage

The first CTA waits for it before the multicast; in the second one the wait is nothing. The second one still waits for
its own `empty` before it expects the next bytes. B may land there before it does: a phase is not complete before the
arrival that `expect` is.

Nothing arrives at the second CTA for which its consumers do not wait. At the first one arrive the other's releases, up
to the last: its producer waits for them before it ends (`drain`), since shared memory is gone where a CTA has exited.
Between the barriers' initialisation and the first arrival from elsewhere the CTAs have to meet. Triton 3.8 does that
where a barrier is of several CTAs, and `tools.order` looks for it in the binary.

No tile spans two experts. Where an expert's last tile has at most half of its rows, the cooperative schedule gives all
of them to the first consumer, half of them in each CTA, and the second one multiplies nothing: only the loads are in
vain. With ping-pong the second CTA multiplies rows that are not stored (`tools.multicast` counts such tiles).
"""

from moe_triton_kernels.gluon.names import gl, gluon, mbarrier, tma_load


@gluon.constexpr_function
def rows_apart(CTAS):
    """The layout over the CTAs of a block [rows, columns]: half of the rows in each."""
    return [[1, 0]] if CTAS == 2 else []


@gluon.constexpr_function
def rows_in_memory(CTAS):
    """The layout of a block of A in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2, cga_layout=rows_apart(CTAS))


@gluon.constexpr_function
def matrix_in_memory(CTAS):
    """The layout of a block of B in shared memory: [1, columns, k] or [1, k, columns], whole in each CTA."""
    over_ctas = [[0, 0, 0]] if CTAS == 2 else []
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3, cga_layout=over_ctas)


@gluon.constexpr_function
def one_in_each(CTAS):
    """The layout over the CTAs of barriers [number, CTAS]: each CTA has its own."""
    return [[1]] if CTAS == 2 else []


@gluon.jit
def make_common_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """NUMBER mbarriers in the first CTA whose phase completes with COUNT arrivals of each of two CTAs."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout([[0]]))
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def load_columns(weight, at, full, target, CTAS: gl.constexpr):
    """A block of B to every CTA."""
    if CTAS > 1:
        tma_load(weight, at, full, target, multicast=True)
    else:
        tma_load(weight, at, full, target)


@gluon.jit
def acquire(ring, stage, phase, CTAS: gl.constexpr):
    """Wait until a stage may be filled: the previous use of it, by whoever reads it, is over."""
    mbarrier.wait(ring.empty.index(stage), phase ^ 1)
    if CTAS > 1:
        mbarrier.wait(ring.released.index(stage), phase ^ 1)


@gluon.jit
def release(ring, stage, pred, CTAS: gl.constexpr):
    """A consumer's last product from a stage is finished."""
    mbarrier.arrive(ring.empty.index(stage), count=1, pred=pred)
    if CTAS > 1:
        mbarrier.arrive(ring.released.index(stage), count=1, pred=pred)


@gluon.jit
def drain(ring, stage, phase, STAGES: gl.constexpr, CTAS: gl.constexpr):
    """Wait, after the last step, until no CTA arrives at the barriers of another any more."""
    if CTAS > 1:
        for i in gl.static_range(STAGES):
            wraps = stage + i >= STAGES
            mbarrier.wait(ring.released.index(gl.where(wraps, stage + i - STAGES, stage + i)), phase ^ 1 ^ wraps)
