"""The processes that save or load together: each does its share, and all of them learn what went wrong on any."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moe_triton.distributed.errors import CheckpointError, ExpertParallelError
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.groups import ALONE, Group, control_group, group_from_handle

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Team:
    """A group of processes, and what they do, as error messages call it.

    control   the same processes, for Python objects
    """

    group: Group
    control: Group
    task: str

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, task: str) -> Team:
        """Return the processes of `group` or of the default group; only this one without torch.distributed."""
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group: got {type(group).__name__}, wanted a ProcessGroup or None")
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return cls(group=ALONE, control=ALONE, task=task)
        found = group_from_handle(group)
        return cls(group=found, control=control_group() if group is None else found, task=task)

    @property
    def is_first(self) -> bool:
        return self.group.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.group.size == 1

    # What a rank sends and receives in these does not grow with the number of ranks, unless something failed or the
    # ranks differ, but for 8 bytes a rank in `distinct` where they do.

    def run(self, phase: str, function: Callable[[], T]) -> T:
        """Return what `function` returns here; an exception on any rank is raised on all.

        A bad argument keeps its kind, TypeError or ValueError; all else is a CheckpointError.
        """
        error: Exception | None = None
        result: Any = None
        try:
            result = function()
        except Exception as caught:
            error = caught
        errors: list[object] = [error]
        if not self.is_alone:
            failed = torch.tensor([error is not None], dtype=torch.int32, device=self._channel.object_device)
            self._channel.all_reduce(failed, phase, dist.ReduceOp.MAX)
            errors = self._channel.gather_objects(_portable(error), phase) if failed.item() else []
        failures = {rank: failed for rank, failed in enumerate(errors) if isinstance(failed, Exception)}
        if failures:
            kinds = {type(failed) for failed in failures.values()}
            kind = kinds.pop() if kinds in ({TypeError}, {ValueError}) else CheckpointError
            raise self.failure(phase, failures, kind) from error
        return result

    def first(self, phase: str, function: Callable[[], T]) -> T:
        """Return what `function` returns on the first rank, which alone runs it; its exception is raised on all."""
        found: Any = self.run(phase, lambda: function() if self.is_first else None)
        return found if self.is_alone else self._channel.broadcast_object(found, phase, 0)  # type: ignore[return-value]

    def distinct(self, phase: str, function: Callable[[], T]) -> dict[int, T]:
        """Return the different results of `function` by the first rank that has each; exceptions as in `run`."""
        mine = self.run(phase, function)
        if self.is_alone:
            return {0: mine}
        channel, digest = self._channel, hashlib.sha256(pickle.dumps(mine)).digest()
        number = int.from_bytes(digest[:7], "big")  # positive in an int64, also negated
        ends = torch.tensor([number, -number], device=channel.object_device)
        channel.all_reduce(ends, phase, dist.ReduceOp.MAX)
        if ends[0] == -ends[1]:
            return {0: mine}
        numbers = torch.empty(self.control.size, dtype=torch.int64, device=channel.object_device)
        channel.all_gather(numbers, torch.tensor([number], device=channel.object_device), phase)()
        firsts: dict[int, int] = {}
        for rank, theirs in enumerate(numbers.tolist()):
            firsts.setdefault(theirs, rank)
        return {rank: channel.broadcast_object(mine, phase, rank) for rank in firsts.values()}  # type: ignore[misc]

    def gather(self, phase: str, function: Callable[[], T]) -> list[T]:
        """Return what `function` returns on every rank, in rank order, on the first; nothing on the others.

        Exceptions are as in `run`.
        """
        mine = self.run(phase, function)
        if self.is_alone:
            return [mine]
        found: list[Any] | None = [None] * self.group.size if self.is_first else None
        with self.error_context(phase):
            dist.gather_object(mine, found, dst=self.control.ranks[0], group=self.control.handle)
        return found or []

    def scatter(self, phase: str, function: Callable[[], list[T]]) -> T:
        """Return this rank's part of the list that `function` returns on the first rank; exceptions as in `first`."""
        parts: Any = self.run(phase, lambda: function() if self.is_first else None)
        if self.is_alone:
            return parts[0]
        found: list[Any] = [None]
        with self.error_context(phase):
            dist.scatter_object_list(found, parts, src=self.control.ranks[0], group=self.control.handle)
        return found[0]

    @property
    def _channel(self) -> Channel:
        return Channel(group=self.control, layer=self.task)

    def failure(
        self, phase: str, failures: Mapping[int, BaseException], kind: type[Exception] = CheckpointError
    ) -> Exception:
        """Make one exception that says what failed on which ranks."""
        words: dict[str, list[str]] = {}
        for rank, error in failures.items():
            words.setdefault(_words(error), []).append(str(self.group.ranks[rank]))
        text = "; ".join(
            line if len(ranks) == self.group.size else f"rank {', '.join(ranks)}: {line}"
            for line, ranks in words.items()
        )
        return kind(f"{self.task}, {phase}: {text}")

    @contextmanager
    def error_context(self, phase: str) -> Iterator[None]:
        """`with team.error_context(phase):` a collective of other code fails with rank, phase and the missing ranks."""
        try:
            yield
        except (CheckpointError, ExpertParallelError):
            raise
        except RuntimeError as error:
            if self.is_alone:
                raise CheckpointError(f"{self.task}, {phase}: {_words(error)}") from error
            with Channel(group=self.group, layer=self.task).error_context(phase):
                raise


def _words(error: BaseException) -> str:
    """An exception of ours speaks for itself; of others the kind says more than the text alone."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    ours = isinstance(error, (CheckpointError, TypeError, ValueError, OSError))
    return text if ours else f"{type(error).__name__}: {text}"


def _portable(error: Exception | None) -> Exception | None:
    """An exception that another process can surely unpickle."""
    if error is None:
        return None
    kind = type(error) if type(error) in (TypeError, ValueError) else CheckpointError
    return kind(_words(error))
