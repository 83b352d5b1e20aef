"""`moe-triton simulate`: what a step would take on 1 to 4,096 GPUs, predicted by the cost model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moe_triton.benchmarking.chart import save
from moe_triton.cli.arguments import check_outputs, checked, pick, pick_model, split
from moe_triton.simulate.cost_model import MAX_GPUS, Prediction, Workload, predict
from moe_triton.simulate.presets import DEVICES, MODELS, NETWORKS, Device, Network
from moe_triton.simulate.published import Point, validate

SCHEMA = "moe-triton-simulate/1"
UNKNOWN = "This model cannot know this package's speed on GPUs, or NCCL's beyond one node."
NOTE = f"{UNKNOWN} Predictions of a cost model, not measurements."
WIDTH = 80  # whatever the terminal: a wider table would say no more
BAR = 60  # characters of the longest bar of the text chart
COLUMNS = (  # of the table, each in up to three lines
    *("GPUs", "EP", "EDP", "rows/\nexpert", "dis-\npatch\nms", "ex-\nperts\nms", "com-\nbine\nms"),
    *("ex-\nchange", "over-\nlap", "step\nms", "tokens\n/s/GPU", "effi-\nciency", "GB\n/GPU"),
)
PARTS = {  # of a step: field -> (name, letter in the text chart, colour in the PNG)
    "dense_s": ("dense", "d", "#b8c4cc"),
    "all_experts_s": ("experts", "e", "#1f6f8b"),
    "all_exposed_exchange_s": ("exchange, exposed", "x", "#c8553d"),
    "exposed_reductions_s": ("gradients, exposed", "g", "#e0a458"),
}


def simulate(
    preset: Annotated[str, typer.Option("--preset", "--model", help="The model (see --list).")] = "deepseek-v3",
    device: Annotated[str, typer.Option(help="The GPU (see --list).")] = "h100",
    network: Annotated[str | None, typer.Option(help="The links (see --list). Default: the GPU's usual ones.")] = None,
    gpus: Annotated[
        str | None, typer.Option(help="1 to 4096, or several with commas. Default: the powers of two.")
    ] = None,
    ep: Annotated[
        int | None, typer.Option(help="Ranks that share the experts, at most; default: as many as divide both.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="T: tokens per GPU and step.")] = 4096,
    sequence: Annotated[int, typer.Option(help="Tokens per sequence, for the attention.")] = 4096,
    chunks: Annotated[int, typer.Option(help="D: pieces in which exchange and experts overlap.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the products: bfloat16, float16 or float8.")] = "bfloat16",
    dispatch_dtype: Annotated[
        str, typer.Option(help="Of the rows sent to the experts: float8, bfloat16, float16 or float32.")
    ] = "bfloat16",
    skew: Annotated[float, typer.Option(help="lambda: load of the busiest rank over the mean.")] = 1.0,
    mode: Annotated[str, typer.Option(help="forward or train.")] = "train",
    exchange: Annotated[str, typer.Option(help="nccl, direct, deduplicated or hierarchical.")] = "nccl",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    chart_file: Annotated[Path | None, typer.Option("--chart", help="Write a PNG chart.")] = None,
    check: Annotated[
        bool, typer.Option("--validate", help="Compare the model with published measurements, and stop.")
    ] = False,
    show_list: Annotated[bool, typer.Option("--list", help="List the presets, and stop.")] = False,
) -> None:
    """Predict step time and efficiency of expert parallelism with a cost model; nothing is measured.

    It cannot know this package's speed on GPUs, or NCCL's beyond one node: neither was measured. A step is one batch
    through the whole model, everything but the routed experts replicated on every GPU; the optimizer's update,
    recomputation and pipeline or tensor parallelism are not in it.
    Exit code: 0; 2 for bad arguments.
    """

    if show_list:
        print_presets()
        return
    with checked("simulate"):
        check_outputs([("--chart", chart_file)])
        if check:
            print_validation(as_json)
            return
        where = pick(device.lower(), "device", DEVICES)
        links = pick(network or where.network, "network", NETWORKS)
        work = Workload(
            model=pick_model(preset, MODELS, "preset"),
            tokens=tokens, sequence=sequence, dtype=dtype, dispatch_dtype=dispatch_dtype, skew=skew, chunks=chunks,
            mode=mode, exchange=exchange,
        )  # fmt: skip
        found = [predict(work, where, links, count, ep) for count in parse_gpus(gpus)]
        alone = predict(work, where, links, 1)
    efficiency = [one.tokens_per_s_per_gpu / alone.tokens_per_s_per_gpu for one in found]
    if as_json:
        print(json.dumps(document(work, where, links, found, efficiency), indent=1))
    else:
        print_predictions(work, where, links, found, efficiency)
    if chart_file is not None:
        draw(chart_file, title(work, where, links), found, efficiency)


def parse_gpus(text: str | None) -> list[int]:
    if text is None:
        return [2**power for power in range(MAX_GPUS.bit_length())]
    parts = split(text)
    if not parts or not all(part.isascii() and part.isdigit() and 1 <= int(part) <= MAX_GPUS for part in parts):
        raise ValueError(f"gpus: got {text!r}, wanted numbers from 1 to {MAX_GPUS} with commas")
    return sorted({int(part) for part in parts})


def title(work: Workload, device: Device, network: Network) -> str:
    return (
        f"{work.model.name} on {device.name}, {network.name}: {work.mode}, {work.tokens} tokens per GPU, {work.dtype}, "
        f"{work.exchange} exchange in {work.dispatch_dtype}, chunks {work.chunks}, skew {work.skew:g}"
    )


def document(
    work: Workload, device: Device, network: Network, found: Sequence[Prediction], efficiency: Sequence[float]
) -> dict[str, Any]:
    """Everything as plain values; `moe_triton.simulate.cost_model` documents the fields."""
    rows = [{**asdict(one), "efficiency": share} for one, share in zip(found, efficiency, strict=True)]
    settings = {"workload": asdict(work), "device": asdict(device), "network": asdict(network)}
    return {"schema": SCHEMA, "note": NOTE, **settings, "predictions": rows}


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def predictions_table(found: Sequence[Prediction], efficiency: Sequence[float]) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in COLUMNS:
        shown.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for one, share in zip(found, efficiency, strict=True):
        times = (milliseconds(t) for t in (one.dispatch_s, one.experts_s, one.combine_s))
        shown.add_row(
            *(str(count) for count in (one.gpus, one.ep, one.edp)),
            f"{one.rows_per_expert:.0f}",
            *times,
            f"{one.exchange_share:.1%}",
            f"{one.overlap:.0%}" if one.ep > 1 else "-",
            milliseconds(one.step_s),
            f"{one.tokens_per_s_per_gpu:.0f}",
            f"{share:.2f}",
            f"{one.memory_bytes / 1e9:.0f}{'' if one.fits else ' !'}",
        )
    return shown


def text_chart(found: Sequence[Prediction]) -> list[str]:
    """A bar per row: the step time, a letter per part."""
    longest = max(one.step_s for one in found)
    lines = []
    for one in found:
        ends, upto = [], 0.0
        for part in PARTS:
            upto += getattr(one, part)
            ends.append(round(BAR * upto / longest))
        letters = (
            letter * (end - begin) for (_, letter, _), begin, end in zip(PARTS.values(), [0, *ends], ends, strict=False)
        )
        lines.append(f"{one.gpus:>6} {''.join(letters)} {milliseconds(one.step_s)}")
    return lines


def print_predictions(
    work: Workload, device: Device, network: Network, found: Sequence[Prediction], efficiency: Sequence[float]
) -> None:
    say(NOTE)
    say(title(work, device, network))
    Console(width=WIDTH, highlight=False, markup=False).print(predictions_table(found, efficiency))
    way = "forward and backward" if work.mode == "train" else "forward"
    say(f"dispatch, experts, combine: one MoE layer, {way}, as if nothing overlapped.")
    say("exchange: share of the step in which only rows travel. overlap: share of the exchange that hides.")
    say(
        "efficiency: tokens/s/GPU over those of one GPU with all experts, above 1 where more rows per expert pay more "
        "than the exchange costs."
    )
    if not all(one.fits for one in found):
        what = "parameters, gradients and Adam's states" if work.mode == "train" else "parameters"
        say(f"!: the {what} exceed the {device.memory_bytes / 1e9:.0f} GB of a GPU.")
    print()
    say(f"step ms by part: {', '.join(f'{letter} {name}' for name, letter, _ in PARTS.values())}")
    print("\n".join(text_chart(found)))
    print("\nIts errors against published measurements: moe-triton simulate --validate")


def say(text: str) -> None:
    """Print prose, wrapped."""
    print(fill(text, WIDTH))


def print_presets() -> None:
    for kind, table in (("preset", MODELS), ("device", DEVICES), ("network", NETWORKS)):
        for name, entry in table.items():
            head = f"{kind:8} {name:15} "
            print(fill(head + entry.source, WIDTH, subsequent_indent=" " * len(head)))


def worst(points: Sequence[Point]) -> dict[str, float]:
    """The largest error of the points that were not fitted, by what was measured."""
    found: dict[str, float] = {}
    for point in points:
        if not point.fitted:
            found[point.what] = max(found.get(point.what, 0.0), abs(point.error))
    return found


def print_validation(as_json: bool) -> None:
    points = validate()
    if as_json:
        rows = [{**asdict(point), "error": point.error} for point in points]
        print(json.dumps({"schema": SCHEMA, "points": rows, "worst_error": worst(points)}, indent=1))
        return
    say(NOTE)
    for what, group in groupby(points, key=lambda point: point.what):
        found = list(group)
        heading = f"{what}, {found[0].unit}"
        print(f"\n{heading:42} {'published':>10} {'predicted':>10}  error")
        for point in found:
            numbers = f"{whole(point.published):>10} {whole(point.predicted):>10} {point.error:>+7.1%}"
            print(f"  {point.case:40} {numbers}{'  fitted' if point.fitted else ''}")
    print("\nLargest error where nothing was fitted:")
    for what, error in worst(points).items():
        print(f"  {what}: {error:.1%}")


def whole(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def draw(path: Path, heading: str, found: Sequence[Prediction], efficiency: Sequence[float]) -> None:
    """Writes a PNG: the parts of a step over the number of GPUs, and the efficiency below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 6.4), dpi=110, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    places = range(len(found))
    base = [0.0] * len(found)
    for field, (name, _, colour) in PARTS.items():
        heights = [1e3 * getattr(one, field) for one in found]
        upper.bar(places, heights, bottom=base, color=colour, label=name, width=0.72)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    for place, one in enumerate(found):
        text = milliseconds(one.step_s)
        upper.annotate(text, (place, base[place]), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    upper.set_ylim(0, 1.32 * max(base))  # room for the legend
    upper.set_ylabel("step, ms")
    upper.legend(ncols=len(PARTS), fontsize=8, frameon=False, loc="upper center")
    lower.plot(places, efficiency, color="#1f6f8b", marker="o", markersize=4)
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    lower.axhline(1.0, color="#7a6c5d", linestyle=":", linewidth=1)
    for place, share in enumerate(efficiency):
        style = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "bbox": background}
        lower.annotate(f"{share:.2f}", (place, share), (0, 6), **style)
    lower.set_ylim(0, 1.25 * max(1.0, *efficiency))
    lower.set_ylabel("tokens/s/GPU over one GPU's")
    lower.set_xticks(places, [f"{one.gpus}\nEP{one.ep}" for one in found], fontsize=8)
    lower.set_xlabel("GPUs")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(fill(heading, 100), fontsize=10)
    figure.supxlabel(NOTE, fontsize=8, color="#555555")
    save(path, figure)
