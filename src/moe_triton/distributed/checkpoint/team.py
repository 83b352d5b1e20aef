"""The processes that save or load together: each does its share, and all of them learn what went wrong on any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from moe_triton.distributed.errors import CheckpointError, ExpertParallelError
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.groups import ALONE, Group, group_from_handle

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Team:
    """A group of processes, and what they do, as error messages call it."""

    group: Group
    task: str

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, task: str) -> Team:
        """Return the processes of `group` or of the default group; only this one without torch.distributed."""
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group: got {type(group).__name__}, wanted a ProcessGroup or None")
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return cls(group=ALONE, task=task)
        return cls(group=group_from_handle(group), task=task)

    @property
    def is_first(self) -> bool:
        return self.group.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.group.size == 1

    def each(self, phase: str, function: Callable[[], T]) -> list[T]:
        """Return what `function` returns on every rank, in rank order; an exception on any of them is raised on all.

        A bad argument keeps its kind, TypeError or ValueError; all else is a CheckpointError.
        """
        error: Exception | None = None
        result: Any = None
        try:
            result = function()
        except Exception as caught:
            error = caught
        outcomes: list[tuple[Exception | None, T]] = [(error, result)]
        if not self.is_alone:
            channel = Channel(group=self.group, layer=self.task)
            outcomes = channel.gather_objects((_portable(error), result), phase)  # type: ignore[assignment]
        failures = {rank: failed for rank, (failed, _) in enumerate(outcomes) if failed is not None}
        if failures:
            kinds = {type(failed) for failed in failures.values()}
            kind = kinds.pop() if kinds in ({TypeError}, {ValueError}) else CheckpointError
            raise self.failure(phase, failures, kind) from error
        return [value for _, value in outcomes]

    def first(self, phase: str, function: Callable[[], T]) -> T:
        """Return what `function` returns on the first rank, which alone runs it; its exception is raised on all."""
        return self.each(phase, lambda: function() if self.is_first else None)[0]  # type: ignore[return-value]

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
