"""Clusters of two CTAs in the emulator: right in every order of events, and what is found where a barrier is missing.

Also where Triton has no clusters, and what they save and waste on paper.
"""

from __future__ import annotations

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_triton.kernel_stages import kernel_in_words
from moe_triton_kernels.gluon import schedules
from moe_triton_kernels.gluon.schedules import SCHEDULES, available, why_unsupported
from moe_triton_kernels.launch import Config, Target
from moe_triton_kernels.operands import per_expert
from moe_triton_kernels.tools import gluon_cases, multicast
from moe_triton_kernels.tools.search import left_out, warp_specialized
from tests.helpers.gluon_emulator import Emulator
from tests.helpers.gluon_products import BLOCK_K, Case, outcomes

WEIGHTS = [0.02, 0.3, 1, 20]
clusters = st.builds(
    Case,
    ping_pong=st.booleans(),
    stages=st.integers(2, 5),
    steps=st.integers(1, 7),
    k_contiguous=st.booleans(),
    tail=st.integers(0, BLOCK_K - 1),
    ctas=st.just(2),
    is_table=st.booleans(),
    seed=st.integers(0, 99),
)


@settings(deadline=None, max_examples=8)
@given(
    cluster=clusters,
    op=st.sampled_from(["rows", "up", "d_hidden"]),
    seed=st.integers(0, 10**6),
    pace=st.tuples(*(st.sampled_from(WEIGHTS) for _ in range(7))),
    number=st.integers(1, 5),
)
def test_clusters_in_any_order(cluster: Case, op: str, seed: int, pace: tuple[float, ...], number: int) -> None:
    getattr(cluster, op)(Emulator(seed, pace), programs=number)


# one CTA far ahead of the other, either way round, and copies that take long
APART = ((1, 1, 1, 1, 0.02, 0.02, 0.02), (1, 0.02, 0.02, 0.02, 1, 1, 1), (0.02, 1, 1, 1, 1, 1, 1))
WAIT = "        mbarrier.wait(ring.released.index(stage), phase ^ 1)\n"
ARRIVE = "        mbarrier.arrive(ring.released.index(stage), count=1, pred=pred)\n"
OWN_WAIT = "    mbarrier.wait(ring.empty.index(stage), phase ^ 1)\n"
BYTES = "(work.BLOCK_N + LOADED_ROWS)"
DRAIN = "    drain(ring, stage, phase, work.STAGES, work.CTAS)\n"
ANY = {"right", "wrong", "race", "deadlock"}
FORMS = pytest.mark.parametrize(("gathered", "ping_pong"), [(False, False), (True, True)])


@FORMS
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, {"right"}, id="as it is"),
        pytest.param({WAIT: "        pass\n"}, ANY, id="multicasts into a stage in use"),
        pytest.param({ARRIVE: "        pass\n"}, {"deadlock"}, id="does not release to the other CTA"),
        pytest.param({OWN_WAIT: ""}, ANY, id="the second CTA fills a stage in use"),
        pytest.param({WAIT: WAIT.replace(" ^ 1", "")}, {"deadlock"}, id="waits for the other phase"),
        pytest.param({BYTES: BYTES.replace("BLOCK_N", "BLOCK_N // 2")}, {"deadlock"}, id="expects half of what comes"),
        pytest.param({DRAIN: ""}, {"right", "race"}, id="ends while the other CTA arrives"),
        pytest.param({"^ wraps": "^ 1 ^ wraps"}, ANY - {"wrong"}, id="waits at the end for the other phase"),
    ],
)
def test_what_holds_a_cluster_together(
    changes: dict[str, str], expected: set[str], gathered: bool, ping_pong: bool
) -> None:
    found = outcomes(changes, gathered=gathered, ping_pong=ping_pong, ctas=2, paces=APART, orders=6)
    assert found <= expected
    assert not changes or found - {"right"}


@FORMS
def test_the_ctas_have_to_meet(gathered: bool, ping_pong: bool) -> None:
    found = outcomes({}, gathered=gathered, ping_pong=ping_pong, ctas=2, paces=APART[:2], meets=False, orders=6)
    assert found & {"race", "deadlock"}


@pytest.mark.parametrize("version", [(3, 7, 1), (3, 8, 0)])
def test_where_triton_has_no_clusters_their_schedules_are_left_out(
    version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "triton_version", lambda: version)
    monkeypatch.setattr(schedules, "target_of", lambda device: Target(architecture="sm_90", num_sms=2))
    config = Config(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4)
    asked = "down", torch.bfloat16, "sm_90"
    found = [other.gluon for other in warp_specialized(config, *asked)]
    rows, weight = torch.zeros(8, 64).half(), per_expert(torch.zeros(2, 64, 16).half())
    reason = why_unsupported("ping_pong_cluster", rows, weight, None, size_columns=16)
    words = kernel_in_words("down_kernel", {"gluon": "ping_pong_cluster"})
    cases = {case.num_ctas for case in gluon_cases.down_cases()}
    if version >= schedules.CLUSTERS_SINCE:
        assert found == available() == list(SCHEDULES)
        assert (reason, words, left_out(*asked), cases) == (None, "gluon.down_kernel", "", {1, 2})
    else:
        assert found == available() == ["cooperative", "ping_pong"]
        assert reason == f"clusters of programs (TMA multicast) need Triton 3.8, this is {triton.__version__}"
        assert words == f"down_kernel (this Triton's Gluon does not do: {reason})"
        assert left_out(*asked) == f"without cooperative_cluster, ping_pong_cluster: {reason}"
        assert cases == {1}
    assert left_out("d_weight", *asked[1:]) == left_out("down", torch.float32, "sm_90") == ""


def test_what_multicast_saves_and_wastes_on_paper() -> None:
    read = {name: multicast.l2_bytes(schedule) for name, schedule in SCHEDULES.items()}
    columns = {name: schedule.block_n for name, schedule in SCHEDULES.items()}
    for name in ("cooperative", "ping_pong"):
        of_b = 64 * columns[name] * 2  # bytes: half of them is saved
        assert read[name] == of_b + 64 * 128 * 2
        assert read[f"{name}_cluster"] == read[name] - of_b // 2
    assert multicast.wasted_tiles([0, 1, 128, 129, 256, 257, 640]) == 4
    counts = range(1000 - 127, 1000 + 129)
    tiles = sum(-(-count // 128) for count in counts)
    wasted = multicast.wasted_tiles(counts)
    assert multicast.wasted_share(1000) == pytest.approx(wasted / (tiles + wasted), rel=1e-3)
