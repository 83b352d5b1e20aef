"""The files of a training run: replaced atomically, or written line by line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_triton import files
from moe_triton.files import reason
from moe_triton.training.errors import TrainingError


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """`moe_triton.files.replace_file`, but raises TrainingError naming the file."""
    try:
        files.replace_file(path, chunks)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {reason(error)}; what was there before is intact") from error


class MetricsFile:
    """A run's metrics: one JSON object per line and step, flushed as it is written.

    Opening it cuts the file back to the lines of the first `steps` steps, so that a resumed run has one line per step.
    Raises TrainingError naming the file: lines missing, or the disk full.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
        try:
            self.file = open(path, "ab+")  # noqa: SIM115 (closed by __exit__)
            self.file.truncate(self.end_of(steps))
        except OSError as error:
            raise TrainingError(f"cannot write {path}: {reason(error)}") from error

    def end_of(self, steps: int) -> int:
        """The position after the line of step `steps`."""
        self.file.seek(0)
        end = 0
        for step in range(1, steps + 1):
            line = self.file.readline()
            if step_of(line) != step:
                raise TrainingError(
                    f"{self.path}: line {step} is not step {step}, but the checkpoint is of step {steps}"
                )
            end += len(line)
        return end

    def write(self, record: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {reason(error)}; the last checkpoint is intact") from error

    def sync(self) -> None:
        """Forces the lines to disk, so that a checkpoint is never ahead of them."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {reason(error)}; the last checkpoint is intact") from error

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.file.close()
        except OSError as error:  # bytes that a full disk refused a second time
            raise TrainingError(f"cannot write {self.path}: {reason(error)}; the last checkpoint is intact") from error


def step_of(line: bytes) -> int | None:
    """The step that a line of metrics is about; None for a line that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file."""
    with open(path, "rb") as file:
        return [json.loads(line) for line in file]
