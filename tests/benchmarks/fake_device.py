"""A device that is not there: it runs steps of given lengths, on a clock that only `wait` moves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_run.schedule import Found, Process, Step  # noqa: E402

START_S = 8.0  # a process imports torch and opens the device
FOREVER = float("inf")
DIES = -1.0  # the length of an item that kills its process after a second


@dataclass(kw_only=True)
class FakeProcess:
    device: FakeDevice
    step: Step
    events: list[tuple[float, str, Found | None]]  # when, item, results (None: it begins)
    last: float
    why: str = ""
    killed: bool = False

    def found(self) -> list[tuple[str, Found | None]]:
        come = [event for event in self.events if event[0] <= self.device.now]
        self.events = self.events[len(come) :]
        return [(item, found) for _, item, found in come]

    def end(self) -> str | None:
        if self.killed:
            return "killed"
        return self.why if self.device.now >= self.last else None

    def kill(self) -> None:
        self.killed, self.events = True, [event for event in self.events if event[0] <= self.device.now]
        self.last = min(self.last, self.device.now)


@dataclass(kw_only=True)
class FakeDevice:
    """length: seconds of an item. `started` remembers every process with its begin."""

    length: Callable[[str], float]
    now: float = 0.0
    started: list[tuple[float, FakeProcess]] = field(default_factory=list)

    def start(self, step: Step, items: Sequence[str], seconds: float) -> FakeProcess:
        """As `gpu_run.worker`: items in order, while the longest one so far still fits."""
        at = self.now + START_S
        end, longest, why = at + seconds, 0.0, ""
        events: list[tuple[float, str, Found | None]] = []
        for item in items:
            if end - at < longest:
                break
            events.append((at, item, None))
            length = self.length(item)
            if length == DIES:
                at, why = at + 1.0, "the process died (signal 11): "
                break
            at, longest = at + length, max(longest, length)
            events.append((at, item, {"status": "ok", "note": "", "seconds": length}))
        process = FakeProcess(device=self, step=step, events=events, last=at, why=why)
        self.started.append((self.now, process))
        return process

    def wait(self, processes: Sequence[Process], seconds: float) -> None:
        times = [process.last for _, process in self.started if process in processes]
        times += [event[0] for _, process in self.started if process in processes for event in process.events]
        self.now = min([self.now + seconds, *(time for time in times if time > self.now)])

    def clock(self) -> float:
        return self.now

    def spans(self) -> list[tuple[str, str, float, float]]:
        """(phase, step, begin, end) of every process."""
        return [(process.step.phase, process.step.name, begin, process.last) for begin, process in self.started]
