"""Makes the tables of figures in README.md, docs/ and benchmarks/README.md, and the charts in docs/assets/, from the
files in benchmarks/results/; and docs/cli.md and docs/api.md, from the parser and the public names.

    PYTHONPATH=src:kernels python benchmarks/tables.py           # writes the documents
    PYTHONPATH=src:kernels python benchmarks/tables.py --check   # exits with 1, and names those that would change

benchmarks/README.md is a whole page; in the other documents a table lies between two markers,

    <!-- table: NAME (benchmarks/tables.py) -->
    <!-- end of table -->

and NAME is one of `TABLES`. A table whose marker names another script is left alone.
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
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs")]

from figures import Bar, Panel, bar_chart, layer_flow  # noqa: E402
from fp8_curves import table as fp8_table  # noqa: E402
from gpu_benches.page import gpu_table, markdown, number, page  # noqa: E402
from marked_table import MARKED  # noqa: E402
from reference_pages import api_page, cli_page  # noqa: E402
from routers import rows_of  # noqa: E402
from routers import table as routers_table  # noqa: E402

from moe_triton.backends.torch.cpu import RULES  # noqa: E402
from moe_triton.benchmarking.environment import caption  # noqa: E402
from moe_triton.benchmarking.report import MODE_NAMES, factor, milliseconds, spread_cell, three_digits, write_text  # noqa: E402
from moe_triton.benchmarking.results import Run, read_results  # noqa: E402
from moe_triton.benchmarking.timing import Spread  # noqa: E402
from moe_triton.simulate.published import validate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "README.md"
DOCS = ROOT / "docs"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PUBLISHED = {  # what a point of `published.validate` measures -> and where
    "DeepEP normal dispatch": "DeepEP dispatch, bandwidth, three kinds of node, EP8 to EP32",
    "DeepEP normal combine": "DeepEP V2 combine, bandwidth, EP8 to EP32",
    "DeepEP with 24 SMs": "DeepEP V2 on 24 SMs, both ways, EP8 on B200",
    "DeepEP low-latency dispatch": "DeepEP low-latency dispatch, EP8 to EP256",
    "DeepEP low-latency combine": "DeepEP low-latency combine, EP8 to EP256",
    "NCCL all-to-all, 8 x B300": "NCCL all-to-all on 8 x B300, 4 to 32 MB",
    "SonicMoE backward, H100": "SonicMoE backward kernels on H100, twelve shapes",
    "LigerCute forward, H200": "LigerCute layer forward on H200, EP2 to EP8, two models",
    "LigerCute backward, H200": "LigerCute layer backward on H200, EP2 to EP8, two models",
    "Megatron step, GB200": "Megatron-Bridge, whole step on GB200, three models",
    "Megatron step, GB300": "Megatron-Bridge, whole step on GB300, three models",
}
LORA_WAYS = {
    "frozen": "frozen base, ours",
    "lora": "LoRA r=16, ours",
    "deltas": "LoRA, `W + B A` made twice, our experts",
    "grouped_mm": "LoRA by PEFT, transformers grouped_mm",
    "eager": "LoRA by PEFT, transformers eager",
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


PEERS = {"hf-eager": "over eager", "hf-grouped_mm": "over grouped_mm", "deepspeed": "over DeepSpeed"}
LABELS = {"hf-eager": "eager", "hf-grouped_mm": "grouped_mm", "deepspeed": "DeepSpeed"}


def cpu_runs(modes: Sequence[str]) -> list[Run]:
    """The runs of the CPU suite in these modes in which ours was measured."""
    runs = read_results(RESULTS / "cpu" / "cpu-2-cores-zen4.json", "cpu").runs
    return [run for run in runs if run.mode in modes and run.ours is not None and run.row(run.ours).time_s is not None]


def cpu_table(modes: Sequence[str]) -> str:
    rows = []
    for run in cpu_runs(modes):
        own = run.row(run.ours)
        shape = run.case.title().replace("float32", "fp32").replace("bfloat16", "bf16")
        speedups = [f"{factor(run.speedups[name].p50)}x" if name in run.speedups else "" for name in PEERS]
        passes = [MODE_NAMES[run.mode]] if len(modes) > 1 else []
        rows.append([shape, *passes, milliseconds(own.time_s.p50), number(own.of["roof"].p50), *speedups])
    return markdown(["shape", *(["pass"] if len(modes) > 1 else []), "ms", "of roof", *PEERS.values()], rows)


def cpu_suite() -> str:
    """The forward and the whole step of the CPU suite; everything else is in the file."""
    return cpu_table(["forward", "full"])


def cpu_steps() -> str:
    """The whole steps alone."""
    return cpu_table(["full"])


def speed_chart() -> str:
    """How near each provider comes to the roof in a whole step, by dtype."""
    panels = {"float32": Panel("float32", {}), "bfloat16": Panel("bfloat16", {})}
    for run in cpu_runs(["full"]):
        own = run.row(run.ours)
        bars = [Bar("moe_triton", own.of["roof"].p50, number(own.of["roof"].p50))]
        for name, label in LABELS.items():
            if name in run.speedups:
                share = run.row(name).of["roof"].p50
                bars.append(Bar(label, share, f"{number(share)} (ours {factor(run.speedups[name].p50)}x)"))
        sizes = run.case.title().partition(": ")[2].rpartition(" ")[0]
        panels[run.case.dtype].groups[sizes] = bars
    axis = "Forward and backward of the block on two CPU cores, as a share of the roof: longer is faster"
    return bar_chart(list(panels.values()), axis=axis, limit="roof", ours="moe_triton")


FIGURES: dict[str, Callable[[], str]] = {"layer.svg": layer_flow, "speed.svg": speed_chart}


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


def words(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are words, all to the left."""
    return markdown(headings, rows).replace("--:|", "---|")


def comparison() -> str:
    """The peers beside us in short, from docs/comparison.json; "-" is what was not found."""
    found = json.loads((ROOT / "docs" / "comparison.json").read_text(encoding="utf-8"))
    names = [peer["name"] for peer in found["peers"]]
    rows = [
        [row["feature"], row["found"], *(row["peers"].get(name, {}).get("found", "-") for name in names)]
        for row in found["rows"]
    ]
    return words(["", "moe_triton", *names], rows)


def comparison_sources() -> str:
    """Every cell of the comparison with what was found and where."""
    found = json.loads((ROOT / "docs" / "comparison.json").read_text(encoding="utf-8"))
    parts = []
    for row in found["rows"]:
        parts += [f"### {row['feature'][0].upper()}{row['feature'][1:]}", "", f"**moe_triton**: {row['ours']}"]
        parts += [f"See [{row['page']}]({row['page']}).", ""]
        cells = [[name, cell["found"], f"[{cell['text']}]({cell['source']})"] for name, cell in row["peers"].items()]
        if cells:
            parts += [words(["peer", "", "what, and where we read it"], cells), ""]
        missing = [peer["name"] for peer in found["peers"] if peer["name"] not in row["peers"]]
        if missing:
            parts += [f"Not found: {', '.join(missing)}.", ""]
    return "\n".join(parts).rstrip()


def comparison_peers() -> str:
    found = json.loads((ROOT / "docs" / "comparison.json").read_text(encoding="utf-8"))
    rows = [
        [
            f"[{peer['name']}]({peer['repository']})",
            peer["what"],
            f"`{peer['commit']}`, of {peer['date']}" if peer["commit"] else "single files, at the commits in the links",
        ]
        for peer in found["peers"]
    ]
    return words(["peer", "what it is", f"commit that we read on {found['read']}"], rows)


def commands() -> str:
    """What each command is for, and a line that it printed."""
    rows = [
        [
            f"`moe-triton {row['name']}`",
            row["question"],
            "the table under Speed" if row["line"] is None else f"`{row['line']}`",
        ]
        for row in load("cli/lines.json")["commands"]
    ]
    return words(["command", "what it answers", "a line of its output"], rows)


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


def fp8_parts() -> str:
    rows = [[row["what"], f"{row['output_db']:.1f}"] for row in load("quantization/error.json")["fp8_parts"]]
    return markdown(["rounded to e4m3", "output of the experts, dB"], rows)


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


def routers() -> str:
    results = load("routers/routers.json")
    return routers_table(rows_of(results), results)


def lora_cost() -> str:
    """What adapters on the experts cost beside the frozen base, in fp32 and bf16."""
    found = [load(f"cpu/{name}.json") for name in ("lora-cost", "lora-cost-bf16")]
    rows = [
        [
            f"{LORA_WAYS[name]}, {result['shape']['dtype']}",
            three_digits(1e3 * way["seconds"]["p50"]),
            f"{way['times_frozen']['p50']:.2f}",
            f"{way['saved_bytes'] / 2**20:.1f}",
        ]
        for result in found
        for name, way in result["ways"].items()
    ]
    header = ["forward and backward", "ms", "times the frozen base", "saved, MiB"]
    return f"{markdown(header, rows)}\n\n{caption(found[0])}"


def cpu_codes() -> str:
    """Decoding over every format of few bits on a CPU, beside bf16."""
    found = load("cpu/codes.json")
    rows = [
        [name, f"{1e3 * way['seconds']['p50']:.1f}", f"{way['times_bf16']['p50']:.2f}", f"{way['bytes'] / 1e6:.0f}"]
        for name, way in found["ways"].items()
    ]
    return f"{markdown(['projections', 'ms', 'times bf16', 'MB read'], rows)}\n\n{caption(found)}"


def trainer_steps() -> str:
    """A step of transformers' Trainer on a CPU by the experts' implementation."""
    found = load("cpu/trainer.json")
    rows = [
        [f"`{name}`", f"{1e3 * way['seconds']['p50']:.0f}", f"{way['times_ours']['p50']:.2f}"]
        for name, way in found["ways"].items()
    ]
    return f"{markdown(['experts', 'ms a step', 'times ours'], rows)}\n\n{caption(found)}"


def cpu_policies() -> str:
    """Which products a processor gets, and how we know: the first row that fits it counts."""
    rows = [
        [*(str(trait or "any") for trait in (r.maker, r.instruction_set, r.family)), f"`{r.policy}`", r.evidence]
        for r in RULES
    ]
    return words(["maker", "instructions", "family", "policy", "evidence"], rows)


OTHER_SIZES = re.compile(r"fp32|fp16|_E8$|_E1024|experts_1024|mixtral|gpt_oss|deepseek")


def kernel_binaries() -> str:
    """What the kernels compile to for Hopper: the first configuration of each, in 16 and 8 bits, at Qwen3's sizes."""
    found = load("offline/sm_90.json")
    first: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        if not OTHER_SIZES.search(row["kernel"]):
            first.setdefault(re.split(r"_\d+x\d+x\d+", row["kernel"])[0], row)
    counts = ("loop", "wgmma", "mma", "cp_async", "tma", "resident_blocks")
    rows = [
        [
            f"`{row['kernel']}`",
            str(row["registers"]),
            str(row["spills"]),
            three_digits(row["shared_bytes"] / 1024),
            *(str(row[key]) for key in counts),
        ]
        for row in first.values()
    ]
    headings = ["kernel", "registers", "spills", "shared, KiB", "loop", "wgmma", "mma", "cp.async", "TMA", "per SM"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{markdown(headings, rows)}\n\n{found['arch']}, {versions}, commit {found['commit']['hash'][:10]}"


def invariance_cost() -> str:
    """What batch invariance costs on a CPU."""
    result = load("cpu/invariance-cost.json")
    measured: dict[str, list[str]] = {}
    for row in result["measured"]:
        measured.setdefault(row["layer"], []).append(f"{row['times_plain']['p50']:.2f}")
    tokens = dict.fromkeys(row["tokens"] for row in result["measured"])
    rows = [[name, *cells] for name, cells in measured.items()]
    return f"{markdown(['layer', *(f'T={t}' for t in tokens)], rows)}\n\n{caption(result)}"


TABLES: dict[str, Callable[[], str]] = {
    "learning rates": learning_rates,
    "seeds": seeds,
    "CPU suite": cpu_suite,
    "CPU steps": cpu_steps,
    "expert parallel": expert_parallel,
    "DeepSpeed layer": deepspeed_layer,
    "DeepSpeed groups": deepspeed_groups,
    "Colossal-AI drawbacks": colossalai_drawbacks,
    "Colossal-AI digits": colossalai_digits,
    "quantisation error": quantization_error,
    "fp8 error": fp8_error,
    "fp8 parts": fp8_parts,
    "fp8 curves": fp8_curves,
    "cost model": cost_model,
    "GPU": gpu,
    "routers": routers,
    "LoRA cost": lora_cost,
    "invariance cost": invariance_cost,
    "kernel binaries": kernel_binaries,
    "CPU codes": cpu_codes,
    "Trainer steps": trainer_steps,
    "CPU policies": cpu_policies,
    "commands": commands,
    "comparison": comparison,
    "comparison sources": comparison_sources,
    "comparison peers": comparison_peers,
}


def filled(text: str) -> str:
    """A document with its tables made anew. ValueError for a marker without an end, or a name that is not known."""
    begins, ends = text.count("<!-- table: "), text.count("<!-- end of table -->")
    if not len(MARKED.findall(text)) == begins == ends:
        raise ValueError("a marker of a table has no partner")

    def fill(found: re.Match[str]) -> str:
        begin, name, script, end = found.groups()
        if script != "tables":
            return found[0]
        if name not in TABLES:
            raise ValueError(f"table: got {name!r}, wanted one of {', '.join(TABLES)}")
        return f"{begin}{TABLES[name]()}\n{end}"

    return MARKED.sub(fill, text)


def wanted() -> dict[Path, str]:
    """Every document and figure with what it should be."""
    documents = {path: filled(path.read_text(encoding="utf-8")) for path in DOCUMENTS}
    documents |= {PAGE: page(RESULTS), DOCS / "cli.md": cli_page(), DOCS / "api.md": api_page()}
    return documents | {DOCS / "assets" / name: draw() for name, draw in FIGURES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something would change")
    options = parser.parse_args(arguments)
    stale = {
        path: text for path, text in wanted().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        if not options.check:
            write_text(path, text)
        print(f"{path.relative_to(ROOT)}: {'differs from its results' if options.check else 'written'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
