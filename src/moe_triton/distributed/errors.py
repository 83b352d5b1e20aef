"""What goes wrong between processes, and who is to blame.

Every rank counts the collectives that it issues on each group. One that fails writes so, with its counts, into the
store of the default group, and one that waits for long looks there and at the processes of its machine: a failure is
known on all ranks within moments, in whatever group it happened, and costs nothing while all goes well.
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

PATIENCE = 3.0  # seconds for which a failed rank waits to hear why
logger = logging.getLogger("moe_triton")


class ExpertParallelError(RuntimeError):
    """A collective of an MoE layer failed. The message names rank, layer and phase, and the ranks that are gone."""


class ConfigurationMismatch(ExpertParallelError):
    """The ranks of a group do not agree on what they are about to compute."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, or does not fit the model. The message names the file."""


def identity() -> Identity:
    """Who this process is, as three numbers, for the other ranks to look after."""
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
class Failure:
    """What a rank that failed tells the others.

    where     rank, layer and phase
    cause     an exception of its own, or the missing ranks; empty while that is being found out
    issued    the collectives that it had issued, by the name of the group, for every group that it is in
    """

    rank: int
    where: str
    cause: str
    issued: dict[str, int]


@dataclass
class Board:
    """What this rank knows of the others of one default group, and the store over which they tell each other.

    issued       collectives issued here, by the name of the group
    settled      failures told with fewer are old: a later collective succeeded, or this rank failed with the others
    identities   of global ranks
    introduced   groups whose members know each other's identities
    agreed       (group, fingerprint) of what has been compared
    failures     as read so far
    is_silent    the store did not answer, and is not asked again while a reason is sought
    """

    store: Any
    issued: Counter[str] = field(default_factory=Counter)
    settled: dict[str, int] = field(default_factory=dict)
    identities: dict[int, Identity] = field(default_factory=dict)
    introduced: set[str] = field(default_factory=set)
    agreed: set[tuple[str, int]] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    is_silent: bool = False

    def tell(self, where: str, cause: str = "") -> None:
        """Let the others know that this rank failed."""
        failure = Failure(rank=dist.get_rank(), where=where, cause=cause, issued=self._counts())
        entry = json.dumps(asdict(failure))
        self._ask(lambda: self.store.set(f"moe_triton/failure/{self.store.add('moe_triton/failures', 1)}", entry))

    def settle(self) -> None:
        """This rank has failed and said why: should all ranks have, and go on, then what was told so far is old."""
        self.settled = {name: number + 1 for name, number in self._counts().items()}
        self.is_silent = False

    def is_hopeless(self, group: Group, number: int) -> bool:
        """Whether collective `number` of the group cannot succeed any more, as far as is known here."""
        if self.dead(group.ranks):
            return True
        self.is_silent = False
        self._read()
        return any(failure.issued[group.name] <= number for failure in self._recent(group))

    def reason(self, group: Group, number: int) -> str:
        """Why it failed, in words. Waits for the others of the group to say why, or at least that they failed too."""
        others = {rank for rank in group.ranks if rank != dist.get_rank()}
        deadline = time.monotonic() + PATIENCE
        while True:
            dead = self.dead(self.identities)  # of any group: it may be why the others left this one
            answers = self._read()
            failures = self._recent(group)
            silent = others - {failure.rank for failure in failures}
            left = {failure.rank for failure in self.failures} - silent  # they failed first, and said so
            if died := [f"rank {rank} has died" for rank in dead if rank not in left]:
                stopped = [rank for rank in sorted(silent) if self._state(rank) == "stopped"]
                return ", ".join(died + self._do_not_answer(stopped))
            gave_up = [failure for failure in failures if failure.issued[group.name] <= number]
            if causes := [failure.cause for failure in gave_up if failure.cause]:
                return ", ".join(dict.fromkeys(causes))
            waiting = bool(silent) or bool(gave_up)
            if not answers or not waiting or time.monotonic() > deadline + bool(gave_up):
                break
            time.sleep(0.02)
        if not answers:
            silent = {rank for rank in others if self._state(rank)}
        found = self._do_not_answer(sorted(silent))
        if not answers:
            found.append("the store does not answer: the process that serves it has gone or is stuck")
        return ", ".join(found) or "no rank is missing"

    def dead(self, ranks: Iterable[int]) -> list[int]:
        """Those of the ranks whose processes were on this machine and are no more."""
        return [rank for rank in ranks if self._state(rank) == "dead"]

    def _recent(self, group: Group) -> list[Failure]:
        """What each other rank of the group told last, unless it is old or from before there was the group."""
        latest = {failure.rank: failure for failure in self.failures if failure.rank in group.ranks}
        latest.pop(dist.get_rank(), None)
        oldest = self.settled.get(group.name, 0)
        return [failure for failure in latest.values() if failure.issued.get(group.name, -1) >= oldest]

    def _counts(self) -> dict[str, int]:
        """Collectives issued, for every group that this rank is in."""
        return {name: self.issued[name] for name in dist.distributed_c10d._world.pg_names.values()}

    def _read(self) -> bool:
        """Read what was told since; False where the store does not answer."""
        count = self._ask(lambda: self.store.add("moe_triton/failures", 0))
        while count is not None and len(self.failures) < count:
            text = self._ask(lambda: self.store.get(f"moe_triton/failure/{len(self.failures) + 1}"))
            if text is None:
                return False
            self.failures.append(Failure(**json.loads(text)))
        return count is not None

    def _ask(self, question: Callable[[], T], patience: float = 2.0) -> T | None:
        """The store's answer; None where the process that serves it has gone, or does not answer."""
        answers: list[T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # torch's DistError
                answers.append(question())

        if not self.is_silent:
            thread = threading.Thread(target=ask, daemon=True)  # a client of a stopped server waits for ever
            thread.start()
            thread.join(patience)
        self.is_silent = not answers
        return answers[0] if answers else None

    def _state(self, rank: int) -> str:
        return state_of(self.identities[rank]) if rank in self.identities else ""

    def _do_not_answer(self, ranks: Iterable[int]) -> list[str]:
        states = {rank: self._state(rank) for rank in ranks}
        return [
            f"rank {r} does not answer" + (f" (its process is {state})" if state else "") for r, state in states.items()
        ]


_boards: WeakKeyDictionary[dist.ProcessGroup, Board] = WeakKeyDictionary()


def board() -> Board:
    """The one of the present default group."""
    world = dist.group.WORLD
    assert world is not None
    if world not in _boards:
        _boards[world] = Board(store=dist.distributed_c10d._get_default_store())
    return _boards[world]


def explain_termination() -> None:
    """On SIGTERM, say which ranks have died before ending as usual; without it a process ends without a word.

    For programs under a launcher such as torchrun, which ends the other ranks a moment after one has died. Call it in
    the main thread.
    """
    before = signal.getsignal(signal.SIGTERM)

    def explain(number: int, frame: FrameType | None) -> None:
        if dist.is_available() and dist.is_initialized():
            known = board()
            dead = ", ".join(f"rank {rank} has died" for rank in known.dead(known.identities))
            logger.error("rank %d: terminated: %s", dist.get_rank(), dead or "no rank is known to have died")
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, explain)
