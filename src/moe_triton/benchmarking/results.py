"""What a measurement is: one run per case and mode, one row per provider or limit; and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_triton.benchmarking.cases import Case
from moe_triton.benchmarking.timing import Spread, Times

SCHEMA = "moe-triton-bench/2"
READABLE = ("moe-triton-bench/1", SCHEMA)
FAULTS = ("mismatch", "failed")  # these make the command fail
NOTE_LENGTH = 240
SELF_CHECK_LIMIT = 0.03  # how much the same provider may differ from itself


@dataclass(kw_only=True)
class Row:
    """What is known of one provider or limit.

    kind      "ours", "peer", "limit", or "check": the first of ours once more, under another name
    status    "ok"; else it has no times: "mismatch" or "failed" (faults), "not installed", "not applicable",
              "not measured", "too old" or "out of memory"; `note` says more
    way       how it ran: "eager", "compile" or "graph"
    errors    relative RMS error per tensor against float64; worst: of the worst row or expert
    moved     share of the router's choices that are not the reference's own (near-ties)
    times_s   seconds per call in each round, None in a round that was left out
    of        limit name -> limit time / this time, over the rounds
    """

    name: str
    label: str
    kind: str
    status: str = "ok"
    note: str = ""
    way: str = "eager"
    errors: dict[str, float] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    moved: float | None = None
    times_s: Times = field(default_factory=list)
    time_s: Spread | None = None
    tflops: float | None = None
    of: dict[str, Spread] = field(default_factory=dict)
    saved_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def gradient_error(self) -> float | None:
        """The largest error among the gradients."""
        return max((error for name, error in self.errors.items() if name != "output"), default=None)


@dataclass(kw_only=True)
class Run:
    """One case in one mode.

    speedups    provider name -> its time / our time over the rounds
    self_check  the time of our provider's second copy / our time over the rounds: 1 on a quiet machine
    key         of the cell: what was asked for and what it was measured with
    measured    when
    """

    case: Case
    mode: str
    flops: int
    counts: list[int]
    rows: list[Row]
    ours: str | None
    speedups: dict[str, Spread]
    self_check: Spread | None = None
    key: str = ""
    measured: str = ""

    @property
    def faults(self) -> list[Row]:
        return [row for row in self.rows if row.status in FAULTS]

    @property
    def self_difference(self) -> float | None:
        """How much the same provider differed from itself, as a share of its time; None where it was not measured."""
        return None if self.self_check is None else abs(self.self_check.p50 - 1)

    @property
    def is_steady(self) -> bool:
        return self.self_difference is None or self.self_difference < SELF_CHECK_LIMIT

    def speed(self, row: Row) -> float:
        """TFLOP/s of a row with times; of the bandwidth floor, which computes nothing, the speed that it allows."""
        assert row.time_s is not None
        return self.flops / row.time_s.p50 / 1e12

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


def first_line(error: Exception) -> str:
    """A compiler's error fills pages: its first line says what and where."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:NOTE_LENGTH]


def spread_from(value: dict[str, float] | None) -> Spread | None:
    return None if value is None else Spread(**value)


def spreads_from(values: dict[str, dict[str, float]]) -> dict[str, Spread]:
    return {name: Spread(**value) for name, value in values.items()}


def run_from(value: dict[str, Any]) -> Run:
    """The Run of its `dataclasses.asdict`. Raises KeyError, TypeError or ValueError on anything else."""
    rows = [
        Row(**{**row, "time_s": spread_from(row["time_s"]), "of": spreads_from(row["of"])}) for row in value["rows"]
    ]
    case = dict(value["case"])
    case["skew"] = {"empty": "quarter-empty"}.get(case["skew"], case["skew"])  # schema 1
    changed = {
        "case": Case(**case),
        "rows": rows,
        "speedups": spreads_from(value["speedups"]),
        "self_check": spread_from(value.get("self_check")),
    }
    return Run(**{**value, **changed})


@dataclass(kw_only=True)
class Results:
    """A file of results: the runs, and everything else that it holds (created, device, versions, commit, settings)."""

    runs: list[Run]
    facts: dict[str, Any]


def read_results(path: Path, name: str) -> Results:
    """The results in a JSON file. ValueError, naming the argument `name`, where there are none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {path} is not JSON: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in READABLE:
        raise ValueError(f"{name}: {path} is no result of moe-triton bench (schema {schema!r})")
    try:
        runs = [run_from(run) for run in content["runs"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{name}: {path} holds a broken run: {type(error).__name__}: {error}") from error
    return Results(runs=runs, facts={key: value for key, value in content.items() if key != "runs"})


def document(runs: list[Run], facts: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain values."""
    return {"schema": SCHEMA, **facts, "settings": settings, "runs": [dataclasses.asdict(run) for run in runs]}
