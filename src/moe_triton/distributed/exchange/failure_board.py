"""Failure detection: find out which rank failed, and why.

A rank that fails writes a report into the store of the default group, and any report ends what the other ranks do, in
whichever group it happened. A rank that waits for long reads the reports and looks at the processes of its machine.
Where waits only queue work on a device, a thread does so in its place, and aborts the groups.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist

from moe_triton.distributed.exchange.processes import Identity, state_of
from moe_triton.distributed.exchange.schedule import Schedule
from moe_triton.distributed.groups import Group
from moe_triton.torch_internals import abort_groups, default_group, default_store, timeout_of

T = TypeVar("T")

FAILURE_GRACE_S = 3.0  # how long a failed rank waits for the other ranks' reports
WATCH_INTERVAL_S = 1.0  # between two looks of the thread that watches queued waits
STALL_FRACTION = 0.8  # of a group's time-out, after which a queued wait has failed: before torch's watchdog ends us
MOST_DIFFERENCES = 6  # that a message names
logger = logging.getLogger("moe_triton")


class Event(Protocol):
    """What torch.cuda.Event has."""

    def record(self) -> object: ...

    def query(self) -> bool: ...


@dataclass(kw_only=True)
class QueuedWait:
    """The last wait for a collective of a group that was queued on a device.

    place    layer and phase
    event    recorded behind it
    since    when, in seconds of the monotonic clock
    limit_s  how long it may take
    """

    group: Group
    place: tuple[str, str]
    event: Event
    since: float
    limit_s: float


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """What a rank that failed writes for the other ranks.

    number   of this failure among the rank's own, from 1
    place    layer and phase
    cause    an exception of its own, or the missing ranks; None while it is sought, "" where none was found
    waits    whether it waits there, or has got no further than there
    differs  whether it has found there that the ranks differ, as all ranks of its group do
    doing    what it was about to do, by name
    """

    rank: int
    number: int
    place: str
    cause: str | None
    waits: bool
    differs: bool
    doing: dict[str, str]


@dataclass
class FailureBoard:
    """What this rank knows of the other ranks of one default group, and the store that holds the failure reports.

    failures      how often this rank has failed: one that has failed no more often has failed together with it
    step          the optimizer step, from 1, by the calls of `reduce_gradients` or `clip_grad_norm_`
    schedules     what this rank has done on each group, by its name
    comparisons   of what the ranks did in the last step, not read yet
    side_groups   of gloo, for comparisons in every call, by the name of the group
    doing         what it is about to do, by name
    identities    of global ranks
    identified    groups whose members know each other's identities
    num_layers    MoE layers made so far, by the ranks that make them
    queued        by the name of the group
    watcher       the thread that looks at them
    ended         why the thread has aborted the groups
    reports       as read so far
    store_failed  the store did not answer, and is not asked again while a cause is sought
    """

    store: Any
    rank: int
    failures: int = 0
    step: int = 1
    schedules: dict[str, Schedule] = field(default_factory=dict)
    comparisons: list[Callable[[], None]] = field(default_factory=list)
    side_groups: dict[str, Group] = field(default_factory=dict)
    doing: Mapping[str, object] = field(default_factory=dict)
    identities: dict[int, Identity] = field(default_factory=dict)
    identified: set[str] = field(default_factory=set)
    num_layers: Counter[tuple[int, ...]] = field(default_factory=Counter)
    queued: dict[str, QueuedWait] = field(default_factory=dict)
    watcher: threading.Thread | None = None
    ended: str = ""
    reports: list[FailureReport] = field(default_factory=list)
    store_failed: bool = False
    reading: threading.Lock = field(default_factory=threading.Lock)

    def report(
        self,
        place: str,
        cause: str | None = None,
        *,
        waits: bool = True,
        differs: bool = False,
        number: int | None = None,
    ) -> None:
        """Write a failure report of this rank for the other ranks; by default of its next failure."""
        doing = {name: repr(value) for name, value in self.doing.items()}
        number = self.failures + 1 if number is None else number
        report = FailureReport(
            rank=self.rank, number=number, place=place, cause=cause, waits=waits, differs=differs, doing=doing
        )
        entry = json.dumps(asdict(report))
        self._ask(lambda: self.store.set(f"moe_triton/failure/{self.store.add('moe_triton/failures', 1)}", entry))

    def mark_handled(self) -> None:
        """Count this rank's failure: the ranks that have failed together may catch the error and go on together."""
        self.failures += 1
        self.schedules.clear()
        self.comparisons.clear()
        self.store_failed = False

    def cannot_complete(self, group: Group, place: str) -> bool:
        """Return whether the collective at `place`, or any other one, can no longer complete, as far as is known."""
        if self.dead(group.ranks):
            return True
        self.store_failed = False
        self._read()
        # a rank that has found a difference in this very collective has completed it
        return any(not (report.differs and report.place == place) for report in self._open_reports())

    def explain(self, group: Group, place: str, *, waits: bool = True) -> str:
        """Report that this rank cannot go on, and say why, as far as the ranks find out together."""
        number = self.failures + 1
        self.report(place, waits=waits, number=number)
        cause = self.find_cause(group)
        self.report(place, cause, waits=waits, number=number)
        return cause or self.describe_places(group, place)

    def find_cause(self, group: Group) -> str:
        """Say why a collective of the group failed; "" where no cause is found. Waits for the other ranks' reports."""
        others = {rank for rank in group.ranks if rank != self.rank}
        deadline = time.monotonic() + FAILURE_GRACE_S
        while True:
            dead = self.dead(self.identities)  # of any group: it may be why the others failed in this one
            answers = self._read()
            reports = self._open_reports()
            silent = others - {report.rank for report in reports}
            reported = {report.rank for report in self.reports} - silent  # they ended after they had reported a failure
            if died := [f"rank {rank} has died" for rank in dead if rank not in reported]:
                stopped = [rank for rank in sorted(silent) if self._state(rank) == "stopped"]
                return ", ".join(died + self._do_not_answer(stopped))
            if causes := [report.cause for report in reports if report.cause]:
                return ", ".join(dict.fromkeys(causes))
            sought = any(report.cause is None for report in reports)
            if not answers or not (silent or sought) or time.monotonic() > deadline + sought:
                break
            time.sleep(0.02)
        if answers or silent != others:  # a rank that serves the store may end once it has reported
            return ", ".join(self._do_not_answer(sorted(silent)))
        found = self._do_not_answer(sorted(rank for rank in silent if self._state(rank)))
        found.append("the store does not answer: the process that serves it has ended or is stuck")
        return ", ".join(found)

    def find_differences(self, group: Group, place: str) -> str:
        """Say in what the ranks of the group differ, which all of them are asking. Waits for their reports."""
        self.report(place, differs=True)
        deadline = time.monotonic() + FAILURE_GRACE_S
        while self._read() and time.monotonic() < deadline:
            if {report.rank for report in self._open_reports()}.issuperset(set(group.ranks) - {self.rank}):
                break
            time.sleep(0.01)
        found = self._differences(group) or "what they did before"
        self.report(place, f"rank {self.rank}, {place}: the ranks differ in {found}", differs=True)
        return f"the ranks of the group differ in {found}"

    def describe_places(self, group: Group, here: str) -> str:
        """Say where each other rank of the group waits, where no cause is found and they do not all wait `here`."""
        ranks_at: dict[tuple[str, bool], list[int]] = {}
        reports = [report for report in self._open_reports() if report.rank in group.ranks]
        for report in sorted(reports, key=lambda report: (report.place == here, report.rank)):
            ranks_at.setdefault((report.place, report.waits), []).append(report.rank)
        if set(ranks_at) <= {(here, True)}:
            found = self._differences(group)
            return f"the ranks of the group differ in {found}" if found else "no rank is missing, all wait here"
        return ", ".join(
            f"{_listed(ranks)} {_verb(ranks, waits)} {place}" for (place, waits), ranks in ranks_at.items()
        )

    def dead(self, ranks: Iterable[int]) -> list[int]:
        """Return those of the ranks whose processes ran on this machine and have ended."""
        return [rank for rank in list(ranks) if self._state(rank) == "dead"]

    def queue(self, group: Group, place: tuple[str, str], tensor: torch.Tensor) -> None:
        """Let the thread watch that a wait which was queued on the tensor's device now is over in time."""
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # an event would become part of the graph
        last, now = self.queued.get(group.name), time.monotonic()
        if last is None:
            limit_s = STALL_FRACTION * _timeout_s(group, tensor.device)
            last = QueuedWait(group=group, place=place, event=device_event(tensor.device), since=now, limit_s=limit_s)
            self.queued[group.name] = last
        last.place, last.since = place, now
        last.event.record()
        if self.watcher is None:
            self.watcher = threading.Thread(target=_watch, args=(ref(self),), name="moe_triton failures", daemon=True)
            self.watcher.start()

    def look(self) -> None:
        """Find out whether a queued wait will never be over, or another rank has failed; then end what runs here.

        The device is asked only where there is a reason: a query may disturb the capture of a CUDA graph.
        """
        self.store_failed = False
        self._read()
        now, waits = time.monotonic(), list(self.queued.values())
        dead = set(self.dead(self.identities))
        late = [
            wait
            for wait in waits
            if now - wait.since > (FAILURE_GRACE_S / 3 if dead.intersection(wait.group.ranks) else wait.limit_s)
            and not wait.event.query()
        ]
        if not late and not (waits and self._open_reports()):
            return
        stuck = late or [wait for wait in waits if not wait.event.query()]
        last, failures = max(stuck or waits, key=lambda wait: wait.since), self.failures
        place = ", ".join(last.place)
        reason = self.explain(last.group, place, waits=bool(stuck))
        if self.failures > failures:
            return  # the rank has met the failure itself meanwhile, and may go on
        logger.error("rank %d, %s: %s; the process groups are aborted", self.rank, place, reason)
        self.stay()
        self.ended = reason
        _aborted[:] = [self]
        abort_groups()

    def stay(self) -> None:
        """Where a thread watches, wait until the threads of the other ranks have seen that this one has failed.

        A process that ends first would count as dead, and may take the store with it.
        """
        deadline = time.monotonic() + FAILURE_GRACE_S
        while self.watcher is not None and time.monotonic() < deadline and self._read():
            reported = {report.rank for report in self._open_reports()}
            if all(rank in reported or self._state(rank) for rank in list(self.identities) if rank != self.rank):
                return
            time.sleep(0.02)

    def _open_reports(self) -> list[FailureReport]:
        """Return the latest report of each other rank that has failed more often than this one."""
        latest = {report.rank: report for report in self.reports if report.rank != self.rank}
        return [report for report in latest.values() if report.number > self.failures]

    def _differences(self, group: Group) -> str:
        mine = {name: repr(value) for name, value in self.doing.items()}
        found = [
            f"{name}: {mine.get(name)} here, {report.doing.get(name)} on rank {report.rank}"
            for report in sorted(self._open_reports(), key=lambda report: report.rank)
            if report.rank in group.ranks
            for name in dict.fromkeys((*mine, *report.doing))
            if report.doing.get(name) != mine.get(name)
        ]
        return "; ".join(found[:MOST_DIFFERENCES])

    def _read(self) -> bool:
        """Read the reports written since the last call; False where the store does not answer."""
        with self.reading:
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
    more = "" if len(ranks) <= 8 else f", ... ({len(ranks)} ranks)"
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _verb(ranks: list[int], waits: bool) -> str:
    if waits:
        return "wait in" if len(ranks) > 1 else "waits in"
    return "have done nothing since" if len(ranks) > 1 else "has done nothing since"


def device_event(device: torch.device) -> Event:
    """Return an event of the device, to be recorded on its current stream."""
    return torch.cuda.Event()


def _timeout_s(group: Group, device: torch.device) -> float:
    assert group.handle is not None
    timeout = timeout_of(group.handle, device)
    return (dist.default_pg_timeout if timeout is None else timeout).total_seconds()


def _watch(board: ref[FailureBoard]) -> None:
    """Look every now and then, until the job has ended or its default group is gone."""
    while (found := board()) is not None and not found.ended:
        found.look()
        del found
        time.sleep(WATCH_INTERVAL_S)


_boards: WeakKeyDictionary[dist.ProcessGroup, FailureBoard] = WeakKeyDictionary()
_aborted: list[FailureBoard] = []  # the last one whose groups were aborted: then there is no default group
# the default group and its board of the last call; not kept alive
_latest: tuple[Callable[[], dist.ProcessGroup | None], Callable[[], FailureBoard | None]] = (lambda: None, lambda: None)


def failure_board() -> FailureBoard:
    """Return the one of the present default group, or of the one that was aborted."""
    global _latest
    world, (known, latest) = default_group(), _latest
    if world is not None and known() is world and (board := latest()) is not None:  # sooner than by `_boards`
        return board
    if world is None and _aborted:
        return _aborted[0]
    if world is None:
        raise RuntimeError("expert parallelism: got no default process group, wanted one until the layer's last call")
    if (board := _boards.get(world)) is None:
        board = _boards[world] = FailureBoard(store=default_store(), rank=dist.get_rank())
    _latest = ref(world), ref(board)
    return board


def knows_ranks() -> bool:
    """Return whether there is a default group, or was one until it was aborted."""
    return dist.is_available() and (dist.is_initialized() or bool(_aborted))
