"""Charts of the load, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_triton.metrics.statistics import LoadStatistics
from moe_triton.runtime import check_matplotlib


def plot_load(history: Sequence[Mapping[str, LoadStatistics]], path: str | Path) -> None:
    """Write a PNG of what `LoadMonitor.read` gave over time: busiest and idlest expert, entropy and dropped share.

    One curve per layer. ValueError for an empty history, ImportError without matplotlib.
    """
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if not history:
        raise ValueError("history: got nothing, wanted at least one reading")
    layers = list(dict.fromkeys(name for reading in history for name in reading))
    panels = (
        ("max_load", "busiest expert, times the mean load"),
        ("min_load", "idlest expert, times the mean load"),
        ("entropy", "entropy of the load (1: even)"),
        ("dropped", "dropped share of the assignments"),
    )
    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    for axes, (field, title) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
        for layer in layers:
            points = [
                (at, value)
                for at, reading in enumerate(history, 1)
                if layer in reading and (value := getattr(reading[layer], field)) is not None
            ]
            axes.plot([at for at, _ in points], [value for _, value in points], label=layer, linewidth=1.4)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_ylim(0, 1.05 if field == "entropy" else None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if field == "dropped":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    figure.supxlabel("reading", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, format="png")


def plot_load_map(reading: Mapping[str, LoadStatistics], path: str | Path) -> None:
    """Write a PNG of one reading of `LoadMonitor.read`: layers x experts, coloured by load, on a scale of powers of 2.

    White is the mean load, red above it and blue below; grey with a cross is no load. ValueError for an empty
    reading, ImportError without matplotlib.
    """
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not reading:
        raise ValueError("reading: got nothing, wanted at least one layer")
    num_experts = max(len(statistics.loads) for statistics in reading.values())
    busiest = max(statistics.max_load for statistics in reading.values())
    limit = min(4, max(1, math.ceil(math.log2(busiest))))  # to a sixteenth and 16 times at most
    powers, dead = [], []
    for row, statistics in enumerate(reading.values()):
        missing = [math.nan] * (num_experts - len(statistics.loads))
        powers.append([math.log2(load) if load else math.nan for load in statistics.loads] + missing)
        dead += [(expert, row) for expert in statistics.dead_experts]

    width, height = min(16.0, max(6.0, 3.5 + 0.16 * num_experts)), min(20.0, max(2.8, 1.6 + 0.24 * len(reading)))
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(powers, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    if dead:
        experts, rows = zip(*dead, strict=True)
        axes.set_facecolor("lightgrey")
        axes.scatter(experts, rows, marker="x", color="black", s=14, linewidths=0.9)
    axes.set_yticks(range(len(reading)), list(reading), fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("expert", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title(f"load of the experts{f'; x: no load ({len(dead)})' if dead else ''}", fontsize=10, loc="left")
    ticks = range(-limit, limit + 1)
    labels = [f"1/{2**-power}" if power < 0 else str(2**power) for power in ticks]
    bar = figure.colorbar(image, ticks=list(ticks), extend="both", label="times the mean load")
    bar.ax.set_yticklabels(labels, fontsize=8)
    figure.savefig(path, format="png")
