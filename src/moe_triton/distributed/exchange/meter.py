"""Counts the rows that an exchange brings, and the time that it takes, without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_triton.torch_internals import recomputing


@dataclass
class ExchangeMeter:
    """Counts the rows that come to this rank's experts, and the time that their exchange takes, until it is read.

    The time is that of forward and backward in which neither the local experts nor the shared expert compute: what the
    exchange adds to a step, waiting for later ranks included. Recomputed forwards take time too; their rows do not
    count again. On a GPU the time is that between events of the current stream, on a CPU the host's.
    """

    rows: Tensor | None = None  # [] int64, on the device
    seconds: float = 0.0  # of what is known to have ended
    pending: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)

    def count(self, rows: Tensor) -> None:
        """Add a number of rows [] on the device, unless a forward is recomputed."""
        if not recomputing():
            self.rows = rows.long() if self.rows is None else self.rows + rows

    @contextmanager
    def measuring(self, device: torch.device) -> Iterator[None]:
        """Add the time of what runs inside."""
        with self._timing(device, 1):
            yield

    @contextmanager
    def excluding(self, device: torch.device) -> Iterator[None]:
        """Subtract the time of what runs inside, which is inside what is measured."""
        with self._timing(device, -1):
            yield

    @contextmanager
    def _timing(self, device: torch.device, sign: int) -> Iterator[None]:
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self.seconds += sign * (time.perf_counter() - start)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(torch.cuda.current_stream(device))
        yield
        last.record(torch.cuda.current_stream(device))
        self.pending.append((sign, first, last))
        while self.pending and self.pending[0][2].query():  # so that only events of running work are held
            self._add_oldest()

    def _add_oldest(self) -> None:
        sign, first, last = self.pending.popleft()
        self.seconds += sign * first.elapsed_time(last) / 1e3

    def read(self) -> tuple[int, float]:
        """Return rows and seconds since the last `reset`; waits for the device."""
        while self.pending:
            self.pending[0][2].synchronize()
            self._add_oldest()
        return 0 if self.rows is None else int(self.rows), max(self.seconds, 0.0)

    def __getstate__(self) -> dict[str, object]:
        self.read()  # events can be neither copied nor pickled
        return dict(vars(self))
