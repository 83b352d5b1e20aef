"""What became slower between two results: cell by cell, provider by provider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_triton.benchmarking.results import Run

STEADY_LIMIT = "dense"  # the limit whose own change says how much the machine itself changed


@dataclass(frozen=True, kw_only=True)
class Change:
    """One provider in one cell. `ratio`: new median time over old; `machine`: the same of one dense product."""

    title: str
    mode: str
    label: str
    old_s: float
    new_s: float
    machine: float | None
    is_steady: bool

    @property
    def ratio(self) -> float:
        return self.new_s / self.old_s


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """slower: beyond the limit, worst first. compared: number of times compared. missing: cells of OLD not here."""

    changes: list[Change]
    slower: list[Change]
    missing: list[str]
    fail_over: float

    @property
    def compared(self) -> int:
        return len(self.changes)


def compare(old: Sequence[Run], new: Sequence[Run], fail_over: float) -> Comparison:
    """Every provider of `new` that `old` measured in the same cell; slower is new > (1 + fail_over) * old."""
    before = {(run.case, run.mode): run for run in old}
    here = {(run.case, run.mode) for run in new}
    changes = []
    for run in new:
        earlier = before.get((run.case, run.mode))
        if earlier is None:
            continue
        for row in run.rows:
            past = earlier.row(row.name)
            if row.kind not in ("ours", "peer") or past is None or row.time_s is None or past.time_s is None:
                continue
            changes.append(
                Change(
                    title=run.case.title(),
                    mode=run.mode,
                    label=row.label,
                    old_s=past.time_s.p50,
                    new_s=row.time_s.p50,
                    machine=machine_change(earlier, run),
                    is_steady=run.is_steady and earlier.is_steady,
                )
            )
    slower = sorted((c for c in changes if c.ratio > 1 + fail_over), key=lambda c: -c.ratio)
    missing = [f"{case.title()}, {mode}" for case, mode in before if (case, mode) not in here]
    return Comparison(changes=changes, slower=slower, missing=missing, fail_over=fail_over)


def machine_change(old: Run, new: Run) -> float | None:
    """New over old time of the dense product: the limit was measured beside the providers both times."""
    before, now = (None if (row := run.row(STEADY_LIMIT)) is None else row.time_s for run in (old, new))
    return None if before is None or now is None else now.p50 / before.p50
