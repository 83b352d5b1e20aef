"""The gates on the order of events: paths around a fence or a barrier are found, whatever way they take."""

from __future__ import annotations

from moe_triton_kernels.tools.order import order_faults, split

HEAD = ".entry kernel()\n.reqntid 256\n{\n"
COPY, LANDED = "cp.async.cg.shared.global [%r1], [%rd1], 16;", "cp.async.wait_group 2;"
FENCE, PRODUCT = "fence.proxy.async.shared::cta;", "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {...};"
DONE, BARRIER, STORE = "wgmma.wait_group.sync.aligned 0;", "bar.sync \t0;", "st.shared.v4.b32 [%r2], {%r3, %r4};"


def kernel(*lines: str, head: str = HEAD) -> str:
    return head + "\n".join(lines) + "\nret;\n}\n"


def faults(*lines: str, head: str = HEAD) -> list[str]:
    return [fault.split(" (")[0] for fault in order_faults(kernel(*lines, head=head))]


UNFENCED, UNGUARDED = ["no proxy fence before the product"], ["no barrier between products and the next write"]


def test_straight_lines() -> None:
    assert faults(COPY, LANDED, FENCE, PRODUCT, DONE, BARRIER, COPY) == []
    assert faults(COPY, LANDED, BARRIER, PRODUCT) == UNFENCED
    assert faults(FENCE, LANDED, PRODUCT) == UNFENCED  # before the wait it orders nothing
    assert faults(PRODUCT, DONE, COPY) == UNGUARDED
    assert faults(PRODUCT, DONE, STORE) == UNGUARDED
    assert faults(PRODUCT, DONE, "cp.async.bulk.tensor.2d.shared::cluster.global.tile [%r1], [%rd1];") == UNGUARDED
    assert faults(PRODUCT, DONE, "// bar.sync 0;", STORE) == UNGUARDED
    assert faults(PRODUCT, DONE, STORE, head=HEAD.replace("256", "128")) == []  # one warpgroup waits for itself
    assert order_faults(kernel(LANDED, PRODUCT)) == ["no proxy fence before the product (PTX line 5)"]


def test_a_loop_whose_last_step_meets_its_first() -> None:
    loop = ("$L__BB0_1:", LANDED, FENCE, PRODUCT, DONE)
    assert faults(*loop, BARRIER, COPY, "@%p1 bra \t$L__BB0_1;") == []
    assert faults("$L__BB0_1:", COPY, LANDED, FENCE, PRODUCT, DONE, "@%p1 bra \t$L__BB0_1;") == UNGUARDED
    assert faults("$L__BB0_1:", PRODUCT, LANDED, "@!%p1 bra $L__BB0_1;", FENCE, PRODUCT) == UNFENCED


def test_a_branch_around_the_fence() -> None:
    around = (LANDED, "@%p1 bra $L__BB0_2;", FENCE, "$L__BB0_2:", PRODUCT)
    assert faults(*around) == UNFENCED
    assert faults(LANDED, "bra.uni $L__BB0_2;", FENCE, "$L__BB0_2:", PRODUCT) == UNFENCED
    assert faults(LANDED, "bra.uni $L__BB0_2;", PRODUCT, "$L__BB0_2:", FENCE, PRODUCT) == []  # nobody comes there
    assert faults("@%p1 bra $L__BB0_2;", LANDED, "ret;", "$L__BB0_2:", PRODUCT) == []


def test_a_cluster_meets_before_its_programs_use_each_others_barriers() -> None:
    made, announced = "@%p1 mbarrier.init.shared::cta.b64 [%r1], 2;", "@%p1 fence.mbarrier_init.release.cluster ;"
    meet = ("barrier.cluster.arrive.relaxed.aligned;", "barrier.cluster.wait.aligned;")
    far = "@%p2 mbarrier.arrive.shared::cluster.b64 _, [%r2];"
    copy = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r3], %rs1;"
    own = "mbarrier.arrive.shared::cta.b64 _, [%r1];"
    clusters = HEAD.replace("{", ".reqnctapercluster 2\n{")
    unmet = ["the cluster does not meet before a program uses another's mbarrier"]
    assert faults(made, announced, *meet, far, copy, head=clusters) == []
    assert faults(made, announced, *meet, far, copy) == ["a multicast without a cluster"]
    assert faults(made, announced, *meet, own, copy, head=clusters) == ["a multicast without arrivals elsewhere"]
    assert faults(made, own, announced, *meet) == []
    assert faults(made, announced, far) == unmet
    assert faults(made, announced, meet[0], copy, *meet, far, head=clusters) == unmet
    assert faults(made, announced, "@%p3 bra $L__BB0_2;", *meet, "$L__BB0_2:", far) == unmet
    assert faults(made, *meet, far) == ["mbarriers are not announced before the cluster meets"]
    assert faults(PRODUCT, DONE, copy, far, head=clusters) == UNGUARDED  # it is a write, too


def test_a_switch_and_a_wait_for_an_mbarrier() -> None:
    table = "$L_brx_0: .branchtargets $L__BB0_2, $L__BB0_3;"
    switch = (LANDED, table, "brx.idx %r1, $L_brx_0;", "$L__BB0_2:", FENCE, "$L__BB0_3:", PRODUCT)
    assert faults(*switch) == UNFENCED
    spin = "waitLoop: mbarrier.try_wait.parity.shared.b64 complete, [%r1], %r2; @!complete bra.uni waitLoop;"
    assert faults(LANDED, FENCE, spin, PRODUCT) == []
    arrives = "cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];"
    assert faults(arrives, spin, PRODUCT) == UNFENCED  # the copies are waited for there
    assert faults(arrives, spin, FENCE, PRODUCT) == []
    assert len(split(kernel(spin))[0]) == 2  # the kernel, and what follows its ret


def test_warp_specialized_kernels_have_barriers_of_their_own() -> None:
    assert faults("setmaxnreg.inc.sync.aligned.u32 232;", PRODUCT, DONE, STORE) == []
    assert faults("setmaxnreg.inc.sync.aligned.u32 232;", LANDED, PRODUCT) == UNFENCED
