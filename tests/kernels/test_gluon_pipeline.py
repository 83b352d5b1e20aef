"""The Gluon kernels' source in the emulator: right in every order of events that the barriers allow, and variants that
must not be.

A GPU compiles the same source; what this cannot show is in the compiler and in the hardware.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_triton import reference
from moe_triton_kernels.activations import Activation
from moe_triton_kernels.gluon.launch import PlacesArgument
from moe_triton_kernels.gluon.schedules import RingTile
from moe_triton_kernels.operands import BiasArgument
from moe_triton_kernels.tiles import TilesArgument
from tests.helpers.compare import assert_close
from tests.helpers.gluon_emulator import Deadlock, Emulator
from tests.helpers.gluon_memory import Descriptor, Pointer, Race

BLOCK_M, BLOCK_K = 8, 4
OFFSETS = np.array([0, 11, 11, 24, 27], np.int32)  # four experts of which the second has no row
NUM_ROWS = 30  # rows 27 to 29 belong to nobody
TOP_K = 2
EXPERTS = len(OFFSETS) - 1


def tiles() -> TilesArgument:
    entries = [(e, row) for e in range(EXPERTS) for row in range(OFFSETS[e], OFFSETS[e + 1], BLOCK_M)]
    table = np.array(entries, np.int32).reshape(-1)
    number = np.array([len(entries)], np.int32)
    return TilesArgument(Pointer(table), Pointer(number), Pointer(OFFSETS))


def matrices(random: np.random.Generator, size_k: int, size_columns: int) -> np.ndarray:
    """The experts' matrices [E, k, columns]; that of the expert without rows is NaN, and goes nowhere."""
    found = random.standard_normal((EXPERTS, size_k, size_columns)).astype(np.float32)
    found[1] = np.nan
    return found


def descriptor(weight: np.ndarray, k_contiguous: bool, width: int) -> Descriptor:
    """Of the matrices [E, k, columns], or of their transposes."""
    if k_contiguous:
        return Descriptor(weight.transpose(0, 2, 1), [1, width, BLOCK_K])
    return Descriptor(weight, [1, BLOCK_K, width])


def table(random: np.random.Generator, weight: np.ndarray, k_contiguous: bool, width: int) -> dict[str, Any]:
    """The same as matrices of their own: in any order in memory, at multiples of 16 bytes, with NaN between them."""
    stored = weight.transpose(0, 2, 1) if k_contiguous else weight
    _, rows, line = stored.shape
    starts = random.permutation(EXPERTS) * (rows * line // 4 + 2) * 4
    memory = np.full(starts.max() + rows * line, np.nan, np.float32)
    for start, matrix in zip(starts, stored, strict=True):
        memory[start : start + matrix.size] = matrix.reshape(-1)
    steps = np.lib.stride_tricks.as_strided(memory, (starts.max() // 4 + 1, rows, line), (16, 4 * line, 4))
    block = [1, width, BLOCK_K] if k_contiguous else [1, BLOCK_K, width]
    return {
        "weight": Descriptor(steps, block),
        "places": PlacesArgument(Pointer(2**40 + 4 * starts), 2**40, 16),
    }


class Case:
    """A product that the emulator runs, and its float64 answer."""

    def __init__(
        self,
        *,
        ping_pong: bool,
        stages: int,
        steps: int,
        k_contiguous: bool = True,
        tail: int = 0,
        is_table: bool = False,
        seed: int = 0,
    ) -> None:
        """tail: k that the last step lacks."""
        self.random = np.random.default_rng(seed)
        self.k_contiguous, self.size_k = k_contiguous, steps * BLOCK_K - tail
        self.ping_pong, self.stages, self.is_table = ping_pong, stages, is_table

    def weight(self, weight: np.ndarray, width: int) -> dict[str, Any]:
        if self.is_table:
            return table(self.random, weight, self.k_contiguous, width)
        return {"weight": descriptor(weight, self.k_contiguous, width), "places": None}

    def constants(self, block_n: int, parts: int = 2) -> dict[str, Any]:
        tile = RingTile(
            self.ping_pong, BLOCK_M, block_n, BLOCK_K, self.stages, 2, parts, EVEN_K=self.size_k % BLOCK_K == 0
        )
        return {"K_CONTIGUOUS": self.k_contiguous, "TILE": tile}

    def rows(self, emulator: Emulator, programs: int = 2) -> None:
        """down: 24 columns in tiles of 16, with bias and router weights."""
        columns, block_n = 24, 16
        a = self.random.standard_normal((NUM_ROWS, self.size_k)).astype(np.float32)
        a[OFFSETS[-1] :] = np.nan
        weight = matrices(self.random, self.size_k, columns)
        bias = self.random.standard_normal((EXPERTS, columns)).astype(np.float32)
        router_weights = self.random.random(NUM_ROWS).astype(np.float32) + 0.1
        source = self.random.permutation(NUM_ROWS).astype(np.int32)
        out = np.full(NUM_ROWS * columns, np.nan, np.float32)
        emulator.launch(
            "down",
            "down_kernel",
            programs,
            a=Descriptor(a, [BLOCK_M, BLOCK_K]),
            **self.weight(weight, block_n),
            bias=BiasArgument(Pointer(bias.reshape(-1)), columns, 1, 4, 1),
            router_weights=Pointer(router_weights),
            source=Pointer(source),
            out=Pointer(out),
            tiles=tiles(),
            size_k=self.size_k,
            size_columns=columns,
            **self.constants(block_n),
        )
        result = torch.from_numpy(out).reshape(NUM_ROWS, columns)
        for e in range(EXPERTS):
            span = slice(OFFSETS[e], OFFSETS[e + 1])
            product = a[span].astype(np.float64) @ weight[e].astype(np.float64) + bias[e]
            assert_close(result[span], torch.from_numpy(product * router_weights[source[span], None]))
        assert result[OFFSETS[-1] :].isnan().all()

    def up(
        self,
        emulator: Emulator,
        activation: str = "swiglu",
        programs: int = 2,
        keep_h: bool = True,
        concatenated: bool = True,
    ) -> None:
        """up: 24 columns (and 24 of gate) in tiles of 16, gathered from NUM_ROWS / TOP_K tokens."""
        gated, size_n, block_n = activation == "swiglu", 24, 32
        projections = 2 if gated else 1
        width = block_n // projections if concatenated else block_n
        x = self.random.standard_normal((NUM_ROWS // TOP_K, self.size_k)).astype(np.float32)
        weight = matrices(self.random, self.size_k, projections * size_n)
        bias = self.random.standard_normal((EXPERTS, projections * size_n)).astype(np.float32)
        source = self.random.permutation(NUM_ROWS).astype(np.int32)
        source[OFFSETS[-1] :] = -1
        a = np.full(NUM_ROWS * size_n, np.nan, np.float32)
        h = np.full(NUM_ROWS * projections * size_n if keep_h else 0, np.nan, np.float32)
        emulator.launch(
            "up",
            "up_kernel",
            programs,
            x=Pointer(x.reshape(-1)),
            source=Pointer(source),
            **self.weight(weight, width),
            bias=BiasArgument(Pointer(bias.reshape(-1)), projections * size_n, 1, 4, 1),
            a=Pointer(a),
            h=Pointer(h) if keep_h else None,
            tiles=tiles(),
            size_d=self.size_k,
            size_n=size_n,
            TOP_K=TOP_K,
            ACTIVATION=Activation(activation),
            CONCATENATED=concatenated,
            **self.constants(block_n, 2 if concatenated else 1),  # a column block of A has 8 at least
        )
        a_rows = torch.from_numpy(a).reshape(NUM_ROWS, size_n)
        h_rows = torch.from_numpy(h).reshape(-1, projections * size_n)
        for e in range(EXPERTS):
            span = slice(OFFSETS[e], OFFSETS[e + 1])
            expected = x[source[span] // TOP_K].astype(np.float64) @ weight[e].astype(np.float64) + bias[e]
            value = reference.activate(torch.from_numpy(expected), activation, concatenated)
            assert_close(a_rows[span], value, tolerance=1e-4)
            if keep_h:
                assert_close(h_rows[span], torch.from_numpy(expected))
        assert a_rows[OFFSETS[-1] :].isnan().all()
        assert h_rows[OFFSETS[-1] :].isnan().all()

    def d_hidden(
        self, emulator: Emulator, activation: str = "swiglu", programs: int = 2, concatenated: bool = True
    ) -> None:
        """d_hidden: 24 columns in tiles of 16, gradients gathered from NUM_ROWS / TOP_K tokens."""
        size_n, block_n = 24, 16
        width = 2 * size_n if activation == "swiglu" else size_n
        grad_out = self.random.standard_normal((NUM_ROWS // TOP_K, self.size_k)).astype(np.float32)
        weight = matrices(self.random, self.size_k, size_n)
        h = self.random.standard_normal((NUM_ROWS, width)).astype(np.float32)
        router_weights = self.random.random(NUM_ROWS).astype(np.float32) + 0.1
        source = self.random.permutation(NUM_ROWS).astype(np.int32)
        h[OFFSETS[-1] :], source[OFFSETS[-1] :] = np.nan, -1
        columns = {"weighted_a": size_n, "grad_h": width, "shares": -(-size_n // block_n)}
        outputs = {name: np.full(number * NUM_ROWS, np.nan, np.float32) for name, number in columns.items()}
        emulator.launch(
            "d_hidden",
            "d_hidden_kernel",
            programs,
            grad_out=Pointer(grad_out.reshape(-1)),
            source=Pointer(source),
            **self.weight(weight, block_n),
            h=Pointer(h.reshape(-1)),
            router_weights=Pointer(router_weights),
            **{name: Pointer(output) for name, output in outputs.items()},
            tiles=tiles(),
            size_d=self.size_k,
            size_n=size_n,
            num_slots=NUM_ROWS,
            TOP_K=TOP_K,
            ACTIVATION=Activation(activation),
            CONCATENATED=concatenated,
            **self.constants(block_n),
        )
        found = {name: torch.from_numpy(output) for name, output in outputs.items()}
        weighted_a, grad_h = found["weighted_a"].view(NUM_ROWS, size_n), found["grad_h"].view(NUM_ROWS, width)
        shares = found["shares"].view(-1, NUM_ROWS).sum(0)
        for e in range(EXPERTS):
            span = slice(OFFSETS[e], OFFSETS[e + 1])
            grad_a = torch.from_numpy(grad_out[source[span] // TOP_K].astype(np.float64) @ weight[e])
            scale = torch.from_numpy(router_weights[source[span]]).double()[:, None]
            leaf = torch.from_numpy(h[span]).double().requires_grad_()
            a = reference.activate(leaf, activation, concatenated)
            (expected,) = torch.autograd.grad(a, leaf, grad_a * scale)
            a = a.detach()
            assert_close(weighted_a[span], a * scale, tolerance=1e-4)
            assert_close(grad_h[span], expected, tolerance=1e-4)
            assert_close(shares[span], (grad_a * a).sum(1), tolerance=1e-4)
        for output in (weighted_a, grad_h, shares):
            assert output[OFFSETS[-1] :].isnan().all()


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
EMPTY_WAIT = "            mbarrier.wait(ring.empty.index(stage), phase ^ 1)\n"
FULL_WAIT = "        mbarrier.wait(ring.full.index(stage), phase)\n"
BYTES = "(work.BLOCK_N if work.GATHERED else work.BLOCK_N + work.BLOCK_M)"
TURN_WAIT = "mbarrier.wait(ring.turn.index(CONSUMER), (number // 2 + CONSUMER + 1) % 2)"
TURN_ARRIVE = "        mbarrier.arrive(ring.turn.index(1 - CONSUMER), count=1)\n"
STAGES = 3


def outcomes(changes: dict[str, str], *, gathered: bool, ping_pong: bool, steps: int = 5) -> set[str]:
    """How twelve orders of events end, with these changes to the source."""
    found = set()
    for seed in range(12):
        case = Case(ping_pong=ping_pong, stages=STAGES, steps=steps)
        emulator = Emulator(seed, ((0.2, 1, 0.2, 1), (0.02, 1, 1, 1))[seed % 2], changes)
        try:
            (case.up if gathered else case.rows)(emulator)
        except (AssertionError, Race, Deadlock) as error:
            found.add({AssertionError: "wrong", Race: "race", Deadlock: "deadlock"}[type(error)])
        else:
            found.add("right")
    return found


FORMS = pytest.mark.parametrize(("gathered", "ping_pong"), [(False, False), (False, True), (True, False), (True, True)])


@FORMS
def test_the_source_as_it_is(gathered: bool, ping_pong: bool) -> None:
    assert outcomes({}, gathered=gathered, ping_pong=ping_pong) == {"right"}


@FORMS
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({EMPTY_WAIT: ""}, {"wrong", "race"}, id="fills a stage in use"),
        pytest.param({FULL_WAIT: ""}, {"wrong", "race", "deadlock"}, id="reads a stage that is not full"),
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


APART = "tma_load(weight, [expert, k0, n0],"
BELOW = "tma_load(weight, [0, expert * work.size_k + k0, n0],"


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
    monkeypatch.setattr(sys.modules[__name__], "descriptor", flat)
    for tail, expected in ((0, contextlib.nullcontext()), (2, pytest.raises(AssertionError, match="not finite"))):
        case = Case(ping_pong=False, stages=STAGES, steps=3, k_contiguous=False, tail=tail)
        with expected:
            case.rows(Emulator(0, changes={APART: BELOW}))


@pytest.mark.parametrize("k_contiguous", [True, False])
def test_matrices_of_their_own_are_found_by_their_addresses(k_contiguous: bool) -> None:
    def rows(**changes: Any) -> None:
        case = Case(ping_pong=False, stages=STAGES, steps=3, k_contiguous=k_contiguous, tail=2, is_table=True)
        case.rows(Emulator(0, **changes))

    rows()
    with pytest.raises(AssertionError):
        rows(changes={"if places is not None:": "if False:"})


def test_both_consumers_have_to_release_a_shared_stage() -> None:
    changes = {"1 if work.PING_PONG else 2": "1"}
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
