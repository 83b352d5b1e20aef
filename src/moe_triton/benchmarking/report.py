"""How a result is shown and kept: a table, one JSON object, and Markdown rows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_triton.benchmarking.runner import Row, Run
from moe_triton.benchmarking.timing import Spread

SCHEMA = "moe-triton-bench/1"
MODE_NAMES = {"forward": "forward", "full": "forward+backward"}
PLAIN_WIDTH = 240  # wide enough that nothing wraps where there is no terminal


def document(runs: Sequence[Run], environment: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything about a run as plain values; `moe_triton.benchmarking.runner` documents the fields."""
    return {"schema": SCHEMA, **environment, "settings": settings, "runs": [asdict(run) for run in runs]}


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or leaves the old one: through a temporary file beside it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    # a list of numbers on one line: the raw times would fill the file with line breaks
    text = re.sub(r"\[\s+([-+.\deE,\s]|null)+\]", lambda found: re.sub(r"\s+", " ", found.group()), text)
    write_text(path, text + "\n")


def three_digits(value: float) -> str:
    """Three significant digits, never in exponent form."""
    return np.format_float_positional(float(f"{value:.3g}"), trim="-")


def speed_unit(runs: Sequence[Run]) -> tuple[str, float]:
    """The unit that suits the fastest row, and how many of it are one TFLOP/s."""
    fastest = max((row.tflops or 0.0 for run in runs for row in run.rows), default=0.0)
    return ("TFLOP/s", 1.0) if fastest >= 1 else ("GFLOP/s", 1e3)


def factor(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    return three_digits(seconds * 1e3)


def speedup_cell(value: Spread | None) -> str:
    return "" if value is None else f"{factor(value.p50)}x ({factor(value.p20)}-{factor(value.p80)})"


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def time_cell(row: Row) -> str:
    if row.time_s is None:
        return row.status
    low, middle, high = (milliseconds(t) for t in (row.time_s.p20, row.time_s.p50, row.time_s.p80))
    return f"{middle} ({low}-{high})"


def error_cell(row: Row, mode: str) -> str:
    if not row.errors:
        return ""
    out = f"{row.errors['output']:.0e}"
    gradient = max(error for name, error in row.errors.items() if name != "output")
    verdict = "ok" if row.status == "ok" else row.status.upper()
    return f"{verdict} {out}" if mode == "forward" else f"{verdict} {out} / {gradient:.0e}"


def headline(run: Run) -> str:
    used = sum(count > 0 for count in run.counts)
    rows = f"rows per expert {min(run.counts)}-{max(run.counts)}, {used} of {run.case.experts} experts used"
    rounds = max((len(row.times_s) for row in run.rows), default=0)
    return (
        f"{run.case.title()}, {MODE_NAMES[run.mode]} ({three_digits(run.flops / 1e9)} GFLOP, {rows}, {rounds} rounds)"
    )


def table(run: Run, unit: tuple[str, float], plain: bool) -> Table:
    """One run. Times are p50 (p20-p80); "of" a limit and "faster" are medians of per-round ratios."""
    shown = Table(title=headline(run), title_justify="left", box=None if plain else Table().box)
    bounds = [row.name for row in run.rows if row.kind == "limit"]
    has_peak = any(row.peak_bytes is not None for row in run.rows)
    shown.add_column("provider", no_wrap=True)
    for name in ("ms", unit[0], *(f"of {bound}" for bound in bounds), "ours is faster", "saved MiB"):
        shown.add_column(name, justify="right", no_wrap=True)
    if has_peak:
        shown.add_column("peak MiB", justify="right", no_wrap=True)
    shown.add_column("error out" if run.mode == "forward" else "error out / grad", no_wrap=True)
    shown.add_column("note")
    for row in run.rows:
        cells = [
            row.label,
            time_cell(row),
            "" if row.tflops is None else three_digits(row.tflops * unit[1]),
            *(f"{row.of[bound].p50:.2f}" if bound in row.of else "" for bound in bounds),
            speedup_cell(run.speedups.get(row.name)),
            mebibytes(row.saved_bytes),
        ]
        if has_peak:
            cells.append(mebibytes(row.peak_bytes))
        cells += [error_cell(row, run.mode), row.note]
        style = {"ours": "bold", "limit": "dim"}.get(row.kind)
        shown.add_row(*cells, style="red" if row.status in ("mismatch", "failed") else style)
    return shown


def print_runs(runs: Sequence[Run], console: Console | None = None) -> None:
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=PLAIN_WIDTH, no_color=True, highlight=False)
    unit = speed_unit(runs)
    for run in runs:
        console.print(table(run, unit, plain=not console.is_terminal))
        console.print()


def markdown(runs: Sequence[Run], environment: dict[str, Any]) -> str:
    """One line per run, for a README: our time, its ratio to the limits, and the speed-up over each peer."""
    peers: dict[str, str] = {}
    bounds: list[str] = []
    for run in runs:
        for row in run.rows:
            if row.kind == "peer" and row.time_s is not None:
                peers.setdefault(row.name, row.label)
            if row.kind == "limit" and row.name not in bounds:
                bounds.append(row.name)
    unit = speed_unit(runs)
    header = ["shape", "pass", "ms", unit[0], *(f"of {name}" for name in bounds)]
    header += [f"over {label}" for label in peers.values()]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * 2 + "--:|" * (len(header) - 2)]
    for run in runs:
        own = None if run.ours is None else run.row(run.ours)
        cells = [run.case.title(), MODE_NAMES[run.mode]]
        if own is None or own.time_s is None or own.tflops is None:
            cells += ["not measured"] + [""] * (len(header) - 3)
        else:
            cells += [milliseconds(own.time_s.p50), three_digits(own.tflops * unit[1])]
            cells += [f"{own.of[name].p50:.2f}" if name in own.of else "" for name in bounds]
            cells += [f"{factor(run.speedups[name].p50)}x" if name in run.speedups else "" for name in peers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", caption(environment), ""])


def caption(environment: dict[str, Any]) -> str:
    """Device, versions and commit in one line."""
    device, versions, commit = environment["device"], environment["versions"], environment["commit"]
    parts = [device["name"]]
    if device.get("threads"):
        parts.append(f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}")
    parts += [f"{name} {found}" for name, found in versions.items() if found is not None]
    if commit is not None:
        parts.append(f"commit {commit['hash'][:10]}{' with changes' if commit['dirty'] else ''}")
    return ", ".join([*parts, environment["created"]])
