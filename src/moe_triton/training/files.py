"""The files of a training run: replaced atomically, or written line by line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_triton import files
from moe_triton.files import reason
from moe_triton.training.errors import TrainingError

LOCK = ".lock"  # of a run's directory
INTACT = "; the last checkpoint is intact"


@contextlib.contextmanager
def writing(path: Path, hint: str = "") -> Iterator[None]:
    """Turn an OSError inside into a TrainingError that names the file."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {reason(error)}{hint}") from error


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Call `moe_triton.files.replace_file`; raise TrainingError naming the file."""
    with writing(path, "; what was there before is intact"):
        files.replace_file(path, chunks)


@contextlib.contextmanager
def locked_directory(out: Path) -> Iterator[None]:
    """Hold the directory of a run for this process alone. Raises TrainingError where another process uses it."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(files.locked(out / LOCK))
        except files.Locked as holder:
            raise TrainingError(f"--out: {holder} is training in {out}; name another directory") from None
        except OSError as error:
            raise TrainingError(f"--out: cannot write to {out}: {reason(error)}") from error
        yield


class MetricsFile:
    """A run's metrics: one JSON object per line and step, flushed as it is written.

    Opening it cuts the file back to the lines of the first `steps` steps, so that a resumed run has one line per step.
    `fault` says what is wrong with a record of an earlier step, or None. Raises TrainingError naming the file: lines
    missing or wrong, or the disk full.
    """

    def __init__(
        self, path: Path, steps: int, fault: Callable[[dict[str, Any]], str | None] = lambda record: None
    ) -> None:
        self.path, self.fault = path, fault
        with writing(path):
            self.file = open(path, "ab+")  # noqa: SIM115 (closed by __exit__)
            self.file.truncate(self.end_of(steps))

    def end_of(self, steps: int) -> int:
        """Return the position after the line of step `steps`."""
        self.file.seek(0)
        end = 0
        for step in range(1, steps + 1):
            line = self.file.readline()
            record = record_of(line)
            if record is None or record.get("step") != step:
                raise TrainingError(
                    f"{self.path}: line {step} is not step {step}, but the checkpoint is of step {steps}"
                )
            if (wrong := self.fault(record)) is not None:
                raise TrainingError(f"{self.path}: line {step}: {wrong}")
            end += len(line)
        return end

    def write(self, record: dict[str, Any]) -> None:
        with writing(self.path, INTACT):
            self.file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self.file.flush()

    def sync(self) -> None:
        """Force the lines to disk, so that a checkpoint is never ahead of them."""
        with writing(self.path, INTACT):
            os.fsync(self.file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self.path, INTACT):  # a full disk refuses the same bytes a second time
            self.file.close()


def record_of(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of metrics; None for a line that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records of a metrics file."""
    with open(path, "rb") as file:
        return [json.loads(line) for line in file]
