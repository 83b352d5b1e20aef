"""The picture of a profile's memory: what torch held over one step, under the names of what ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_triton.benchmarking.chart import save
from moe_triton.benchmarking.profiling import Trace

COLOURS = ("#dbe7f0", "#f0e6db")  # of neighbouring ranges
MIN_SHARE = 0.04  # a range narrower than this share of the picture goes without its name
LINE = "#1f6f8b"


def draw_memory(path: Path, trace: Trace, first: str, title: str) -> bool:
    """Writes a PNG of the last step, which begins with the range `first`; False where nothing was recorded."""
    from matplotlib.figure import Figure

    starts = [found.start_us for found in trace.ranges if found.name == first]
    if not starts or not trace.memory:
        return False
    shown = outermost(trace, max(starts))
    begin = max(starts)
    end = max(found.end_us for found in trace.ranges if found.start_us >= begin)
    points = [m for m in trace.memory if begin <= m.at_us <= end]
    if not points:
        return False
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    axes: Any = figure.subplots()
    for number, found in enumerate(shown):
        left, right = (found.start_us - begin) / 1e3, (found.end_us - begin) / 1e3
        axes.axvspan(left, right, color=COLOURS[number % 2], linewidth=0)
        if right - left > MIN_SHARE * (end - begin) / 1e3:
            place = ((left + right) / 2, 1.01)
            style = {"ha": "left", "va": "bottom", "fontsize": 8, "rotation": 30, "rotation_mode": "anchor"}
            axes.annotate(found.name, place, xycoords=axes.get_xaxis_transform(), **style)
    mebibytes = [m.bytes / 2**20 for m in points]
    axes.step([(m.at_us - begin) / 1e3 for m in points], mebibytes, where="post", color=LINE, linewidth=1.2)
    axes.set_xlim(0, (end - begin) / 1e3)
    axes.set_ylim(0, 1.08 * max(*mebibytes, 1e-3))
    axes.set_xlabel("ms of one step (with the profiler's own overhead)", fontsize=9)
    axes.set_ylabel("MiB held", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    save(path, figure)
    return True


def outermost(trace: Trace, begin_us: float) -> list[Any]:
    """The ranges from `begin_us` on that lie in no other one, save a whole step, whose parts are shown."""
    found: list[Any] = []
    for candidate in trace.ranges:
        if candidate.start_us < begin_us or candidate.name == "step":
            continue
        if not found or candidate.start_us >= found[-1].end_us:
            found.append(candidate)
    return found or [r for r in trace.ranges if r.start_us == begin_us]
