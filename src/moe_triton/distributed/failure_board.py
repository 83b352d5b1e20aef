"""Failure detection: find out which rank failed, and why.

Every rank counts the collectives that it issues on each group. A rank that fails writes a report with its counts into
the store of the default group. A rank that waits for long reads the reports and looks at the processes of its machine.
So all ranks know of a failure within moments, in whichever group it happened, and a run without failures pays nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from moe_triton.distributed.groups import Group

T = TypeVar("T")
Identity = tuple[int, int, int]  # hash of the host's name, process id, its start in clock ticks (0 where unknown)

FAILURE_GRACE_S = 3.0  # how long a failed rank waits for the other ranks' reports
logger = logging.getLogger("moe_triton")


def identity() -> Identity:
    """Identify this process by three numbers, so that the other ranks can check whether it runs."""
    return _host(), os.getpid(), _start_time(os.getpid())


@cache
def _host() -> int:
    return int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7])


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (the state) on; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold anything


def _start_time(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def state_of(who: Identity) -> str:
    """ "dead", "stopped", or "" for a process that runs, or of which nothing can be known from this machine."""
    host, pid, started = who
    if host != _host() or not Path("/proc/self/stat").exists():
        return ""
    fields = _stat(pid)
    if not fields or fields[0] in "ZX" or int(fields[19]) != started:
        return "dead"
    return "stopped" if fields[0] in "Tt" else ""


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """What a rank that failed writes for the other ranks.

    where     rank, layer and phase
    cause     an exception of its own, or the missing ranks; empty while that is being found out
    issued    the collectives that it had issued, by the name of the group, for every group that it is in
    """

    rank: int
    where: str
    cause: str
    issued: dict[str, int]


@dataclass
class FailureBoard:
    """What this rank knows of the other ranks of one default group, and the store that holds the failure reports.

    issued        collectives issued here, by the name of the group
    handled       reports with fewer collectives are old: a later one succeeded, or this rank failed with the others
    identities    of global ranks
    identified    groups whose members know each other's identities
    agreed        (group, fingerprint) of what has been compared
    reports       as read so far
    store_failed  the store did not answer, and is not asked again while a cause is sought
    """

    store: Any
    issued: Counter[str] = field(default_factory=Counter)
    handled: dict[str, int] = field(default_factory=dict)
    identities: dict[int, Identity] = field(default_factory=dict)
    identified: set[str] = field(default_factory=set)
    agreed: set[tuple[str, int]] = field(default_factory=set)
    reports: list[FailureReport] = field(default_factory=list)
    store_failed: bool = False

    def report(self, where: str, cause: str = "") -> None:
        """Write a failure report of this rank for the other ranks."""
        failure = FailureReport(rank=dist.get_rank(), where=where, cause=cause, issued=self._counts())
        entry = json.dumps(asdict(failure))
        self._ask(lambda: self.store.set(f"moe_triton/failure/{self.store.add('moe_triton/failures', 1)}", entry))

    def mark_handled(self) -> None:
        """Mark every failure reported so far as handled: the ranks may catch the error and go on together."""
        self.handled = {name: number + 1 for name, number in self._counts().items()}
        self.store_failed = False

    def cannot_complete(self, group: Group, number: int) -> bool:
        """Return whether collective `number` of the group can no longer complete, as far as this rank knows."""
        if self.dead(group.ranks):
            return True
        self.store_failed = False
        self._read()
        return any(failure.issued[group.name] <= number for failure in self._recent(group))

    def find_cause(self, group: Group, number: int) -> str:
        """Say why collective `number` failed. Waits for the reports of the group's other ranks."""
        others = {rank for rank in group.ranks if rank != dist.get_rank()}
        deadline = time.monotonic() + FAILURE_GRACE_S
        while True:
            dead = self.dead(self.identities)  # of any group: it may be why the others failed in this one
            answers = self._read()
            failures = self._recent(group)
            silent = others - {failure.rank for failure in failures}
            reported = {
                failure.rank for failure in self.reports
            } - silent  # they failed before they ended, and reported it
            if died := [f"rank {rank} has died" for rank in dead if rank not in reported]:
                stopped = [rank for rank in sorted(silent) if self._state(rank) == "stopped"]
                return ", ".join(died + self._do_not_answer(stopped))
            failed_here = [failure for failure in failures if failure.issued[group.name] <= number]
            if causes := [failure.cause for failure in failed_here if failure.cause]:
                return ", ".join(dict.fromkeys(causes))
            waiting = bool(silent) or bool(failed_here)
            if not answers or not waiting or time.monotonic() > deadline + bool(failed_here):
                break
            time.sleep(0.02)
        if not answers:
            silent = {rank for rank in others if self._state(rank)}
        found = self._do_not_answer(sorted(silent))
        if not answers:
            found.append("the store does not answer: the process that serves it has ended or is stuck")
        return ", ".join(found) or "no rank is missing"

    def dead(self, ranks: Iterable[int]) -> list[int]:
        """Return those of the ranks whose processes ran on this machine and have ended."""
        return [rank for rank in ranks if self._state(rank) == "dead"]

    def _recent(self, group: Group) -> list[FailureReport]:
        """Return the latest report of each other rank of the group, unless it is old or older than the group."""
        latest = {failure.rank: failure for failure in self.reports if failure.rank in group.ranks}
        latest.pop(dist.get_rank(), None)
        oldest = self.handled.get(group.name, 0)
        return [failure for failure in latest.values() if failure.issued.get(group.name, -1) >= oldest]

    def _counts(self) -> dict[str, int]:
        """Return the number of collectives issued, for every group that this rank is in."""
        return {name: self.issued[name] for name in dist.distributed_c10d._world.pg_names.values()}

    def _read(self) -> bool:
        """Read the reports written since the last call; False where the store does not answer."""
        count = self._ask(lambda: self.store.add("moe_triton/failures", 0))
        while count is not None and len(self.reports) < count:
            text = self._ask(lambda: self.store.get(f"moe_triton/failure/{len(self.reports) + 1}"))
            if text is None:
                return False
            self.reports.append(FailureReport(**json.loads(text)))
        return count is not None

    def _ask(self, question: Callable[[], T], timeout_s: float = 2.0) -> T | None:
        """Return the store's answer; None where the process that serves it has ended, or does not answer."""
        answers: list[T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # torch's DistError
                answers.append(question())

        if not self.store_failed:
            thread = threading.Thread(target=ask, daemon=True)  # a client of a stopped server blocks forever
            thread.start()
            thread.join(timeout_s)
        self.store_failed = not answers
        return answers[0] if answers else None

    def _state(self, rank: int) -> str:
        return state_of(self.identities[rank]) if rank in self.identities else ""

    def _do_not_answer(self, ranks: Iterable[int]) -> list[str]:
        states = {rank: self._state(rank) for rank in ranks}
        return [
            f"rank {r} does not answer" + (f" (its process is {state})" if state else "") for r, state in states.items()
        ]


_boards: WeakKeyDictionary[dist.ProcessGroup, FailureBoard] = WeakKeyDictionary()


def failure_board() -> FailureBoard:
    """Return the one of the present default group."""
    world = dist.group.WORLD
    assert world is not None
    if world not in _boards:
        _boards[world] = FailureBoard(store=dist.distributed_c10d._get_default_store())
    return _boards[world]


def explain_termination() -> None:
    """Log on SIGTERM which ranks have died, then end as usual; otherwise the process exits silently.

    For programs under a launcher such as torchrun, which ends the other ranks a moment after one has died. Call it in
    the main thread.
    """
    before = signal.getsignal(signal.SIGTERM)

    def explain(number: int, frame: FrameType | None) -> None:
        if dist.is_available() and dist.is_initialized():
            board = failure_board()
            dead = ", ".join(f"rank {rank} has died" for rank in board.dead(board.identities))
            logger.error("rank %d: terminated: %s", dist.get_rank(), dead or "no rank is known to have died")
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, explain)
