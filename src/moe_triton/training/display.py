"""The display of a training run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10  # steps between two plain lines


def in_words(record: dict[str, Any]) -> str:
    """Return a step's metrics in a bar of 80 columns: loss, speed and, with experts, dropped share and load.

    "load 1.50x" is the largest load of any expert of any layer, as a multiple of the mean load.
    """
    words = f"loss {record['train_loss']:.3f}  {record['tokens_per_s']:,.0f} tok/s"
    if "dropped" in record:
        words += f"  drop {record['dropped']:.1%}  load {record['max_load']:.2f}x"
    return words


class Display:
    """Shows one model's steps; a context manager around its training."""

    def __init__(self, console: Console, kind: str, steps: int, done: int) -> None:
        self.console, self.kind, self.steps = console, kind, steps
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(kind, total=steps, completed=done, words="")

    def update(self, record: dict[str, Any]) -> None:
        """Show the metrics of one finished step."""
        step, words = record["step"], in_words(record)
        self.progress.update(self.task, completed=step, words=words)
        if self.progress.disable and (step == 1 or step % PLAIN_EVERY == 0 or step == self.steps):
            self.console.print(f"{self.kind} step {step}/{self.steps}  {words}", highlight=False, soft_wrap=True)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
