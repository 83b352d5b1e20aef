"""The language model of `moe-triton train` in bf16, with its experts in fp8, and how far other rounding leads.

    python benchmarks/fp8_curves.py            # all runs
    python benchmarks/fp8_curves.py --report   # the table and the chart of what is there

Writes curves.json run by run, and goes on from there when it is started again; then curves.png, and prints the table
that benchmarks/tables.py puts into docs/few_bits.md. The runs of a seed have the same first weights and the same
batches, and fp32 for all that is kept (parameters, AdamW's moments) and for the router, norms and loss. In bf16 and
fp8 everything else is the same but for the experts' products. Runs in bf16 by the reference, whose sums have another
order, and in fp32 show what other rounding does by itself; further seeds of bf16 and fp8, how far three can be trusted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from training_sweep import SEEDS, run_all

from moe_triton.files import replace_file

RESULTS = Path(__file__).parent / "results" / "fp8"
STEPS = 600
POINTS = 60  # of a curve
# groups of 128 are whole in both products, and the default learning rate is for half this width
SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "num_heads": 4, "num_experts": 8, "batch_size": 16, "lr": 8e-3,
}  # fmt: skip
NAMES = {  # by dtype, `fp8` and backend
    ("bfloat16", False, "auto"): "bf16", ("bfloat16", True, "auto"): "fp8",
    ("bfloat16", False, "reference"): "bf16 by other sums", ("float32", False, "auto"): "fp32",
}  # fmt: skip
FURTHER = (3, 4, 5)  # seeds of bf16 and fp8 alone
COLORS = {"fp32": "#8a8a8a", "bf16": "#1f6f8b", "fp8": "#c8553d", "bf16 by other sums": "#8a6bb1"}
Runs = dict[str, dict[int, dict[str, Any]]]  # by name and seed


def runs_of(results: dict[str, Any]) -> Runs:
    found: Runs = {}
    for run in results["runs"]:
        found.setdefault(NAMES[run["dtype"], run["fp8"], run.get("backend", "auto")], {})[run["seed"]] = run
    return found


def differences(losses: dict[int, float], bases: dict[int, float], seeds: Sequence[int]) -> str:
    """The mean loss over seeds, and beside it how far from the mean of the others, with its standard error."""
    percent = [100 * (losses[seed] / bases[seed] - 1) for seed in seeds]
    middle = mean(losses[seed] for seed in seeds)
    distance = 100 * (middle / mean(bases[seed] for seed in seeds) - 1)
    return f"{middle:.4f} ({distance:+.2f}% ± {stdev(percent) / len(percent) ** 0.5:.2f}%)"


def table(results: dict[str, Any]) -> str:
    """Markdown: the held-out losses of every seed and their means, and the differences to bf16 in percent."""
    runs, config = runs_of(results), results["config"]
    titles = ("bf16, held-out loss in nats per byte", "experts in fp8", "bf16 by other sums", "all in fp32")
    lines = [f"| seed | {' | '.join(titles)} |", "|---|--:|--:|--:|--:|"]
    base, *others = (
        {seed: run["held_out_loss"] for seed, run in runs.get(name, {}).items()} for name in NAMES.values()
    )
    for seed in sorted(base):
        cells = [f"{of[seed]:.4f} ({of[seed] / base[seed] - 1:+.2%})" if seed in of else "-" for of in others]
        lines.append(f"| {seed} | {base[seed]:.4f} | {' | '.join(cells)} |")
    for seeds in (SEEDS, (*SEEDS, *FURTHER)):
        cells = [differences(of, base, seeds) if {*seeds} <= {*of} & {*base} else "-" for of in others]
        if any(cell != "-" for cell in cells):
            about = f"mean of {seeds[0]} to {seeds[-1]}"
            lines.append(f"| {about} | {mean(base[seed] for seed in seeds):.4f} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{config['steps']} steps of {config['batch_size']} sequences of {config['seq_len']} bytes;"
        f" {config['num_layers']} layers, d = {config['hidden_size']}, n = {config['intermediate_size']},"
        f" {config['num_experts']} experts, {config['top_k']} per token,"
        f" {results['runs'][0]['parameters']:,} parameters.",
        "±: the standard error of a mean, by the differences of its seeds.",
        f"{results['processor']} ({results['machine']}), torch {results['versions']['torch']}; fp8 is emulated there.",
    ]
    return "\n".join(lines)


def means_of(curves: list[list[float]]) -> list[float]:
    return [mean(values) for values in zip(*curves, strict=True)]


def draw(path: Path, runs: Runs, steps: int) -> None:
    """Training loss of every run over the steps, and beside it the differences of the means to bf16 in percent."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, by_seed in runs.items():
        curves = [run["curve"] for run in by_seed.values()]
        middles = [(index + 0.5) * steps / len(curves[0]) for index in range(len(curves[0]))]
        for curve in curves:
            left.plot(middles, curve, color=COLORS[name], alpha=0.25, linewidth=0.8)
        left.plot(middles, means_of(curves), color=COLORS[name], label=f"{name}, mean of {len(curves)}", linewidth=1.6)
        if name != "bf16":
            bases = means_of([runs["bf16"][seed]["curve"] for seed in by_seed])
            percent = [100 * (here / base - 1) for here, base in zip(means_of(curves), bases, strict=True)]
            right.plot(middles, percent, color=COLORS[name], label=f"{name} over bf16")
    right.axhline(0, color="black", linewidth=0.6)
    right.axhspan(-0.5, 0.5, color="black", alpha=0.06)
    left.set_title("training loss (nats per byte)", fontsize=9, loc="left")
    right.set_title("difference of the means (%); grey: 0.5%", fontsize=9, loc="left")
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    replace_file(path, [picture.getvalue()])


def report(out: Path) -> None:
    results = json.loads((out / "curves.json").read_text(encoding="utf-8"))
    draw(out / "curves.png", runs_of(results), results["config"]["steps"])
    print(table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of a run (default: {STEPS})")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        kinds = [(seed, kind) for seed in SEEDS for kind in NAMES]
        kinds += [(seed, kind) for seed in FURTHER for kind in list(NAMES)[:2]]
        jobs = [
            ("moe", {"seed": seed, **dict(zip(("dtype", "fp8", "backend"), kind, strict=True))}) for seed, kind in kinds
        ]
        common: dict[str, Any] = {"steps": options.steps, **SIZES}
        run_all(options.out / "curves.json", jobs, "held_out", workers=options.jobs, points=POINTS, **common)
    report(options.out)


if __name__ == "__main__":
    main()
