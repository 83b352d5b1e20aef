"""Makes every table of figures in README.md, docs/ and benchmarks/README.md from the files in benchmarks/results/.

    PYTHONPATH=src:kernels python benchmarks/tables.py           # writes the documents
    PYTHONPATH=src:kernels python benchmarks/tables.py --check   # exits with 1, and names those that would change

benchmarks/README.md is a whole page; in the other documents a table lies between two markers,

    <!-- table: NAME (benchmarks/tables.py) -->
    <!-- end of table -->

and NAME is one of `TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from fp8_curves import table as fp8_table  # noqa: E402
from gpu_benches.page import gpu_table, markdown, number, page  # noqa: E402

from moe_triton.benchmarking.report import MODE_NAMES, factor, milliseconds, spread_cell, three_digits, write_text  # noqa: E402
from moe_triton.benchmarking.results import read_results  # noqa: E402
from moe_triton.benchmarking.timing import Spread  # noqa: E402
from moe_triton.simulate.published import validate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "README.md"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- table: (.+?) \(benchmarks/tables\.py\) -->\n).*?(<!-- end of table -->)", re.DOTALL)
PUBLISHED = {  # what a point of `published.validate` measures -> and where
    "DeepEP normal dispatch": "DeepEP dispatch, bandwidth, 3 kinds of node, EP8 to EP32",
    "DeepEP low-latency dispatch": "DeepEP low-latency dispatch, EP8 to EP256",
    "DeepEP low-latency combine": "DeepEP low-latency combine, EP8 to EP256",
    "NCCL all-to-all, 8 x B300": "NCCL all-to-all on 8 x B300, 4 to 32 MB",
    "SonicMoE backward, H100": "SonicMoE backward kernels on H100, twelve shapes",
}
KINDS = {"moe": "mixture of experts", "dense": "dense"}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def learning_rates() -> str:
    runs = load("training/learning_rates.json")["runs"]
    rates = sorted({run["lr"] for run in runs})
    rows = []
    for kind, label in KINDS.items():
        losses = {run["lr"]: run["validation_loss"] for run in runs if run["model"] == kind}
        best = min(losses.values())
        rows.append([label, *(f"**{losses[r]:.4f}**" if losses[r] == best else f"{losses[r]:.4f}" for r in rates)])
    return markdown(["peak learning rate", *(f"{rate:g}" for rate in rates)], rows)


def seeds() -> str:
    found = load("training/seeds.json")
    losses = {
        kind: {run["seed"]: run["held_out_loss"] for run in found["runs"] if run["model"] == kind} for kind in KINDS
    }
    names = sorted(losses["moe"])
    rows = [
        [label, *(f"{losses[kind][s]:.4f}" for s in names), f"{mean(all_of):.4f}", f"{stdev(all_of):.4f}"]
        for kind, label in KINDS.items()
        if (all_of := [losses[kind][s] for s in names])
    ]
    headings = ["held-out loss, nats per byte", *(f"seed {seed}" for seed in names), "mean", "standard deviation"]
    ahead = mean(losses["dense"].values()) - mean(losses["moe"].values())
    times = ahead / max(stdev(values.values()) for values in losses.values())
    versions = found["versions"]
    lines = (
        markdown(headings, rows),
        "",
        f"The mixture of experts is ahead by {ahead:.3f} nats per byte, {times:.1f} times the larger standard "
        "deviation over seeds.",
        f"{found['processor']} ({found['machine']}), torch {versions['torch']}, Python {versions['python']}.",
    )
    return "\n".join(lines)


def cpu_suite() -> str:
    """The forward and the whole step of the CPU suite; everything else is in the file."""
    peers = {"hf-eager": "over eager", "hf-grouped_mm": "over grouped_mm", "deepspeed": "over DeepSpeed"}
    rows = []
    for run in read_results(RESULTS / "cpu" / "cpu-2-cores.json", "cpu").runs:
        own = None if run.ours is None else run.row(run.ours)
        if own is None or own.time_s is None or run.mode == "backward":
            continue
        shape = run.case.title().replace("float32", "fp32").replace("bfloat16", "bf16")
        speedups = [f"{factor(run.speedups[name].p50)}x" if name in run.speedups else "" for name in peers]
        rows.append([shape, MODE_NAMES[run.mode], milliseconds(own.time_s.p50), number(own.of["roof"].p50), *speedups])
    return markdown(["shape", "pass", "ms", "of roof", *peers.values()], rows)


def expert_parallel() -> str:
    rows = []
    for row in load("cpu/expert-parallel.json")["rows"]:
        cells = [str(row["processes"]), f"{row['tokens_per_s']:,.0f}"]
        if "exchange_s" in row:
            is_fitted = row["predicted_exchange_s"] == row["exchange_s"]
            cells += [milliseconds(row["exchange_s"]), f"{row['exchange_share']:.1%}"]
            cells.append("fitted" if is_fitted else milliseconds(row["predicted_exchange_s"]))
        rows.append([*cells, *["-"] * (5 - len(cells))])
    return markdown(
        ["processes", "tokens/s", "one all-to-all, ms", "share of the step (4 of them)", "predicted, ms"], rows
    )


def deepspeed_layer() -> str:
    rows = []
    for row in load("deepspeed/layer.json")["rows"]:
        faster = row["times_faster"]
        rows.append(
            [
                "dropped, capacity factor 1" if row["drop_tokens"] else "all kept",
                str(row["experts"]),
                str(row["k"]),
                *(milliseconds(row["seconds"][name]["p50"]) for name in ("moe_triton", "deepspeed")),
                f"{faster['p50']:.2f} ({faster['p20']:.2f} to {faster['p80']:.2f})",
            ]
        )
    return markdown(["tokens", "experts", "k", "here, ms", "DeepSpeed, ms", "times faster (20% to 80%)"], rows)


def deepspeed_groups(found: dict[str, Any] | None = None) -> str:
    """Of a record of benchmarks/deepspeed_groups.py; None: the committed one."""
    found = load("deepspeed/groups-amd-epyc.json") if found is None else found
    ways = list(dict.fromkeys(key.split(": ")[1] for key in found["step_seconds"]))
    rows = []
    for by, sizes in found["groups"].items():
        times = [found["step_seconds"].get(f"{by}: {way}") for way in ways]
        largest = f"{4 * sizes['largest_elements'] / 2**20:.1f}"
        rows.append(
            [by, str(sizes["groups"]), largest, *("-" if t is None else spread_cell(Spread(**t)) for t in times)]
        )
    return markdown(["by", "groups", "largest group, MiB", *(f"{way}, ms" for way in ways)], rows)


def colossalai_drawbacks() -> str:
    providers = {"moe_triton": "here", "dense": "dense dispatch"}
    rows = []
    for row in load("colossalai/drawbacks.json")["rows"]:
        cells = [str(row["tokens"])]
        for name in providers:
            found = row["providers"][name]
            mebibytes = found["peak_bytes"] / 2**20
            cells += [
                f"{found['tokens_per_second']:,.0f}",
                f"{mebibytes:,.0f}" if mebibytes >= 1000 else three_digits(mebibytes),
            ]
        rows.append(cells)
    return markdown(["S", *(f"{label}, {what}" for label in providers.values() for what in ("tokens/s", "peak MiB"))],
                    rows)  # fmt: skip


def colossalai_digits() -> str:
    found = load("colossalai/digits.json")
    processes = [str(count) for count in found["processes"]]
    listed = f"{', '.join(processes[:-1])} and {processes[-1]}"
    rows = [
        [
            str(run["seed"]),
            ", ".join(f"{accuracy:.2%}" for accuracy in run["accuracy"]),
            " ".join(f"{loss:.6f}" for loss in run["first_losses"]),
            ", ".join(f"{seconds:.0f}" for seconds in run["seconds"]),
        ]
        for run in found["runs"]
    ]
    headings = ["seed", f"accuracy on {listed} processes", "first losses, the same on all"]
    return markdown([*headings, f"seconds on {', '.join(processes)}"], rows)


def gpu() -> str:
    """The runs of `make gpu`: the layer in short."""
    return gpu_table(RESULTS)


def quantization_error() -> str:
    rows = [
        [
            row["format"],
            f"{row['bits']:.4g}",
            *(f"{row[key]:.1f}" for key in ("weights_db", "output_db", "grad_hidden_db")),
        ]
        for row in load("quantization/error.json")["rows"]
    ]
    headings = ["format", "bits a weight", "weights, dB", "output, dB", "gradient of x, dB"]
    return markdown(headings, rows)


def fp8_error() -> str:
    rows = [
        [row["what"], *(f"{row[key]:.1f}" for key in ("output_db", "grad_hidden_db", "grad_projections_db"))]
        for row in load("quantization/error.json")["fp8_products"]
    ]
    return markdown(["", "output, dB", "gradient of x, dB", "gradient of a projection, dB"], rows)


def fp8_curves() -> str:
    return fp8_table(load("fp8/curves.json"))


def cost_model() -> str:
    """What `moe-triton simulate --validate` finds where nothing was fitted."""
    errors: dict[str, list[float]] = {}
    for point in validate():
        if not point.fitted:
            errors.setdefault(point.what, []).append(abs(point.error))
    rows = [[PUBLISHED.get(what, what), str(len(found)), f"{max(found):.1%}"] for what, found in errors.items()]
    return markdown(["published measurement", "points", "largest error"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "learning rates": learning_rates,
    "seeds": seeds,
    "CPU suite": cpu_suite,
    "expert parallel": expert_parallel,
    "DeepSpeed layer": deepspeed_layer,
    "DeepSpeed groups": deepspeed_groups,
    "Colossal-AI drawbacks": colossalai_drawbacks,
    "Colossal-AI digits": colossalai_digits,
    "quantisation error": quantization_error,
    "fp8 error": fp8_error,
    "fp8 curves": fp8_curves,
    "cost model": cost_model,
    "GPU": gpu,
}


def filled(text: str) -> str:
    """A document with its tables made anew. ValueError for a marker without an end, or a name that is not known."""
    if len(MARKED.findall(text)) != text.count("<!-- table: ") or text.count("<!-- end of table -->") != text.count(
        "<!-- table: "
    ):
        raise ValueError("a marker of a table has no partner")

    def fill(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in TABLES:
            raise ValueError(f"table: got {name!r}, wanted one of {', '.join(TABLES)}")
        return f"{begin}{TABLES[name]()}\n{end}"

    return MARKED.sub(fill, text)


def wanted() -> dict[Path, str]:
    """Every document with what it should be."""
    return {PAGE: page(RESULTS)} | {path: filled(path.read_text(encoding="utf-8")) for path in DOCUMENTS}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something would change")
    options = parser.parse_args(arguments)
    stale = {path: text for path, text in wanted().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if not options.check:
            write_text(path, text)
        print(f"{path.relative_to(ROOT)}: {'differs from its results' if options.check else 'written'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
