"""What is going on, on stderr: a bar with the time left in a terminal, else a line whenever something new begins."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any


def duration(seconds: float) -> str:
    """About how long, in the unit that suits."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class StepDisplay:
    """Shows steps; a context manager that gives `step(what, share, who="")`, share 0 to 1 of the present cell.

    `who` is what runs within the step: always in the bar, and without a terminal once per step, when it first runs.

    cells     how many cells there are; 1 for work that is not made of cells
    cell_s    about how long one takes, until one has been timed
    """

    def __init__(
        self, cells: int = 1, cell_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.cells, self.cell_s, self.clock = cells, cell_s, clock
        self.done = 0
        self.begun = clock()
        self.last = ""
        self.seen: set[str] = set()  # who ran in the last step
        self.bar: Any = None

    def __enter__(self) -> Callable[..., None]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(file=sys.stderr)
        if console.is_terminal:
            what, left = TextColumn("{task.description}"), TextColumn("{task.fields[left]}")
            self.bar = Progress(what, BarColumn(), TimeElapsedColumn(), left, console=console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=float(self.cells), left="")
        return self.step

    def left_s(self, share: float) -> float | None:
        """Seconds left: the cells that are not done at the pace of those that are; None while nothing is known."""
        pace = (self.clock() - self.begun) / self.done if self.done else self.cell_s
        return None if pace is None else pace * max(0.0, self.cells - self.done - share)

    def left(self, share: float) -> str:
        seconds = self.left_s(share)
        return "" if seconds is None else f"about {duration(seconds)} left"

    def step(self, what: str, share: float, who: str = "") -> None:
        if what != self.last:
            self.seen.clear()
        is_new = what != self.last or who not in self.seen
        self.last = what
        self.seen.add(who)
        text = f"{what}: {who}" if who else what
        if self.bar is not None:
            self.bar.update(self.task, description=text, completed=self.done + share, left=self.left(share))
        elif is_new:
            place = f"[{min(self.done + 1, self.cells)}/{self.cells}] " if self.cells > 1 else ""
            left = self.left(share) if self.cells > 1 else ""
            print(f"{place}{text}{f' ({left})' if left else ''}", file=sys.stderr, flush=True)

    def finish_cell(self) -> None:
        self.done += 1

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
