"""The report of a run: one HTML page that needs nothing beside it, and reads on a desktop and on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from statistics import geometric_mean
from typing import Any

from moe_triton.benchmarking import report
from moe_triton.benchmarking.comparing import Comparison
from moe_triton.benchmarking.environment import caption
from moe_triton.benchmarking.report import MODE_NAMES, factor, three_digits
from moe_triton.benchmarking.results import Run
from moe_triton.benchmarking.stage_report import STAGE_HEADER, stage_cells, stage_summary
from moe_triton.benchmarking.stages import StageTable

FAR = 2.5  # a limit beyond this many times the fastest bar is written, not drawn
STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --ours: #1f6f8b; --peer: #b8c4cc; --roof: #c8553d; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1100px; margin: 32px auto; padding: 0 20px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 8px; border-bottom: 1px solid var(--line); padding-bottom: 4px; }
h3 { font-size: 16px; margin: 24px 0 6px; } p { margin: 8px 0; } .note { color: var(--soft); font-size: 14px; }
.lead { font-size: 18px; } .good { color: #15803d; } .bad { color: #b91c1c; font-weight: 600; }
.chart { position: relative; margin: 8px 0 4px; }
.bar { display: grid; grid-template-columns: 230px 1fr; align-items: center; gap: 10px; font-size: 14px; margin: 4px 0; }
.bar .name { text-align: right; } .bar.ours .name { font-weight: 600; }
.track { display: flex; align-items: center; gap: 8px; min-width: 0; }
.fill { height: 18px; background: var(--peer); border-radius: 2px; flex: none; } .ours .fill { background: var(--ours); }
.limit .fill { background: none; border: 1px dashed var(--roof); } .limit .name, .limit .value { color: var(--roof); }
.value { white-space: nowrap; font-variant-numeric: tabular-nums; } .value i { color: var(--soft); font-style: normal; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid #f3f4f6; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; min-width: 180px; } tr.ours td { font-weight: 600; } tr.fault td { color: #b91c1c; }
.plain td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
details { margin: 6px 0 18px; } summary { cursor: pointer; color: var(--soft); font-size: 14px; }
pre { background: #f9fafb; border: 1px solid var(--line); border-radius: 6px; padding: 12px; font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  body { margin: 16px auto; padding: 0 14px; } h1 { font-size: 22px; }
  .bar { grid-template-columns: 1fr; gap: 0; margin: 10px 0; } .bar .name { text-align: left; }
  .track { display: block; } .fill { display: block; height: 12px; min-width: 2px; } .value { font-size: 13px; white-space: normal; }
}
"""  # noqa: E501 (a style sheet)
GUIDE = (
    ("bars", "speed: the experts' operations over the median time of one call. Longer is faster. Dashed: the limits."),
    ("ms", "one call: median over the rounds (20th to 80th percentile)"),
    ("of roof, of dense, of floor", "a limit's time over this provider's time, formed round by round; 1.00 is at the limit"),  # noqa: E501
    ("roof", "the experts' own products back to back: no routing, gather, activation or combine"),
    ("dense", "one dense product with as many operations"),
    ("floor", "few tokens only: reading the touched experts' weights once"),
    ("ours is faster", "this provider's time over ours, formed round by round"),
    ("saved, peak", "what autograd keeps between forward and backward; on GPUs the most that one call holds"),
    ("error", "relative RMS error against a float64 reference: of the output / the largest of the gradients"),
    ("self-check", "our provider timed twice under two names: no time is known better than the two differ"),
)  # fmt: skip


def table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], text_columns: int = 0) -> str:
    """Rows are (CSS class, cells); the last `text_columns` columns hold text that may wrap."""
    first_text = len(header) - text_columns
    css_of = ["text" if i >= first_text else "number" for i in range(len(header))]
    head = "".join(f'<th class="{css}">{escape(cell)}</th>' for css, cell in zip(css_of, header, strict=True))
    body = []
    for css, line in rows:
        marked = "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(css_of, line, strict=True))
        body.append(f'<tr class="{css}">{marked}')
    return f'<div class="scroll"><table><tr>{head}</tr>{"</tr>".join(body)}</tr></table></div>'


def bars(run: Run, unit: tuple[str, float]) -> str:
    """Our providers, the peers and the limits by speed, in the table's order."""
    name, scale = unit
    shown = [row for row in run.rows if row.kind in ("ours", "peer") and row.tflops is not None]
    speeds = {row.name: run.speed(row) * scale for row in run.rows if row.time_s is not None}
    fastest = max((speeds[row.name] for row in shown), default=0.0)
    near = [row for row in run.rows if row.kind == "limit" and 0 < speeds.get(row.name, 0.0) <= FAR * fastest]
    longest = max((speeds[row.name] for row in (*shown, *near)), default=1.0)
    lines = []
    for row in (*shown, *sorted(near, key=lambda row: speeds[row.name])):
        width = 60 * speeds[row.name] / longest  # percent of the track: the rest is for the words
        words = f"{three_digits(speeds[row.name])} {name}"
        if row.name in run.speedups:
            ratio = run.speedups[row.name].p50
            words += f" <i>ours is {factor(ratio)}x as fast</i>"
        elif row.of:
            words += f" <i>{', '.join(f'{share.p50:.2f} of {bound}' for bound, share in row.of.items())}</i>"
        lines.append(
            f'<div class="bar {row.kind}"><span class="name">{escape(row.label)}</span><span class="track">'
            f'<span class="fill" style="width: {width:.1f}%"></span><span class="value">{words}</span></span></div>'
        )
    return f'<div class="chart">{"".join(lines)}</div>'


def run_table(run: Run, unit: tuple[str, float]) -> str:
    speedups = {name: f"{factor(found.p50)}x" for name, found in run.speedups.items()}
    rows = [
        ("fault" if row in run.faults else row.kind, report.cells(run, row, unit, speedups.get(row.name, "")))
        for row in run.rows
    ]
    return table(report.columns(run, unit, "error"), rows, text_columns=1)


def summary_table(runs: Sequence[Run]) -> str:
    """Our speed-up over each peer: the geometric mean over the cells of each mode, and the worst cell."""
    modes = list(dict.fromkeys(run.mode for run in runs))
    labels = {row.name: row.label for run in runs for row in run.rows if row.name in run.speedups}
    rows = []
    for name, label in labels.items():
        line = [label]
        every = []
        for mode in modes:
            found = [run.speedups[name].p50 for run in runs if run.mode == mode and name in run.speedups]
            every += found
            line.append(f"{factor(geometric_mean(found))}x" if found else "not measured")
        line += [f"{factor(min(every))}x to {factor(max(every))}x", str(len(every))]
        rows.append(("", line))
    header = ["ours is faster than", *(MODE_NAMES[mode] for mode in modes), "least to most", "cells"]
    return table(header, rows) if rows else "<p>No peer was measured.</p>"


def lead(runs: Sequence[Run], device: str) -> str:
    """The result in a sentence or two."""
    ours = next((row.label for run in runs for row in run.rows if row.name == run.ours), None)
    if ours is None:
        return f"Nothing of ours was measured on {escape(device)}."
    best = [min(run.speedups.values(), key=lambda s: s.p50).p50 for run in runs if run.speedups]
    text = f"<b>{escape(ours)}</b> on {escape(device)}, {len(runs)} cells."
    if best:
        ahead = sum(value >= 1 for value in best)
        text += (
            f" It is {factor(geometric_mean(best))} times as fast as the fastest peer of each cell (geometric mean), "
        )
        text += f"and ahead in {ahead} of {len(best)}."
    return text


def unmeasured(runs: Sequence[Run]) -> str:
    """Everybody who has no times, once, with the reason."""
    rows: dict[tuple[str, str, str], int] = {}
    for run in runs:
        for row in run.rows:
            if row.kind != "limit" and row.time_s is None:
                entry = (row.label, row.status, row.note)
                rows[entry] = rows.get(entry, 0) + 1
    if not rows:
        return "<p>Everything that was asked for was measured.</p>"
    return table(
        ["provider", "cells", "status", "reason"],
        [("", [label, str(count), status, note]) for (label, status, note), count in rows.items()],
        text_columns=2,
    )


def plain_table(items: Mapping[str, Any]) -> str:
    rows = [f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in items.items()]
    return f'<table class="plain">{"".join(rows)}</table>'


def environment_table(facts: Mapping[str, Any]) -> str:
    items = {**facts["device"], "platform": facts["platform"]}
    items |= {name: found for name, found in facts["versions"].items() if found is not None}
    commit = facts["commit"]
    if commit is not None:
        items["commit"] = commit["hash"] + (" with changes" if commit["dirty"] else "")
    return plain_table({**items, "written": facts["created"]})


def case_section(runs: Sequence[Run], unit: tuple[str, float]) -> str:
    parts = [f"<h2>{escape(runs[0].case.title())}</h2>"]
    for run in runs:
        rest = (
            report.headline(run)
            .removeprefix(run.case.title())
            .lstrip(", ")
            .removeprefix(MODE_NAMES[run.mode])
            .strip(" ()")
        )
        parts.append(f"<h3>{MODE_NAMES[run.mode]}</h3>{bars(run, unit)}")
        parts.append(f"<details><summary>all numbers ({escape(rest)})</summary>{run_table(run, unit)}</details>")
    return f"<section>{''.join(parts)}</section>"


def stage_section(stages: Sequence[StageTable]) -> str:
    parts = []
    for found in stages:
        rows = [("", stage_cells(stage)) for stage in found.stages]
        words = "".join(f"<p>{escape(line)}</p>" for line in stage_summary(found))
        parts.append(f"<h3>{escape(found.title)}</h3>{words}{table(STAGE_HEADER, rows, text_columns=1)}")
    return f"<section><h2>Stages</h2>{''.join(parts)}</section>" if parts else ""


def render(
    runs: Sequence[Run],
    facts: Mapping[str, Any],
    command: str,
    *,
    stages: Sequence[StageTable] = (),
    comparison: Comparison | None = None,
) -> str:
    """The page."""
    unit = report.speed_unit(runs)
    checked = any(run.self_check is not None for run in runs)
    steadiness = "note" if not checked else "good" if all(run.is_steady for run in runs) else "bad"
    faults = list(dict.fromkeys(f"{row.label}: {row.status}: {row.note}" for run in runs for row in run.faults))
    parts = [
        f'<h1>moe-triton bench</h1><p class="lead">{lead(runs, facts["device"]["name"])}</p>',
        f'<p class="{steadiness}">{escape(report.self_check_line(runs))}</p>',
        *(f'<p class="bad">{escape(fault)}</p>' for fault in faults),
        f"<section><h2>Against each peer</h2>{summary_table(runs)}",
        '<p class="note">Geometric means over the cells; a cell is one shape in one pass.</p></section>',
    ]
    if comparison is not None:
        parts.append(
            f"<section><h2>Compared</h2><pre>{escape(chr(10).join(report.comparison_lines(comparison)))}</pre></section>"
        )
    parts += [case_section(list(group), unit) for _, group in groupby(runs, key=lambda run: run.case)]
    parts.append(stage_section(stages))
    parts.append(f"<section><h2>Not measured</h2>{unmeasured(runs)}</section>")
    parts.append(f"<section><h2>How to read it</h2>{plain_table(dict(GUIDE))}</section>")
    parts.append(f"<section><h2>Environment</h2>{environment_table(facts)}</section>")
    parts.append(
        f"<section><h2>How to repeat it</h2><pre>{escape(command)}</pre>"
        '<p class="note">Ratios are formed within a round, where the machine was in one state; times of different runs '
        f"should not be divided by each other.</p></section><p class='note'>{escape(caption(dict(facts)))}</p>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>moe-triton bench</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
