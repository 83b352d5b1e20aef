"""The picture of a run: one panel per case and mode, a bar of speed per provider, and the limits as lines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from moe_triton.benchmarking.environment import caption
from moe_triton.benchmarking.report import MODE_NAMES, factor, speed_unit, three_digits
from moe_triton.benchmarking.results import Run
from moe_triton.files import replace_file

COLOURS = {"ours": "#1f6f8b", "peer": "#b8c4cc"}
LIMITS = {"roof": ("#c8553d", "-"), "dense": ("#7a6c5d", ":"), "floor": ("#8a5a9e", "--")}
PANEL_CHARACTERS = 80  # a label of as many would be as wide as a panel
FAR = 2.5  # limits beyond this many times the fastest bar, or the roof, are left out of the picture


def draw_panel(axes: Any, run: Run, unit: tuple[str, float]) -> None:
    """Bars in the table's order. At our bar stands its share of the limits, at the others how much faster ours is."""
    name, scale = unit
    rows = [row for row in run.rows if row.kind in COLOURS and row.tflops is not None]
    speeds = [run.speed(row) * scale for row in rows]
    bounds = (row for row in run.rows if row.kind == "limit" and row.time_s is not None)
    marks = {row.name: run.speed(row) * scale for row in bounds}
    reach = FAR * max([*speeds, marks.get("roof", 0.0)], default=1.0)
    marks = {bound: at for bound, at in marks.items() if at <= reach}  # a limit far away would squeeze the bars
    title = fill(f"{run.case.title()}, {MODE_NAMES[run.mode]}", 60)
    axes.set_title(title, fontsize=9, loc="left", pad=14)
    axes.barh(range(len(rows)), speeds, color=[COLOURS[row.kind] for row in rows], height=0.66)
    for place, bound in enumerate(sorted(marks, key=lambda bound: marks[bound])):
        at = marks[bound]
        side = "left" if place == len(marks) - 1 else "right" if place == 0 else "center"  # names must not touch
        colour, style = LIMITS[bound]
        axes.axvline(at, color=colour, linestyle=style, linewidth=1.4, zorder=0)
        at_top = {"textcoords": "offset points", "ha": side, "fontsize": 7, "color": colour}
        axes.annotate(bound, (at, 1), (0, 2), xycoords=axes.get_xaxis_transform(), **at_top)
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # the limits' lines end there
    longest = 0
    for index, row in enumerate(rows):
        if row.name in run.speedups:
            text = f"ours is {factor(run.speedups[row.name].p50)}x"
        else:
            text = ", ".join(f"{share.p50:.2f} of {bound}" for bound, share in row.of.items())
        label = f"{three_digits(speeds[index])}  ({text})" if text else three_digits(speeds[index])
        longest = max(longest, len(label))
        beside = {"textcoords": "offset points", "va": "center", "fontsize": 8, "bbox": background}
        axes.annotate(label, (speeds[index], index), (5, 0), **beside)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.invert_yaxis()
    room = 1 - min(longest, 60) / PANEL_CHARACTERS  # for the label at the longest bar
    axes.set_xlim(0, max([*speeds, *marks.values()], default=1.0) / room)
    axes.set_xlabel(name, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path, runs: Sequence[Run], environment: dict[str, Any]) -> None:
    """Writes a PNG. One column per mode when a case was measured in several, else two columns."""
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(run.mode for run in runs))
    columns = len(modes) if len(modes) > 1 else min(2, max(1, len(runs)))
    lines = max(1, -(-len(runs) // columns))
    bars = max((sum(row.kind in COLOURS and row.tflops is not None for row in run.rows) for run in runs), default=1)
    figure = Figure(figsize=(6.4 * columns, (1.3 + 0.24 * bars) * lines + 0.4), dpi=110, layout="constrained")
    unit = speed_unit(runs)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, run in zip(grid.flat, runs, strict=False):
        draw_panel(axes, run, unit)
    for axes in list(grid.flat)[len(runs) :]:
        axes.set_visible(False)
    figure.supxlabel(fill(caption(environment), 100 * columns), fontsize=7, color="#555555")
    save(path, figure)


def save(path: Path, figure: Any) -> None:
    """Writes the whole PNG or leaves the old one."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    replace_file(path, [image.getbuffer()])
