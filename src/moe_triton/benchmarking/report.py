"""How a result is shown and kept: a table, a JSON file, CSV and Markdown rows."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from moe_triton.benchmarking.comparing import Change, Comparison
from moe_triton.benchmarking.environment import caption
from moe_triton.benchmarking.results import SELF_CHECK_LIMIT, Row, Run
from moe_triton.benchmarking.text_tables import plain_console, print_table
from moe_triton.benchmarking.timing import Spread
from moe_triton.files import replace_file

MISSING = "not installed"
MODE_NAMES = {"forward": "forward", "backward": "backward", "full": "forward+backward"}
STYLES = {"ours": "bold", "limit": "dim", "check": "dim"}  # in a terminal, by kind of row


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or leaves the old one (`moe_triton.files.replace_file`)."""
    replace_file(path, [text.encode()])


def json_text(content: dict[str, Any]) -> str:
    """Return indented JSON with a list of numbers on one line: the raw times would fill it with line breaks."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\s+([-+.\deE,\s]|null)+\]", lambda found: re.sub(r"\s+", " ", found.group()), text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json_text(content) + "\n")


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


def spread_cell(time_s: Spread) -> str:
    """Milliseconds: p50 (p20-p80)."""
    return f"{milliseconds(time_s.p50)} ({milliseconds(time_s.p20)}-{milliseconds(time_s.p80)})"


def mebibytes(count: int | None) -> str:
    return "" if count is None else three_digits(count / 2**20)


def error_cell(row: Row, mode: str) -> str:
    if not row.errors:
        return ""
    text = f"{'ok' if row.status == 'ok' else row.status.upper()} {row.errors['output']:.0e}"
    return text if mode == "forward" or row.gradient_error is None else f"{text} / {row.gradient_error:.0e}"


def note_cell(row: Row, run: Run) -> str:
    if row.kind == "check" and run.self_difference is not None:
        return f"differs by {run.self_difference:.1%}" + ("" if run.is_steady else ": NOT STEADY")
    return row.note


def headline(run: Run) -> str:
    used = sum(count > 0 for count in run.counts)
    rows = f"rows per expert {min(run.counts)}-{max(run.counts)}, {used} of {run.case.experts} experts used"
    rounds = max((len(row.times_s) for row in run.rows), default=0)
    return (
        f"{run.case.title()}, {MODE_NAMES[run.mode]} ({three_digits(run.flops / 1e9)} GFLOP, {rows}, {rounds} rounds)"
    )


def columns(run: Run, unit: tuple[str, float], error: str) -> list[str]:
    """The columns of a run's table, of which the first and the last two are text; `error` is the title of one of them.

    Times are p50 (p20-p80); "of" a limit and "faster" are medians of per-round ratios.
    """
    bounds = [f"of {row.name}" for row in run.rows if row.kind == "limit"]
    peak = ["peak MiB"] if any(row.peak_bytes is not None for row in run.rows) else []
    return ["provider", "ms", unit[0], *bounds, "ours is faster", "saved MiB", *peak, error, "note"]


def cells(run: Run, row: Row, unit: tuple[str, float], speedup: str) -> list[str]:
    """A row under `columns`, with the speed-up over it in words."""
    bounds = [row.name for row in run.rows if row.kind == "limit"]
    peak = [mebibytes(row.peak_bytes)] if any(row.peak_bytes is not None for row in run.rows) else []
    return [
        row.label,
        row.status if row.time_s is None else spread_cell(row.time_s),
        "" if row.tflops is None else three_digits(row.tflops * unit[1]),
        *(f"{row.of[bound].p50:.2f}" if bound in row.of else "" for bound in bounds),
        speedup,
        mebibytes(row.saved_bytes),
        *peak,
        error_cell(row, run.mode),
        note_cell(row, run),
    ]


def print_runs(runs: Sequence[Run], console: Console | None = None) -> None:
    """Print a table for each run; peers that are not installed come in one line below."""
    console = plain_console() if console is None else console
    unit = speed_unit(runs)
    for run in runs:
        names = columns(run, unit, "error out" if run.mode == "forward" else "error out / grad")
        rows = [row for row in run.rows if row.status != MISSING]
        shown = [cells(run, row, unit, speedup_cell(run.speedups.get(row.name))) for row in rows]
        styles = {i: "red" if row in run.faults else STYLES.get(row.kind, "") for i, row in enumerate(rows)}
        bounds = [name for name in names if name.startswith("of ")]
        less = [name for name in names if "MiB" in name] + [*reversed(bounds[1:]), names[2]]
        less += [] if run.faults else [names[-2]]
        print_table(console, names, shown, (names[0], *names[-2:]), less, styles, title=headline(run))
        if missing := [row.label for row in run.rows if row.status == MISSING]:
            console.print(f"  {MISSING}: {', '.join(missing)}", highlight=False)
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


def self_check_line(runs: Sequence[Run]) -> str:
    """What the self-check found, in one line."""
    found = [(run.self_difference, run) for run in runs if run.self_difference is not None]
    if not found:
        return "self-check: not measured"
    worst, where = max(found, key=lambda pair: pair[0])
    noisy = sum(not run.is_steady for run in runs)
    at = f"{where.case.title()}, {MODE_NAMES[where.mode]}"
    text = f"self-check: the same provider twice differs by at most {worst:.1%} (limit {SELF_CHECK_LIMIT:.0%}), at {at}"
    if noisy:
        text += f"; NOT STEADY: {noisy} of {len(found)} cells are beyond the limit, this machine was doing other work"
    return text


def comparison_lines(found: Comparison) -> list[str]:
    """Say what of ours became slower, worst first, what is inconclusive, and how much the machine itself changed."""
    limit = f"{found.fail_over * 100:g}%"
    lines = [f"compare: {len(found.slower) or 'none'} of our {len(found.ours)} times are more than {limit} slower"]
    lines += [f"  {change_line(change)}" for change in found.slower]
    if found.inconclusive:
        lines.append(f"  inconclusive, the machine was not steady in {len(found.inconclusive)} cells:")
        lines += [f"    {change_line(change)}" for change in found.inconclusive]
    if found.peers:
        lines.append(f"  peers that are more than {limit} slower, which fails nothing:")
        lines += [f"    {change_line(change)}" for change in found.peers]
    if found.missing:
        lines.append(f"  not compared, {len(found.missing)} cells of the old file that were not measured now:")
        lines += [f"    {title}" for title in found.missing]
    return lines


def change_line(change: Change) -> str:
    """One change in words: relative to the dense product where both files have its time."""
    times = f"{milliseconds(change.old_s)} -> {milliseconds(change.new_s)} ms"
    machine = "" if change.machine is None else f", a dense product {change.machine - 1:+.1%}"
    where = f"{change.label}, {change.title}, {MODE_NAMES[change.mode]}"
    return f"{change.relative - 1:+.1%}  {where}: {times}{machine}"


CSV_FIELDS = (
    "tokens", "hidden", "intermediate", "experts", "top_k", "dtype", "skew", "activation", "bias", "name",
)  # fmt: skip
CSV_COLUMNS = (
    *CSV_FIELDS, "mode", "provider", "label", "kind", "way", "status", "note", "p20_ms", "p50_ms", "p80_ms", "tflops",
    "of_roof", "of_dense", "of_floor", "ours_is_faster", "self_difference", "saved_bytes", "peak_bytes", "output_error",
    "gradient_error", "measured",
)  # fmt: skip


def csv_table(runs: Sequence[Run]) -> str:
    """One line per cell and provider or limit; an empty field is what was not measured."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        for row in run.rows:
            record: dict[str, Any] = {name: getattr(run.case, name) for name in CSV_FIELDS}
            record |= {name: getattr(row, name) for name in ("label", "kind", "way", "status", "note", "tflops")}
            record |= {"mode": run.mode, "provider": row.name, "measured": run.measured}
            if row.time_s is not None:
                record |= {f"{q}_ms": getattr(row.time_s, q) * 1e3 for q in ("p20", "p50", "p80")}
            record |= {f"of_{bound}": share.p50 for bound, share in row.of.items()}
            if row.name in run.speedups:
                record["ours_is_faster"] = run.speedups[row.name].p50
            record |= {"self_difference": run.self_difference, "output_error": row.errors.get("output")}
            record |= {"saved_bytes": row.saved_bytes, "peak_bytes": row.peak_bytes}
            record["gradient_error"] = row.gradient_error
            writer.writerow(record)
    return out.getvalue()
