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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from moe_triton.distributed.groups import Group
from moe_triton.torch_internals import default_store, group_names

T = TypeVar("T")
Identity = tuple[int, int, int]  # hash of where its process id is valid, process id, its start in clock ticks

FAILURE_GRACE_S = 3.0  # how long a failed rank waits for the other ranks' reports
logger = logging.getLogger("moe_triton")


def identity() -> Identity:
    """Identify this process by three numbers, so that the other ranks can check whether it runs."""
    return _pid_space(), os.getpid(), _start_time(os.getpid())


@cache
def _pid_space() -> int:
    """Hash where a process id is valid and visible in /proc: machine, boot and namespaces. Random where unknown."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            raise OSError("/proc shows another PID namespace than this process's own")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "time")]
        place = repr((socket.gethostname(), boot, namespaces)).encode()
    except OSError:  # then no other rank looks for this process, and this one for none
        place = os.urandom(32)
    return int.from_bytes(hashlib.sha256(place).digest()[:7])


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (the state) on; empty when it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold anything


def _start_time(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def state_of(who: Identity) -> str:
    """Return "dead", "stopped", or "" for a process that runs or that cannot be seen from here."""
    pid_space, pid, started = who
    if pid_space != _pid_space():
        return ""
    if fields := _stat(pid):
        if fields[0] in "ZX" or int(fields[19]) != started:
            return "dead"
        return "stopped" if fields[0] in "Tt" else ""
    try:
        os.kill(pid, 0)  # its file may be hidden, or this process may have no file descriptor left to read it
    except ProcessLookupError:
        return "dead"
    except OSError:
        pass
    return ""


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """What a rank that failed writes for the other ranks.

    place     layer and phase
    cause     an exception of its own, or the missing ranks; None while it is sought, "" where none was found
    issued    the collectives that it had issued, by the name of the group, for every group that it is in
    """

    rank: int
    place: str
    cause: str | None
    issued: dict[str, int]


@dataclass
class FailureBoard:
    """What this rank knows of the other ranks of one default group, and the store that holds the failure reports.

    issued        collectives issued here, by the name of the group
    handled       reports with fewer collectives are old: a later one succeeded, or this rank failed with the others
    identities    of global ranks
    identified    groups whose members know each other's identities
    agreed        fingerprints that were compared, by the name of the group
    num_layers    MoE layers made so far, by the ranks that make them
    reports       as read so far
    store_failed  the store did not answer, and is not asked again while a cause is sought
    """

    store: Any
    issued: Counter[str] = field(default_factory=Counter)
    handled: dict[str, int] = field(default_factory=dict)
    identities: dict[int, Identity] = field(default_factory=dict)
    identified: set[str] = field(default_factory=set)
    agreed: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    num_layers: Counter[tuple[int, ...]] = field(default_factory=Counter)
    reports: list[FailureReport] = field(default_factory=list)
    store_failed: bool = False

    def report(self, place: str, cause: str | None = None) -> None:
        """Write a failure report of this rank for the other ranks."""
        report = FailureReport(rank=dist.get_rank(), place=place, cause=cause, issued=self._counts())
        entry = json.dumps(asdict(report))
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
        return any(report.issued[group.name] <= number for report in self._recent(group))

    def find_cause(self, group: Group, number: int) -> str:
        """Say why collective `number` failed; "" where no cause is found. Waits for the other ranks' reports."""
        others = {rank for rank in group.ranks if rank != dist.get_rank()}
        deadline = time.monotonic() + FAILURE_GRACE_S
        while True:
            dead = self.dead(self.identities)  # of any group: it may be why the others failed in this one
            answers = self._read()
            reports = self._recent(group)
            silent = others - {report.rank for report in reports}
            reported = {report.rank for report in self.reports} - silent  # they ended after they had reported a failure
            if died := [f"rank {rank} has died" for rank in dead if rank not in reported]:
                stopped = [rank for rank in sorted(silent) if self._state(rank) == "stopped"]
                return ", ".join(died + self._do_not_answer(stopped))
            failed_here = [report for report in reports if report.issued[group.name] <= number]
            if causes := [report.cause for report in failed_here if report.cause]:
                return ", ".join(dict.fromkeys(causes))
            sought = any(report.cause is None for report in failed_here)
            if not answers or not (silent or sought) or time.monotonic() > deadline + sought:
                break
            time.sleep(0.02)
        if answers or silent != others:  # a rank that serves the store may end once it has reported
            return ", ".join(self._do_not_answer(sorted(silent)))
        found = self._do_not_answer(sorted(rank for rank in silent if self._state(rank)))
        found.append("the store does not answer: the process that serves it has ended or is stuck")
        return ", ".join(found)

    def describe_places(self, group: Group, here: str) -> str:
        """Say where each other rank of the group waits, where no cause is found and they do not all wait `here`."""
        ranks_at: dict[str, list[int]] = {}
        for report in sorted(self._recent(group), key=lambda report: (report.place == here, report.rank)):
            ranks_at.setdefault(report.place, []).append(report.rank)
        if set(ranks_at) <= {here}:
            return "no rank is missing, all wait here"
        return ", ".join(
            f"rank {ranks[0]} waits in {place}" if len(ranks) == 1 else f"ranks {_listed(ranks)} wait in {place}"
            for place, ranks in ranks_at.items()
        )

    def dead(self, ranks: Iterable[int]) -> list[int]:
        """Return those of the ranks whose processes ran on this machine and have ended."""
        return [rank for rank in ranks if self._state(rank) == "dead"]

    def _recent(self, group: Group) -> list[FailureReport]:
        """Return the latest report of each other rank of the group, unless it is old or older than the group."""
        latest = {report.rank: report for report in self.reports if report.rank in group.ranks}
        latest.pop(dist.get_rank(), None)
        oldest = self.handled.get(group.name, 0)
        return [report for report in latest.values() if report.issued.get(group.name, -1) >= oldest]

    def _counts(self) -> dict[str, int]:
        """Return the number of collectives issued, for every group that this rank is in."""
        return {name: self.issued[name] for name in group_names()}

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


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown}, ... ({len(ranks)} ranks)"


_boards: WeakKeyDictionary[dist.ProcessGroup, FailureBoard] = WeakKeyDictionary()


def failure_board() -> FailureBoard:
    """Return the one of the present default group."""
    world = dist.group.WORLD
    assert world is not None
    if world not in _boards:
        _boards[world] = FailureBoard(store=default_store())
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
