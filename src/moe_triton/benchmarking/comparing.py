"""What became slower between two results: cell by cell, our times by themselves and the peers' for information."""

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
    is_ours: bool
    old_s: float
    new_s: float
    machine: float | None
    is_steady: bool

    @property
    def ratio(self) -> float:
        return self.new_s / self.old_s

    @property
    def relative(self) -> float:
        """The ratio over that of the dense product, which was timed beside the provider both times."""
        return self.ratio / (self.machine or 1.0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The changes of two results, and the cells of the older one that are missing in the newer one."""

    changes: list[Change]
    missing: list[str]
    fail_over: float

    @property
    def compared(self) -> int:
        return len(self.changes)

    @property
    def ours(self) -> list[Change]:
        return [change for change in self.changes if change.is_ours]

    @property
    def slower(self) -> list[Change]:
        """Ours, beyond the limit relative to the dense product, in steady cells; worst first."""
        return self._beyond([change for change in self.ours if change.is_steady])

    @property
    def inconclusive(self) -> list[Change]:
        """Ours, beyond the limit where the same provider differed from itself by more than the self-check allows."""
        return self._beyond([change for change in self.ours if not change.is_steady])

    @property
    def peers(self) -> list[Change]:
        """Peers beyond the limit."""
        return self._beyond([change for change in self.changes if not change.is_ours])

    def _beyond(self, changes: list[Change]) -> list[Change]:
        return sorted((c for c in changes if c.relative > 1 + self.fail_over), key=lambda c: -c.relative)


def compare(old: Sequence[Run], new: Sequence[Run], fail_over: float) -> Comparison:
    """Relate every provider of `new` that `old` measured in the same cell."""
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
                    is_ours=row.kind == "ours",
                    old_s=past.time_s.p50,
                    new_s=row.time_s.p50,
                    machine=machine_change(earlier, run),
                    is_steady=run.is_steady and earlier.is_steady,
                )
            )
    missing = [f"{case.title()}, {mode}" for case, mode in before if (case, mode) not in here]
    return Comparison(changes=changes, missing=missing, fail_over=fail_over)


def machine_change(old: Run, new: Run) -> float | None:
    """New over old time of the dense product: the limit was measured beside the providers both times."""
    before, now = (None if (row := run.row(STEADY_LIMIT)) is None else row.time_s for run in (old, new))
    return None if before is None or now is None else now.p50 / before.p50
