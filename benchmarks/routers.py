"""Every router of `moe-triton train --router`, three seeds each: held-out loss, load and dropped assignments.

    python benchmarks/routers.py                                # all routers, 400 steps each
    python benchmarks/routers.py --only softmax,token_rounding  # some of them
    python benchmarks/routers.py --report                       # the table and the chart of what is there

Writes routers.json run by run, and goes on from there when it is started again; then routers.md and routers.png.
Learning rate and sizes are the defaults, which were chosen for softmax: a router may do better with others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from training_sweep import SEEDS, run_all

from moe_triton.files import replace_file
from moe_triton.training.config import TrainConfig
from moe_triton.training.routers import ROUTERS

RESULTS = Path(__file__).parent / "results" / "routers"
STEPS = 400
COLUMNS = {  # of a run: the table's heading, and digits
    "held_out_loss": ("held-out loss (nats per byte)", 4),
    "load_entropy": ("load entropy", 3),
    "dropped": ("dropped share", 4),
    "experts_per_token": ("experts per token", 2),
}
NOTES = {
    "expert_choice": "not causal: a token's experts depend on later bytes, also in held-out text: its loss is too low",
    "forced_balance": "for benchmarks: the choice does not depend on the token",
    "token_rounding": "in training only; what it drops is not in the dropped share, but in the experts per token",
}


class Row:
    """What the seeds of a router gave."""

    def __init__(self, name: str, runs: list[dict[str, Any]]) -> None:
        self.name = name
        self.seeds = len(runs)
        self.means = {column: mean(run[column] for run in runs) for column in COLUMNS}
        self.spread = stdev(run["held_out_loss"] for run in runs) if len(runs) > 1 else 0.0


def rows_of(results: dict[str, Any]) -> list[Row]:
    """One row for each router, the lowest held-out loss first."""
    by_router: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        by_router.setdefault(run["router"], []).append(run)
    rows = [Row(name, runs) for name, runs in by_router.items()]
    return sorted(rows, key=lambda row: row.means["held_out_loss"])


def table(rows: list[Row], results: dict[str, Any]) -> str:
    """Markdown, with the difference to softmax in percent."""
    base = next((row.means["held_out_loss"] for row in rows if row.name == "softmax"), None)
    config = results["config"]
    lines = [
        f"{config['steps']} steps of {config['batch_size']} x {config['seq_len']} bytes;"
        f" {config['num_experts']} experts, {config['top_k']} per token,"
        f" capacity factor {config['capacity_factor']:g} in training;"
        f" {results['processor']}. Load, dropped share and experts per token: of the last tenth of the steps.",
        "",
        "| router | seeds | " + " | ".join(title for title, _ in COLUMNS.values()) + " | vs. softmax |",
        "|---|--:|" + "--:|" * (len(COLUMNS) + 1),
    ]
    for row in rows:
        cells = [f"{row.means[column]:.{digits}f}" for column, (_, digits) in COLUMNS.items()]
        cells[0] += f" ± {row.spread:.4f}"
        difference = "" if base is None else f"{row.means['held_out_loss'] / base - 1:+.2%}"
        mark = "\\*" if row.name in NOTES else ""
        lines.append(f"| `{row.name}`{mark} | {row.seeds} | " + " | ".join(cells) + f" | {difference} |")
    notes = [f"\\* `{row.name}`: {NOTES[row.name]}." for row in rows if row.name in NOTES]
    return "\n".join([*lines, "", *(line for note in notes for line in (note, ""))]).rstrip() + "\n"


def draw(path: Path, rows: list[Row]) -> None:
    """Losses as points with one standard deviation, the rest as bars; the routers in the order of the table."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.28 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, column in zip(panels, ("held_out_loss", "load_entropy", "dropped"), strict=True):
        values = [row.means[column] for row in rows]
        if column == "held_out_loss":  # no bar, since it does not start at 0
            axes.errorbar(values, range(len(rows)), xerr=[row.spread for row in rows], fmt="o", color="#1f6f8b")
            axes.grid(axis="x", alpha=0.3)
        else:
            axes.barh(range(len(rows)), values, color="#1f6f8b", height=0.66)
        axes.set_title(COLUMNS[column][0], fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row.name for row in rows])
    panels[0].invert_yaxis()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    replace_file(path, [picture.getvalue()])


def report(out: Path) -> None:
    results = json.loads((out / "routers.json").read_text(encoding="utf-8"))
    rows = rows_of(results)
    text = table(rows, results)
    replace_file(out / "routers.md", [text.encode()])
    draw(out / "routers.png", rows)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--only", default=",".join(ROUTERS), help="comma-separated routers (default: all)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of a run (default: {STEPS})")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        names = options.only.split(",")
        TrainConfig(router=next((name for name in names if name not in ROUTERS), "softmax"))  # names an unknown one
        jobs = [("moe", {"seed": seed, "router": name}) for seed in SEEDS for name in names]
        run_all(options.out / "routers.json", jobs, "held_out", workers=options.jobs, steps=options.steps)
    report(options.out)


if __name__ == "__main__":
    main()
