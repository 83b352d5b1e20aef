"""The Gluon kernels' source in the emulator: right in every order of events that the barriers allow, and variants that
must not be.

A GPU compiles the same source; what this cannot show is in the compiler and in the hardware.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import gluon_products
from tests.helpers.gluon_emulator import Emulator
from tests.helpers.gluon_memory import Descriptor
from tests.helpers.gluon_products import BLOCK_K, STAGES, Case, outcomes

paces = st.tuples(*(st.sampled_from([0.02, 0.3, 1, 20]) for _ in range(4)))
cases = st.builds(
    Case,
    ping_pong=st.booleans(),
    stages=st.integers(2, 5),
    steps=st.integers(1, 7),
    k_contiguous=st.booleans(),
    tail=st.integers(0, BLOCK_K - 1),
    is_table=st.booleans(),
    seed=st.integers(0, 99),
)


@settings(deadline=None, max_examples=25)
@given(case=cases, seed=st.integers(0, 10**6), pace=paces, programs=st.integers(1, 12))
def test_rows_in_any_order(case: Case, seed: int, pace: tuple[float, ...], programs: int) -> None:
    case.rows(Emulator(seed, pace), programs)


@settings(deadline=None, max_examples=25)
@given(
    case=cases,
    seed=st.integers(0, 10**6),
    pace=paces,
    activation=st.sampled_from(["swiglu", "gelu_tanh"]),
    programs=st.integers(1, 12),
    keep_h=st.booleans(),
    concatenated=st.booleans(),
)
def test_up_in_any_order(
    case: Case,
    seed: int,
    pace: tuple[float, ...],
    activation: str,
    programs: int,
    keep_h: bool,
    concatenated: bool,
) -> None:
    case.up(Emulator(seed, pace), activation, programs, keep_h, concatenated or activation != "swiglu")


@settings(deadline=None, max_examples=10)
@given(
    case=cases,
    seed=st.integers(0, 10**6),
    pace=paces,
    activation=st.sampled_from(["swiglu", "gelu_tanh"]),
    programs=st.integers(1, 12),
    concatenated=st.booleans(),
)
def test_d_hidden_in_any_order(
    case: Case, seed: int, pace: tuple[float, ...], activation: str, programs: int, concatenated: bool
) -> None:
    case.d_hidden(Emulator(seed, pace), activation, programs, concatenated or activation != "swiglu")


FENCE = "        if work.GATHERED:\n            fence_async_shared()\n"
EMPTY_WAIT = "    mbarrier.wait(ring.empty.index(stage), phase ^ 1)\n"
FULL_WAIT = "\n        mbarrier.wait(ring.full.index(stage), phase)\n"
BYTES = "(work.BLOCK_N + LOADED_ROWS)"
TURN_WAIT = "mbarrier.wait(ring.turn.index(CONSUMER), (number // 2 + CONSUMER + 1) % 2)"
TURN_ARRIVE = "        mbarrier.arrive(ring.turn.index(1 - CONSUMER), count=1)\n"


FORMS = pytest.mark.parametrize(("gathered", "ping_pong"), [(False, False), (False, True), (True, False), (True, True)])


@FORMS
def test_the_source_as_it_is(gathered: bool, ping_pong: bool) -> None:
    assert outcomes({}, gathered=gathered, ping_pong=ping_pong) == {"right"}


@FORMS
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({EMPTY_WAIT: ""}, {"wrong", "race"}, id="fills a stage in use"),
        pytest.param({FULL_WAIT: "\n"}, {"wrong", "race", "deadlock"}, id="reads a stage that is not full"),
        pytest.param({"phase ^ 1)\n": "phase)\n"}, {"deadlock"}, id="waits for a release before the first"),
        pytest.param({"warpgroup_mma_wait(1,": "warpgroup_mma_wait(2,"}, {"wrong", "right"}, id="releases too early"),
        pytest.param({"warpgroup_mma_wait(0,": "warpgroup_mma_wait(1,"}, {"wrong", "right"}, id="reads too early"),
        pytest.param({BYTES: "8"}, {"wrong", "race", "deadlock"}, id="expects too few bytes"),
    ],
)
def test_a_broken_ring_is_found(changes: dict[str, str], expected: set[str], gathered: bool, ping_pong: bool) -> None:
    found = outcomes(changes, gathered=gathered, ping_pong=ping_pong)
    assert found - {"right"}
    assert found <= expected


APART = "load_columns(weight, [expert, k0, n0],"
BELOW = "load_columns(weight, [0, expert * work.size_k + k0, n0],"


@pytest.mark.parametrize("k_contiguous", [True, False])
@pytest.mark.parametrize("ping_pong", [True, False])
def test_past_the_end_of_k_there_are_zeros(ping_pong: bool, k_contiguous: bool) -> None:
    """Not the numbers of the next token, nor those of the next expert, which may be NaN."""

    def up(**changes: Any) -> None:
        case = Case(ping_pong=ping_pong, stages=STAGES, steps=3, k_contiguous=k_contiguous, tail=2)
        case.up(Emulator(0, **changes))

    up()
    with pytest.raises((AssertionError, IndexError)):  # wrong, or past the last token
        up(changes={", (k < work.size_k - k0)[None, :])": ")"})


def test_experts_below_one_another_give_the_next_ones_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = lambda weight, k_contiguous, width: Descriptor(weight.reshape(1, -1, weight.shape[2]), [1, BLOCK_K, width])  # noqa: E731
    monkeypatch.setattr(gluon_products, "descriptor", flat)
    for tail, expected in ((0, contextlib.nullcontext()), (2, pytest.raises(AssertionError, match="not finite"))):
        case = Case(ping_pong=False, stages=STAGES, steps=3, k_contiguous=False, tail=tail)
        with expected:
            case.rows(Emulator(0, changes={APART: BELOW}))


EMPTY_HALF = "skip(work, ring, stage, phase, num_steps - num_products)"


@pytest.mark.parametrize("ctas", [1, 2])
def test_a_half_without_rows_is_not_multiplied(ctas: int) -> None:
    """Four experts have three tiles of two halves, and one of a single half; in a cluster two of each."""
    emulator, steps = Emulator(0), 2
    Case(ping_pong=False, stages=STAGES, steps=steps, ctas=ctas).rows(emulator, programs=1)
    columns = 2  # tiles of them
    assert emulator.issued.count(0) == columns * steps * ctas * (5 if ctas == 1 else 4)
    assert emulator.issued.count(1) == columns * steps * ctas * (3 if ctas == 1 else 1)
    changes = {EMPTY_HALF: "pass"}
    assert outcomes(changes, gathered=False, ping_pong=False, ctas=ctas) == {"deadlock"}


@pytest.mark.parametrize("k_contiguous", [True, False])
def test_matrices_of_their_own_are_found_by_their_addresses(k_contiguous: bool) -> None:
    def rows(**changes: Any) -> None:
        case = Case(ping_pong=False, stages=STAGES, steps=3, k_contiguous=k_contiguous, tail=2, is_table=True)
        case.rows(Emulator(0, **changes))

    rows()
    with pytest.raises(AssertionError):
        rows(changes={"if places is not None:": "if False:"})


def test_both_consumers_have_to_release_a_shared_stage() -> None:
    changes = {"empty = make_barriers(work.STAGES, work.CONSUMERS,": "empty = make_barriers(work.STAGES, 1,"}
    assert outcomes(changes, gathered=True, ping_pong=False) & {"wrong", "race"}
    assert outcomes(changes, gathered=True, ping_pong=True) == {"right"}


@pytest.mark.parametrize("ping_pong", [False, True])
def test_gathered_rows_need_the_proxy_fence(ping_pong: bool) -> None:
    assert outcomes({FENCE: ""}, gathered=True, ping_pong=ping_pong) == {"race"}
    assert outcomes({FENCE: ""}, gathered=False, ping_pong=ping_pong) == {"right"}


@pytest.mark.parametrize("ping_pong", [False, True])
@pytest.mark.parametrize(("lag", "expected"), [(0, {"right"}), (STAGES - 2, {"right"}), (STAGES - 1, {"deadlock"})])
def test_a_producer_that_fences_may_lag_by_all_stages_but_two(lag: int, expected: set[str], ping_pong: bool) -> None:
    """The other way to fence: the producer waits for its copies, `lag` steps behind, fences, and then arrives.

    A stage is released when the next product has been issued. One that lags by all stages but one waits for the
    release of a stage, which waits for the next stage to be full, which waits for the producer.
    """
    changes = {
        "    cp_async_arrive,\n": "    commit_group,\n    wait_group,\n",
        "    phase = gl.to_tensor(0)\n": "    phase = gl.to_tensor(0)\n    issued = 0\n",
        "                cp_async_arrive(full, increment_count=False)\n": f"""
                commit_group()
                wait_group({lag})
                fence_async_shared()
                mbarrier.arrive(ring.full.index((stage - {lag}) % work.STAGES), count=128, pred=issued >= {lag})
                issued += 1
""",
        "            stage, phase = advance(stage, phase, work.STAGES)\n": f"""
            stage, phase = advance(stage, phase, work.STAGES)
    if work.GATHERED:
        wait_group(0)
        fence_async_shared()
        for behind in range(min({lag}, issued), 0, -1):
            mbarrier.arrive(ring.full.index((stage - behind) % work.STAGES), count=128)
""",
        FENCE: "",
    }
    assert outcomes(changes, gathered=True, ping_pong=ping_pong) == expected


def test_consumers_take_turns() -> None:
    """Ping-pong: a tile's products are issued with none of the other consumer's between.

    Without that, a consumer that is ahead by a tile takes the phase before last of a full stage for the one it waits
    for: the parity is the same.
    """
    steps = 5
    for seed in range(8):
        emulator = Emulator(seed)
        Case(ping_pong=True, stages=STAGES, steps=steps).rows(emulator, programs=1)
        tiles_taken = emulator.issued[::steps]
        assert emulator.issued == [consumer for consumer in tiles_taken for _ in range(steps)]
        assert tiles_taken == [i % 2 for i in range(len(tiles_taken))]
    without = {TURN_WAIT: "pass", TURN_ARRIVE: "        pass\n"}
    assert outcomes(without, gathered=False, ping_pong=True) & {"wrong", "race", "deadlock"}
    other_first = {TURN_WAIT: TURN_WAIT.replace("+ 1)", "+ 2)")}
    assert outcomes(other_first, gathered=False, ping_pong=True) == {"deadlock"}
