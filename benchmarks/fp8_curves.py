"""The language model of `moe-triton train` with its experts in bf16 and in fp8, three seeds each: loss curves.

    python benchmarks/fp8_curves.py            # all runs
    python benchmarks/fp8_curves.py --report   # the table and the chart of what is there

Writes curves.json run by run, and goes on from there when it is started again; then curves.md and curves.png. Two runs
of a seed have the same first weights and the same batches; everything but the experts is in bf16 in both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
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
NAMES = {False: "bf16", True: "fp8"}  # by a run's `fp8`
COLORS = {"bf16": "#1f6f8b", "fp8": "#c8553d"}
Runs = dict[str, dict[int, dict[str, Any]]]  # by name and seed


def runs_of(results: dict[str, Any]) -> Runs:
    found: Runs = {name: {} for name in NAMES.values()}
    for run in results["runs"]:
        found[NAMES[run["fp8"]]][run["seed"]] = run
    return found


def table(runs: Runs, results: dict[str, Any]) -> str:
    """Markdown: the held-out losses of every seed and their means, and what fp8 adds to bf16 in percent."""
    config = results["config"]
    lines = [
        f"{config['steps']} steps of {config['batch_size']} x {config['seq_len']} bytes; {config['num_layers']} layers,"
        f" d = {config['hidden_size']}, n = {config['intermediate_size']}, {config['num_experts']} experts,"
        f" {config['top_k']} per token; {results['processor']}, fp8 emulated.",
        "",
        "| seed | bf16, held-out loss (nats per byte) | fp8 | difference |",
        "|---|--:|--:|--:|",
    ]
    seeds = sorted(runs["bf16"].keys() & runs["fp8"].keys())
    rows = [(str(seed), *(runs[name][seed]["held_out_loss"] for name in NAMES.values())) for seed in seeds]
    if rows:
        rows.append(("mean", mean(row[1] for row in rows), mean(row[2] for row in rows)))
    lines += [f"| {seed} | {bf16:.4f} | {fp8:.4f} | {fp8 / bf16 - 1:+.2%} |" for seed, bf16, fp8 in rows]
    return "\n".join(lines) + "\n"


def draw(path: Path, runs: Runs, steps: int) -> None:
    """Training loss of every run over the steps, and beside it the difference of the two means in percent."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    means = {}
    for name, by_seed in runs.items():
        curves = [run["curve"] for run in by_seed.values()]
        means[name] = [mean(values) for values in zip(*curves, strict=True)]
        middles = [(index + 0.5) * steps / len(means[name]) for index in range(len(means[name]))]
        for curve in curves:
            left.plot(middles, curve, color=COLORS[name], alpha=0.25, linewidth=0.8)
        left.plot(middles, means[name], color=COLORS[name], label=f"{name}, mean of {len(curves)}", linewidth=1.6)
    difference = [100 * (fp8 / bf16 - 1) for bf16, fp8 in zip(means["bf16"], means["fp8"], strict=True)]
    right.plot(middles, difference, color=COLORS["fp8"])
    right.axhline(0, color="black", linewidth=0.6)
    right.axhspan(-0.5, 0.5, color="black", alpha=0.06)
    left.set_title("training loss (nats per byte)", fontsize=9, loc="left")
    right.set_title("fp8 over bf16, difference of the means (%); grey: 0.5%", fontsize=9, loc="left")
    left.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    replace_file(path, [picture.getvalue()])


def report(out: Path) -> None:
    results = json.loads((out / "curves.json").read_text(encoding="utf-8"))
    runs = runs_of(results)
    text = table(runs, results)
    replace_file(out / "curves.md", [text.encode()])
    draw(out / "curves.png", runs, results["config"]["steps"])
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of a run (default: {STEPS})")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        jobs = [("moe", {"seed": seed, "fp8": fp8}) for seed in SEEDS for fp8 in NAMES]
        common: dict[str, Any] = {"steps": options.steps, "dtype": "bfloat16", **SIZES}
        run_all(options.out / "curves.json", jobs, "held_out", workers=options.jobs, points=POINTS, **common)
    report(options.out)


if __name__ == "__main__":
    main()
