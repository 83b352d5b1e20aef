"""benchmarks/README.md from whatever results there are: nothing on it is written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from gpu_benches.layers import OURS, PEER

HEAD = """# Benchmarks

Made by `python benchmarks/tables.py` from the files in `results/`; do not edit. How we measure, and the log
of what was tried: [NOTES.md](NOTES.md). The CPU suite: `python benchmarks/cpu.py`, results in `results/cpu/`.

On a machine with a GPU, `make gpu` proves the kernels and measures them, in one command of 560 seconds; `make
gpu-again` does what failed or is missing ([docs/gpu.md](../docs/gpu.md)).
"""
NONE = "Not measured: `make gpu` has not run on a GPU."
Found = dict[str, Any]


def load(folder: Path) -> list[Found]:
    """The newest run of every device, in the order of the devices' names."""
    newest: dict[str, Found] = {}
    for path in sorted(folder.glob("*/gpu-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        device = found["device"]["name"]
        if device not in newest or found["created"] > newest[device]["created"]:
            newest[device] = found
    return [newest[device] for device in sorted(newest)]


def page(folder: Path) -> str:
    """The whole page; with no GPU result it says so in one sentence."""
    runs = load(folder)
    parts = [HEAD, *([NONE] if not runs else map(run_lines, runs))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def facts(found: Found) -> str:
    versions = found["versions"]
    commit = found["commit"]
    name = "unknown" if commit is None else commit["hash"][:10] + " with changes" * commit["dirty"]
    return (
        f"{found['device']['name']}, {found['created'][:10]}, torch {versions['torch']}, triton {versions['triton']}, "
        f"commit {name}"
    )


def run_lines(found: Found) -> str:
    items = found["items"]
    parts = [f"## {facts(found)}", device_line(items), check_line(items)]
    for part, title, make in (
        ("layers", "The layer", layer_table),
        ("skew", "The layer under skewed routing", layer_table),
        ("decode", "The layer in inference at few tokens", decode_table),
        ("kernels", "Each kernel of a training step, as its floor over its time", kernel_table),
        ("few tokens", "Routing and dispatch of few tokens, in one launch and in several", kernel_table),
        ("fp8 kernels", "Products of fp8 codes, and what makes the codes", kernel_table),
        ("quantized", "Products over quantized projections, and decoding these", kernel_table),
        ("adapters", "LoRA adapters: their own products, and the experts' with an adapter in them", kernel_table),
        ("candidates", "Other configurations beside those that run", candidate_table),
        ("gluon", "Warp-specialized schedules beside the plain kernels", candidate_table),
        ("fences", "Without the proxy fence, which nobody may leave out", fence_table),
    ):
        mine = {name: item for name, item in items.items() if name.startswith(f"{part}: ")}
        good = [item for item in mine.values() if item["status"] == "ok"]
        if good:
            parts.append(f"### {title}\n\n{make(good)}")
        parts += [f"{name}: {item['status']} ({item['note']})" for name, item in mine.items() if item["status"] != "ok"]
    return "\n\n".join(part for part in parts if part)


def device_line(items: dict[str, Found]) -> str:
    found = items.get("facts", {})
    if found.get("status") != "ok":
        return ""
    assemblers = ", ".join(f"{whose}'s {version}" for whose, version in found["assemblers"].items() if version)
    return f"{found['nvidia_smi']}: {found['note']}. Assemblers: {assemblers}."


def check_line(items: dict[str, Found]) -> str:
    """How many proofs hold, and which do not."""
    proofs = {name: item for name, item in items.items() if item["phase"] == "prove" or name.startswith("smoke: ")}
    by_status: dict[str, list[str]] = {}
    for name, item in proofs.items():
        by_status.setdefault(item["status"], []).append(name)
    good = len(by_status.pop("ok", []))
    rest = "".join(f"; {status}: {'; '.join(names)}" for status, names in by_status.items())
    return f"{good} of {len(proofs)} checks hold{rest}."


def layer_lines(items: dict[str, Found]) -> list[str]:
    """A line for each layer that was measured: for the end of a run."""
    lines = []
    for name, item in items.items():
        if name.startswith(("layers: ", "skew: ")) and item["status"] == "ok":
            cells = [f"{mode} {mode_cells(item['rows'][OURS], mode)[2]} of dense" for mode in ("forward", "backward")]
            lines.append(f"{name}: {', '.join(cells)}")
    return lines


def gpu_table(folder: Path) -> str:
    """For README.md: per device the geometric means of the layer over the shapes, and the checks."""
    rows = []
    for found in load(folder):
        items = found["items"]
        good = [item for name, item in items.items() if name.startswith("layers: ") and item["status"] == "ok"]
        means = mean_row(good)[1:-2] if good else ["not measured", "", "", "", "", "", "", ""]
        shares = [means[i] or "not measured" for i in (2, 3, 6, 7)]
        rows.append([facts(found), str(len(good)), *shares])
    if not rows:
        return NONE
    headings = ("device, versions, commit", "shapes", "forward, of dense", "over grouped_mm", "backward, of dense",
                "over grouped_mm")  # fmt: skip
    return markdown(headings, rows)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" + "--:|" * (len(headings) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def mode_cells(row: dict[str, Any], mode: str) -> list[str]:
    """Milliseconds, TFLOP/s, and the share of the dense product."""
    found = row.get(mode)
    if found is None:
        return [row["status"], "", ""]
    return [
        number(found["time_s"]["p50"] * 1e3, 3),
        number(found["tflops"], 3 if found["tflops"] < 1 else 0),
        number(found["of_dense"]),
    ]


def speedup(item: dict[str, Any], mode: str) -> float | None:
    """How many times longer the peer takes; None where it was not measured."""
    found = item["rows"].get(PEER, {}).get(mode, {}).get("ours_is_faster")
    return None if found is None else found["p50"]


def layer_table(items: Sequence[dict[str, Any]]) -> str:
    headings = ["shape"]
    for mode in ("forward", "backward"):
        headings += [f"{mode} ms", "TFLOP/s", "of dense", "faster than grouped_mm"]
    headings += ["saved / (X + H)", "peak MiB"]
    rows = []
    for item in items:
        ours = item["rows"][OURS]
        cells = [item["title"]]
        for mode in ("forward", "backward"):
            factor = speedup(item, mode)
            cells += [*mode_cells(ours, mode), "" if factor is None else f"{factor:.2f}x"]
        peak = ours.get("peak_bytes")
        cells += [number(item.get("saved_of_limit"), 3), "" if peak is None else f"{peak / 2**20:.0f}"]
        rows.append(cells)
    if len(items) > 1:
        rows.append(mean_row(items))
    limits = [(item["dense_flops"] / 1e12, item["copy_bytes_s"] / 1e12) for item in items]
    dense, copy = geometric_mean(d for d, _ in limits), geometric_mean(c for _, c in limits)
    note = f"Dense product {dense:.0f} TFLOP/s, copy {copy:.2f} TB/s (geometric means over the rows)."
    return f"{markdown(headings, rows)}\n\n{note}"


def mean_row(items: Sequence[dict[str, Any]]) -> list[str]:
    """Geometric means of what is a ratio."""
    cells = ["geometric mean"]
    for mode in ("forward", "backward"):
        shares = [row[mode]["of_dense"] for item in items if mode in (row := item["rows"][OURS])]
        factors = [factor for item in items if (factor := speedup(item, mode)) is not None]
        cells += ["", "", number(geometric_mean(shares)) if shares else ""]
        cells.append(f"{geometric_mean(factors):.2f}x" if factors else "")
    return [*cells, "", ""]


def kernel_table(items: Sequence[dict[str, Any]]) -> str:
    """A row for each kernel: the share of its floor, and its time, at each shape."""
    names = dict.fromkeys(name for item in items for name in item["kernels"])

    def cell(item: dict[str, Any], name: str) -> str:
        found = item["kernels"].get(name)
        return "" if found is None else f"{found['of_floor']:.2f} ({found['time_s']['p50'] * 1e6:.0f} us)"

    headings = ["kernel", *(item["title"] for item in items)]
    return markdown(headings, ([name, *(cell(item, name) for item in items)] for name in names))


def decode_table(items: Sequence[Found]) -> str:
    def cells(item: Found, way: str) -> list[str]:
        found = item["ways"][way]
        if "time_s" not in found:
            return [found["status"], ""]
        return [number(found["time_s"]["p50"] * 1e6, 0), number(found["of_floor"])]

    headings = ["shape", "graph us", "of floor", "eager us", "of floor", "floor us"]
    rows = ([i["title"], *cells(i, "graph"), *cells(i, "eager"), number(i["floor_s"] * 1e6, 0)] for i in items)
    return markdown(headings, rows)


def candidate_table(items: Sequence[Found]) -> str:
    """The time of each candidate over that of the configuration that runs; below 1 it is faster."""
    rows = []
    for item in items:
        for op, found in item["ops"].items():
            for words, tried in found["tried"].items():
                is_right = tried["status"] == "ok"
                outcome = number(tried["ratio"], 3) if is_right else f"{tried['status']}: {tried['note']}"
                rows.append([item["title"], op, found["runs"], words, outcome])
    return markdown(["shape", "operation", "runs", "candidate", "time over the one that runs"], rows)


def fence_table(items: Sequence[Found]) -> str:
    rows = []
    for item in items:
        for stage, found in item["stages"].items():
            bits = "the same" if found["same_bits"] else "others"
            time = number(found["time_s"]["p50"] * 1e6, 0)
            rows.append([item["title"], stage, time, number(found["without_over_with"]["p50"], 3), bits])
    return markdown(["shape", "kernel", "us with", "without over with", "bits without"], rows)
