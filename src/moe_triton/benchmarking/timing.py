"""How time is measured: samples of a few calls, interleaved over rounds, and the quantiles of per-round ratios."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from moe_triton.torch_internals import keep_gpu_busy

Times = list[float | None]  # seconds per call, one entry per round; None in a round that was left out

MIN_ROUNDS = 5
MAX_ROUNDS = 200
MIN_SAMPLE_S = 10e-3  # a sample repeats a short call until it lasts this long
MAX_CALLS = 20
SLOW = 4.0  # an entry whose sample lasts this many times the median one sits out two rounds of three
SLOW_EVERY = 3
FAR_SLOWER = 20.0  # a call that lasts this many times the call of `against` is measured FEW times
FEW = 3
LONG_S = 1.0
AHEAD_CYCLES = 2_000_000  # about a millisecond of a GPU: longer than the host needs to launch a layer's kernels
CACHES = ("cold", "warm")
CPU_FLUSH_BYTES = 256 << 20  # far beyond the caches


@dataclass(frozen=True)
class Fresh:
    """A call that is made anew before each time, outside the timed part: a backward needs its own forward."""

    make: Callable[[], Callable[[], object]]


Call = Callable[[], object] | Fresh


def ready(call: Call) -> Callable[[], object]:
    return call.make() if isinstance(call, Fresh) else call


class Timer(Protocol):
    """Measures calls on one kind of device.

    warm_up       calls after the first, before one is estimated
    long_warm_up  the same where the first took LONG_S or more: on a GPU it may have compiled
    """

    warm_up: int
    long_warm_up: int

    def measure(self, call: Call, calls: int) -> float:
        """Median seconds of one call, out of `calls` calls in a row."""


class CpuTimer:
    """Wall-clock time of each call. Freeing what a call returns is not counted: a caller keeps it.

    `cold`: before each call a buffer larger than the caches is written, so that the call finds nothing of its own.
    """

    warm_up, long_warm_up = 1, 0

    def __init__(self, clock: Callable[[], float] = time.perf_counter, cold: bool = False) -> None:
        self.clock = clock
        self.flush = torch.zeros(CPU_FLUSH_BYTES, dtype=torch.int8) if cold else None

    def measure(self, call: Call, calls: int) -> float:
        times = []
        for _ in range(calls):
            run = ready(call)
            if self.flush is not None:
                self.flush.add_(1)
            start = self.clock()
            result = run()
            times.append(self.clock() - start)
            del result, run
        return statistics.median(times)


class GpuTimer:
    """CUDA events around each call, with the L2 cache flushed before it; one synchronisation after all the calls.

    Nothing here waits for the device between the calls. The flush keeps the device busy while the host launches the
    first kernels, so a call shows launch latency only where it launches more slowly than the device works. With
    `cold=False` nothing is flushed, and a call may find its weights in the cache. With `ahead` the device waits until
    the host has launched the whole call: for kernels, whose launches are not theirs to answer for.
    """

    warm_up, long_warm_up = 3, 1

    def __init__(self, device: torch.device, cold: bool = True, ahead: bool = False) -> None:
        self.device, self.ahead = device, ahead
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(256 << 20, 4 * cache)
        self.flush = torch.zeros(size, dtype=torch.int8, device=device) if cold else None

    def measure(self, call: Call, calls: int) -> float:
        with torch.cuda.device(self.device):
            starts = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
            torch.cuda.synchronize()
            for start, end in zip(starts, ends, strict=True):
                run = ready(call)
                if self.flush is not None:
                    self.flush.zero_()
                if self.ahead:
                    keep_gpu_busy(AHEAD_CYCLES)
                start.record()
                result = run()
                end.record()
                del result, run
            torch.cuda.synchronize()
            return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)) / 1e3


def make_timer(device: torch.device, cache: str | None = None, *, ahead: bool = False) -> Timer:
    """The device's timer. cache: "cold" or "warm"; None is cold on a GPU and warm on a CPU. ahead: see `GpuTimer`."""
    if device.type == "cuda":
        return GpuTimer(device, cold=cache != "warm", ahead=ahead)
    return CpuTimer(cold=cache == "cold")


def run_rounds(
    calls: Mapping[str, Call],
    timer: Timer,
    *,
    budget_s: float,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[float], None] | None = None,
    on_call: Callable[[str], None] | None = None,
    against: str | None = None,
) -> dict[str, Times]:
    """Every entry once per round, until the budget is spent and each has enough samples.

    Enough is `min_rounds`, or FEW for an entry that would need more than the whole budget for that many, and for one
    whose call lasts more than FAR_SLOWER times the call of the entry `against`: this one gets no more. The order turns
    by one entry every round and is reversed every other round, so that nothing always runs first or always behind the
    same neighbour. A short entry's sample is made of several calls, and a slow entry sits out two rounds of three, so
    that it does not eat the others' budget. `on_round` gets the share of the budget that is spent, 0 to 1;
    `on_call` the name of every entry before it is measured.
    """
    begin = clock()
    names = list(calls)
    if not names:
        return {}

    def measure(name: str, count: int) -> float:
        if on_call is not None:
            on_call(name)
        return timer.measure(calls[name], count)

    repeats, lasts, far_slower = {}, {}, set()
    limit = math.inf
    for name in sorted(names, key=lambda name: name != against):
        estimate = measure(name, 1)
        for _ in range(timer.warm_up if estimate < LONG_S else timer.long_warm_up):
            estimate = measure(name, 1)
        if name == against:
            limit = FAR_SLOWER * estimate
        repeats[name] = min(MAX_CALLS, max(1, math.ceil(MIN_SAMPLE_S / max(estimate, 1e-9))))
        if estimate > limit:
            far_slower.add(name)
            repeats[name] = 1
        lasts[name] = estimate * repeats[name]
    typical = statistics.median(lasts.values())
    every = {name: SLOW_EVERY if lasts[name] > SLOW * typical else 1 for name in names}
    few = far_slower | {name for name in names if lasts[name] * min_rounds > budget_s}
    wanted = {name: min(FEW, min_rounds) if name in few else min_rounds for name in names}

    times: dict[str, Times] = {name: [] for name in names}
    for round_index in range(max_rounds):
        turn = round_index % len(names)
        order = names[turn:] + names[:turn]
        for name in reversed(order) if round_index % 2 else order:
            is_done = name in far_slower and samples(times[name]) >= wanted[name]
            if round_index % every[name] == 0 and not is_done:
                times[name].append(measure(name, repeats[name]))
            else:
                times[name].append(None)
        spent = clock() - begin
        enough = all(samples(times[name]) >= wanted[name] for name in names)
        if on_round is not None:
            on_round(min(1.0, spent / budget_s) if budget_s > 0 else 1.0)
        if enough and spent >= budget_s:
            break
    return times


def samples(times: Times) -> int:
    """In how many rounds an entry was measured."""
    return sum(time is not None for time in times)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The 20th, 50th and 80th percentile over the rounds."""

    p20: float
    p50: float
    p80: float


def spread(values: Sequence[float | None]) -> Spread | None:
    """The percentiles of the values that exist, interpolated; None when there is none."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    p20, p50, p80 = (float(q) for q in np.quantile(present, (0.2, 0.5, 0.8)))
    return Spread(p20=p20, p50=p50, p80=p80)


def ratios(numerator: Times, denominator: Times) -> Spread | None:
    """The percentiles of numerator / denominator over the rounds in which both were measured."""
    pairs = zip(numerator, denominator, strict=True)
    return spread([a / b for a, b in pairs if a is not None and b is not None])
