"""The timing helpers, with a clock that only moves when it is told to."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from moe_triton.benchmarking import timing
from moe_triton.benchmarking.timing import CpuTimer, Fresh, GpuTimer, Spread, ratios, run_rounds, spread


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *durations: float):
        """A call that takes the durations in turn, the last one from then on."""
        left = list(durations)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_a_sample_is_the_median_of_its_calls():
    clock = Clock()
    assert CpuTimer(clock).measure(clock.call("a", 1.0, 5.0, 2.0, 3.0, 4.0), 5) == pytest.approx(3.0)


def test_freeing_the_result_is_not_timed():
    clock = Clock()

    class Result:
        def __del__(self) -> None:
            clock.now += 100.0

    def call() -> Result:
        clock.now += 1.0
        return Result()

    assert CpuTimer(clock).measure(call, 3) == pytest.approx(1.0)


def test_what_a_fresh_call_is_made_of_is_not_timed():
    clock = Clock()

    def make():
        clock.now += 50.0
        return clock.call("backward", 1.0)

    assert CpuTimer(clock).measure(Fresh(make), 3) == pytest.approx(1.0)
    assert clock.now == pytest.approx(3 * 51.0)  # made anew before each


def test_a_cold_call_finds_the_flush_buffer_in_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "CPU_FLUSH_BYTES", 64)
    clock = Clock()
    timer = CpuTimer(clock, cold=True)
    assert timer.measure(clock.call("a", 1.0), 3) == pytest.approx(1.0)
    assert timer.flush is not None
    assert timer.flush.unique().tolist() == [3]  # written before each of the three


def test_rounds_are_interleaved_and_the_order_turns():
    clock = Clock()
    calls = {name: clock.call(name, 1.0) for name in "abc"}
    times = run_rounds(calls, CpuTimer(clock), budget_s=15.0, min_rounds=4, clock=clock)
    rounds = clock.log[3:]  # behind the estimates
    assert ["".join(rounds[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "acb", "cab", "cba"]
    assert times == {name: [1.0] * 4 for name in "abc"}


def test_rounds_go_on_until_the_budget_is_spent():
    clock = Clock()
    calls = {"a": clock.call("a", 1.0), "b": clock.call("b", 1.0)}
    shares: list[float] = []
    times = run_rounds(calls, CpuTimer(clock), budget_s=60.0, clock=clock, on_round=shares.append)
    assert len(times["a"]) == (60 - 2) // 2
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


def test_rounds_stop_at_the_maximum():
    clock = Clock()
    times = run_rounds({"a": clock.call("a", 0.1)}, CpuTimer(clock), budget_s=1e9, max_rounds=7, clock=clock)
    assert len(times["a"]) == 7


def test_a_short_call_is_repeated_within_a_sample():
    clock = Clock()
    run_rounds({"a": clock.call("a", 1e-3)}, CpuTimer(clock), budget_s=0.0, min_rounds=1, clock=clock)
    assert len(clock.log) == 2 + 10


def test_a_slow_entry_sits_out_two_rounds_of_three_but_gets_its_samples():
    clock = Clock()
    calls = {"a": clock.call("a", 1.0), "b": clock.call("b", 1.0), "slow": clock.call("slow", 30.0)}
    times = run_rounds(calls, CpuTimer(clock), budget_s=150.0, min_rounds=5, clock=clock)
    assert [t is not None for t in times["slow"]] == [i % 3 == 0 for i in range(13)]
    assert len(times["a"]) == 13
    assert None not in times["a"]


def test_an_entry_that_would_eat_the_budget_gets_three_samples():
    clock = Clock()
    calls = {"a": clock.call("a", 1.0), "b": clock.call("b", 1.0), "slow": clock.call("slow", 30.0)}
    times = run_rounds(calls, CpuTimer(clock), budget_s=100.0, min_rounds=5, clock=clock)
    assert sum(t is not None for t in times["slow"]) == 3
    assert len(times["a"]) == 7


def test_a_long_first_call_on_a_gpu_may_have_compiled_and_counts_for_nothing():
    clock = Clock()
    timer = CpuTimer(clock)
    timer.long_warm_up = GpuTimer.long_warm_up
    calls = {"a": clock.call("a", 30.0, 1e-3), "b": clock.call("b", 1e-3)}
    times = run_rounds(calls, timer, budget_s=0.0, min_rounds=2, clock=clock)
    assert clock.log.count("a") == 2 + 2 * 10  # as often as its neighbour
    assert times["a"] == times["b"] == pytest.approx([1e-3] * 2)


def test_a_gpu_waits_until_the_host_has_launched_a_call(monkeypatch):
    """With fake events: what they record, in order."""
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(timing, "keep_gpu_busy", lambda cycles: log.append("busy"))
    timer = GpuTimer(torch.device("cpu"), cold=False, ahead=True)
    assert timer.measure(lambda: log.append("call"), 2) == pytest.approx(2e-3)
    assert log == ["synchronize", *["busy", "event", "call", "event"] * 2, "synchronize"]
    log.clear()
    GpuTimer(torch.device("cpu"), cold=False).measure(lambda: log.append("call"), 1)
    assert log == ["synchronize", "event", "call", "event", "synchronize"]


def test_a_call_is_warmed_up_before_it_is_estimated_unless_it_is_long():
    clock = Clock()
    run_rounds({"a": clock.call("a", 0.9, 1e-3)}, CpuTimer(clock), budget_s=0.0, min_rounds=1, clock=clock)
    assert len(clock.log) == 2 + 10
    clock.log.clear()
    run_rounds({"a": clock.call("a", 9.0)}, CpuTimer(clock), budget_s=0.0, min_rounds=1, clock=clock)
    assert len(clock.log) == 1 + 1


def test_an_entry_that_is_far_slower_than_ours_gets_three_samples_and_no_more():
    clock = Clock()
    calls = {"slow": clock.call("slow", 0.5), "ours": clock.call("ours", 0.02), "twice": clock.call("twice", 0.04)}
    named: list[str] = []
    times = run_rounds(
        calls, CpuTimer(clock), budget_s=30.0, clock=clock, max_rounds=50, against="ours", on_call=named.append
    )
    assert sum(t is not None for t in times["slow"]) == 3
    assert clock.log.count("slow") == 2 + 3
    assert len(times["ours"]) == len(times["slow"]) == 50
    assert None not in times["ours"] + times["twice"]
    assert named[:2] == ["ours", "ours"]  # its time is known before the others'
    assert set(named) == set(calls)


def test_an_entry_is_far_slower_from_twenty_times_on():
    for slow in (0.95, 1.05):
        clock = Clock()
        calls = {"ours": clock.call("ours", 0.05), "other": clock.call("other", slow), "slow": clock.call("slow", 0.3)}
        times = run_rounds(calls, CpuTimer(clock), budget_s=40.0, clock=clock, max_rounds=45, against="ours")
        assert (sum(t is not None for t in times["other"]) == 3) == (slow > 1.0)


def test_no_entries():
    assert run_rounds({}, CpuTimer(), budget_s=1.0) == {}


def test_ratios_pair_the_rounds():
    slow_machine = [1.0, 2.0, 10.0, None, 4.0]
    same_twice = [2.0, 4.0, 20.0, 7.0, None]
    assert ratios(same_twice, slow_machine) == Spread(p20=2.0, p50=2.0, p80=2.0)
    assert ratios([None], [1.0]) is None


def test_spread_interpolates():
    found = spread([5.0, 1.0, None, 3.0, 2.0, 4.0, 6.0])
    assert found is not None
    assert (found.p20, found.p50, found.p80) == pytest.approx((2.0, 3.5, 5.0))
    assert spread([None]) is None
