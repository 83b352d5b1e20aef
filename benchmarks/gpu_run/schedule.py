"""What runs when: steps in phases, each with its share of the time that is left, each in a process of its own.

Nothing here knows of GPUs or of processes: a `Launcher` starts the steps and reports what they found, and the clock is
an argument. So a test can run the whole schedule in no time, and end it wherever it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Found = dict[str, Any]  # of an item: "status", "note", "seconds", and its figures
GOOD = ("ok", "skipped")
NOT_RUN = {"status": "not run", "note": "its turn never came", "seconds": 0.0}
RESERVE_S = 10.0  # of the budget, for the end of the run
SECOND_TURN_S = 15.0  # with less, a process would hardly begin


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps that may run side by side: `jobs` of them at a time. seconds: its share of the time."""

    name: str
    seconds: float
    jobs: int


PHASES = (
    Phase(name="facts", seconds=20, jobs=1),
    Phase(name="build", seconds=90, jobs=15),  # 12 compile, 3 run every operation for the first time
    Phase(name="look", seconds=40, jobs=1),
    Phase(name="prove", seconds=150, jobs=14),
    Phase(name="measure", seconds=250, jobs=1),  # alone: nothing else runs on the GPU
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Items that run one after another in one process. The list of steps is in order of importance, and so are these.

    seconds    its share of the time of a phase in which one step runs at a time
    needed_by  phases before which it runs in every call, whatever is known of it: facts of the device, compilations
    """

    name: str
    phase: str
    items: Sequence[str]
    seconds: float = 1.0
    needed_by: tuple[str, ...] = ()

    @property
    def is_needed(self) -> bool:
        return bool(self.needed_by)


class Process(Protocol):
    """A step that runs."""

    def found(self) -> Sequence[tuple[str, Found | None]]:
        """What came since the last call: an item and its results, or None where it has only begun."""

    def end(self) -> str | None:
        """How the process ended: "" well, else why; None while it runs."""

    def kill(self) -> None:
        """End it, with everything that it has started."""


class Launcher(Protocol):
    def start(self, step: Step, items: Sequence[str], seconds: float) -> Process:
        """Begin these items of a step, which has `seconds` for them."""

    def wait(self, processes: Sequence[Process], seconds: float) -> None:
        """Return when one of them has something to report, or after `seconds`."""


@dataclass(kw_only=True)
class Running:
    step: Step
    process: Process
    end: float
    left: list[str]
    begun: str | None = None


@dataclass(kw_only=True)
class Run:
    """One run. known: item -> results of earlier runs, and of this one as they come; note: called with each."""

    steps: Sequence[Step]
    known: dict[str, Found]
    launcher: Launcher
    note: Callable[[str, Found], None]
    clock: Callable[[], float]
    end: float = field(default=0.0)

    def missing(self, step: Step) -> list[str]:
        return [item for item in step.items if self.known.get(item, {}).get("status") not in GOOD]

    def mark(self) -> None:
        """What is not known is "not run" until it is."""
        for step in self.steps:
            for item in step.items:
                self.known.setdefault(item, {"phase": step.phase, "step": step.name, **NOT_RUN})

    def run(self, budget_s: float) -> None:
        """Phase after phase. One that ends early leaves its time to the later ones; at its end the rest is killed."""
        self.end = self.clock() + budget_s - RESERVE_S
        wanted = [step for step in self.steps if not step.is_needed and self.missing(step)]
        phases = {step.phase for step in wanted}
        todo = [step for step in self.steps if step in wanted or not phases.isdisjoint(step.needed_by)]
        by_phase = {phase.name: [step for step in todo if step.phase == phase.name] for phase in PHASES}
        for index, phase in enumerate(PHASES):
            later = sum(other.seconds for other in PHASES[index:] if by_phase[other.name])
            if by_phase[phase.name]:
                now = self.clock()
                self.run_phase(phase, by_phase[phase.name], now + (self.end - now) * phase.seconds / later)

    def run_phase(self, phase: Phase, steps: Sequence[Step], end: float) -> None:
        """Every step in turn; of those that have shares, what did not fit into its step's gets the rest of the time."""
        self.run_steps(
            phase, [(step, list(step.items) if step.is_needed else self.missing(step)) for step in steps], end
        )
        if phase.jobs == 1 and end - self.clock() > SECOND_TURN_S:
            left = [
                (step, [item for item in self.missing(step) if self.known[item]["status"] == "not run"])
                for step in steps
            ]
            self.run_steps(phase, [(step, items) for step, items in left if items], end)

    def run_steps(self, phase: Phase, waiting: list[tuple[Step, list[str]]], end: float) -> None:
        running: list[Running] = []
        try:
            while waiting or running:
                while waiting and len(running) < phase.jobs and self.clock() < end:
                    running.append(self.start(phase, waiting, end))
                if not running:
                    break
                self.launcher.wait([r.process for r in running], max(0.0, min(r.end for r in running) - self.clock()))
                for one in list(running):
                    if self.has_ended(one):
                        running.remove(one)
                        again = self.after(one)
                        if again:
                            waiting.insert(0, (one.step, again))
        finally:
            for one in running:
                one.process.kill()

    def start(self, phase: Phase, waiting: list[tuple[Step, list[str]]], end: float) -> Running:
        """The next step; alone, it has its share of the phase, else all of it."""
        now, share = self.clock(), 1.0
        if phase.jobs == 1:
            share = waiting[0][0].seconds / sum(step.seconds for step, _ in waiting)
        step, items = waiting.pop(0)
        last = now + share * (end - now)
        return Running(step=step, process=self.launcher.start(step, items, last - now), end=last, left=items)

    def has_ended(self, one: Running) -> bool:
        """Take what it found. True when it has ended by itself, or its time is over and it was killed."""
        ended = one.process.end()
        self.take(one)
        if ended is None and self.clock() >= one.end:
            one.process.kill()
            self.take(one)
            if one.begun is not None:
                self.fail(one.step, one.begun, "out of time", f"killed at the end of the time of {one.step.name}")
                one.left.remove(one.begun)
            one.left, one.begun = [], None
            return True
        return ended is not None

    def take(self, one: Running) -> None:
        for item, found in one.process.found():
            if found is None:
                one.begun = item
            else:
                one.begun = None
                one.left.remove(item)
                self.add(one.step, item, found)

    def after(self, one: Running) -> list[str]:
        """What another process has to do after this one ended.

        One that dies takes the item that it was at with it, and no other; one that dies before its first item would do
        so again.
        """
        why = one.process.end()
        if not why or not one.left:
            return []
        if one.begun is None:
            for item in one.left:
                self.fail(one.step, item, "failed", why)
            return []
        self.fail(one.step, one.begun, "failed", why)
        one.left.remove(one.begun)
        return one.left

    def fail(self, step: Step, item: str, status: str, note: str) -> None:
        self.add(step, item, {"status": status, "note": note, "seconds": 0.0})

    def add(self, step: Step, item: str, found: Found) -> None:
        self.known[item] = {"phase": step.phase, "step": step.name, **found}
        self.note(item, self.known[item])


def bad_items(steps: Sequence[Step], known: Mapping[str, Found]) -> list[str]:
    """The items that have no good result, without those that others only need."""
    wanted = [item for step in steps if not step.is_needed for item in step.items]
    return [item for item in wanted if known.get(item, {}).get("status") not in GOOD]
