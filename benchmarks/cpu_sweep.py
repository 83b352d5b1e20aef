"""From one token to thousands on a CPU: our layer beside every peer, as a table, a chart and JSON.

    python benchmarks/cpu_sweep.py                                          # all of it, more than an hour
    python benchmarks/cpu_sweep.py --layers OLMoE --budget 4000 --add       # one layer, beside what was measured before
    python benchmarks/cpu_sweep.py --tokens 1,4 --budget 60 --out FOLDER    # some numbers of tokens

Three layers: a tiny one, where the cost of a call is all there is, and those of two published models. The budget is for
all cells. A cell that needs much more than its share of it for one round is left out, and the table says so. What
counts is the median of the rounds' ratios, peer over ours; 3% is a tie. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_triton.benchmarking.cases import Case
from moe_triton.benchmarking.environment import caption, environment
from moe_triton.benchmarking.providers import PROVIDERS
from moe_triton.benchmarking.report import write_json
from moe_triton.benchmarking.results import Run, run_from
from moe_triton.benchmarking.runner import measure_case
from moe_triton.cli.display import StepDisplay
from moe_triton.files import replace_file
from moe_triton_kernels.tools.models import Layer

RESULTS = Path(__file__).parent / "results" / "cpu"
LAYERS = {  # by their config.json at huggingface.co, but for the first
    "tiny": Layer(64, 64, 8, 2),
    "Granite-3.1-1B-A400M": Layer(1024, 512, 32, 8),
    "OLMoE": Layer(2048, 1024, 64, 8),
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
MODES = ("forward", "full")
PEERS = ("grouped_mm", "hf-eager", "hf-grouped_mm", "deepspeed")
TIE = 0.03
RATIOS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)  # of the chart's axis
SLOW_FLOPS = 20e9  # per second and thread, of a slow peer: what a round takes at most is reckoned with it


@dataclass(frozen=True)
class Part:
    """What one call of this script measured.

    left_out   the cells that took too long
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    runs: list[Run]
    left_out: list[dict[str, Any]]

    def without(self, other: Part) -> Part:
        """All but the cells that the other part has too."""
        there = {(run.case.name, run.case.tokens, run.mode) for run in other.runs}
        there |= {(cell["name"], cell["tokens"], cell["mode"]) for cell in other.left_out}
        return replace(
            self,
            runs=[run for run in self.runs if (run.case.name, run.case.tokens, run.mode) not in there],
            left_out=[cell for cell in self.left_out if (cell["name"], cell["tokens"], cell["mode"]) not in there],
        )


def read(path: Path) -> list[Part]:
    """The parts of a file, or none where there is no file."""
    if not path.exists():
        return []
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    return [Part(**{**part, "runs": list(map(run_from, part["runs"]))}) for part in parts]


def fits(case: Case, mode: str, seconds: float) -> bool:
    """Whether every provider can run the case once in so many seconds, also where it is slow."""
    return (len(PEERS) + 2) * case.flops(mode) / (SLOW_FLOPS * torch.get_num_threads()) <= seconds


def measure(cases: Sequence[Case], budget_s: float) -> tuple[list[Run], list[dict[str, Any]]]:
    """The runs, and the cells that were left out."""
    end = time.monotonic() + budget_s
    names = ["auto", *PEERS]
    runs: list[Run] = []
    left_out: list[dict[str, Any]] = []
    display = StepDisplay(len(cases), budget_s / max(1, len(cases)))
    with display as on_step:
        for index, case in enumerate(cases):
            share = max(0.0, end - time.monotonic()) / (len(cases) - index) / len(MODES)
            modes = [mode for mode in MODES if fits(case, mode, 4 * share)]
            left_out += [{**asdict(case), "mode": mode} for mode in MODES if mode not in modes]
            # half of a cell's share is for the checks against float64, which come first
            runs += measure_case(
                case, device=torch.device("cpu"), modes=modes, names=names, budget_s=share / 2, on_step=on_step
            )  # fmt: skip
            display.finish_cell()
    return runs, left_out


def verdict(run: Run) -> str:
    """How the nearest peer does: "1.42x, hf-eager", with "tie" and "behind" where it is no lead."""
    if not run.speedups:
        return "no peer"
    name, found = min(run.speedups.items(), key=lambda item: item[1].p50)
    word = "" if found.p50 > 1 + TIE else " tie" if found.p50 >= 1 - TIE else " behind"
    return f"{found.p50:.2f}x{word}, {name}"


def table(parts: Sequence[Part]) -> str:
    """Markdown: for every cell our time, and how many times as long every peer takes."""
    lines = ["Our time, and each peer's over it; the median of rounds in turns. 3% is a tie."]
    for part in parts:
        lines += [
            "",
            f"{caption(part.environment)}:",
            "",
            f"| layer, {part.settings['dtype']} | T | pass | ours, ms | {' | '.join(PEERS)} | nearest |",
            f"|---|--:|---|--:|{'--:|' * len(PEERS)}---|",
        ]
        lines += map(row_of, part.runs)
        for cell in part.left_out:
            note = "not measured: a round takes more than its share of the budget"
            lines.append(f"| {cell['name']} | {cell['tokens']} | {cell['mode']} |{' |' * (len(PEERS) + 1)} {note} |")
    return "\n".join(lines) + "\n"


def row_of(run: Run) -> str:
    own = run.row(run.ours or "")
    ours = "failed" if own is None or own.time_s is None else f"{1e3 * own.time_s.p50:.3g}"
    cells = [f"{run.speedups[name].p50:.2f}" if name in run.speedups else "-" for name in PEERS]
    steady = "" if run.is_steady else " (not steady)"
    cell = f"| {run.case.name} | {run.case.tokens} | {run.mode} | {ours} | {' | '.join(cells)} |"
    return f"{cell} {verdict(run)}{steady} |"


def draw(path: Path, parts: Sequence[Part]) -> None:
    """Each peer's time over ours by the number of tokens, a panel for every layer and pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(len(MODES), len(LAYERS), sharex=True, squeeze=False)
    for row, mode in enumerate(MODES):
        for axes, name in zip(panels[row], LAYERS, strict=True):
            own = [run for part in parts for run in part.runs if run.case.name == name and run.mode == mode]
            own.sort(key=lambda run: run.case.tokens)
            for peer in PEERS:
                points = [(run.case.tokens, run.speedups[peer].p50) for run in own if peer in run.speedups]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=PROVIDERS[peer].label)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set(xscale="log", yscale="log")
            axes.set_title(f"{name}, {mode}", fontsize=9, loc="left")
            low, high = axes.get_ylim()
            for axis, ticks in ((axes.xaxis, TOKENS), (axes.yaxis, [x for x in RATIOS if low <= x <= high])):
                axis.set_ticks(ticks, labels=[f"{x:g}" for x in ticks])
                axis.set_ticks([], minor=True)
            axes.tick_params(labelsize=8)
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=8, loc="outside lower center", ncols=len(PEERS))
    for axes in panels[-1]:
        axes.set_xlabel("tokens", fontsize=8)
    figure.supylabel("peer's time over ours", fontsize=9)
    figure.suptitle("\n".join(caption(part.environment) for part in parts), fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    replace_file(path, [picture.getvalue()])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="numbers of tokens, comma-separated")
    parser.add_argument("--layers", default=",".join(LAYERS), help=f"some of {', '.join(LAYERS)}")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--budget", type=float, default=1800.0, help="seconds in all (default: 1800)")
    parser.add_argument("--add", action="store_true", help="keep what the files have of other cells")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of cpu-sweep.json, .md and .png")
    options = parser.parse_args(arguments)
    cases = [
        Case(
            tokens=int(tokens), hidden=layer.hidden, intermediate=layer.intermediate, experts=layer.experts,
            top_k=layer.top_k, dtype=options.dtype, name=name,
        )
        for name, layer in ((name, LAYERS[name]) for name in options.layers.split(","))
        for tokens in options.tokens.split(",")
    ]  # fmt: skip
    path = options.out / "cpu-sweep.json"
    before = read(path) if options.add else []
    torch.set_num_threads(options.threads)
    runs, left_out = measure(cases, options.budget)
    settings = {name: getattr(options, name) for name in ("dtype", "threads", "budget")}
    part = Part(environment(torch.device("cpu")), settings, runs, left_out)
    kept = [other for other in (other.without(part) for other in before) if other.runs or other.left_out]
    parts = [*kept, part]
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"parts": list(map(asdict, parts))})
    text = table(parts)
    replace_file(options.out / "cpu-sweep.md", [text.encode()])
    draw(options.out / "cpu-sweep.png", parts)
    print(text)


if __name__ == "__main__":
    main()
