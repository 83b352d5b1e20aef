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

On a machine with a GPU, `make gpu` proves the kernels (`gpu_check.py`), and `make gpu-bench` measures them
(`gpu_bench.py`) in parts of less than nine minutes that go on where the last one stopped.
"""
NONE = "No GPU has been measured: `results/` holds no GPU run."
NO_CHECK = "`make gpu` has not run on a GPU: `results/` holds no check of the kernels on a device."
KERNELS = (
    *("topk", "permutation", "tile_tables", "up", "down", "combine", "d_hidden", "d_router_weights"),
    *("d_weight_down", "d_weight_up", "d_rows", "topk_backward", "d_bias_rows", "d_bias_gathered"),
)


def load(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The newest file of this kind of every device, in the order of the devices' names."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"*/{kind}-*.json")):
        found = json.loads(path.read_text())
        device = found["device"]["name"]
        if device not in newest or found["created"] > newest[device]["created"]:
            newest[device] = found
    return [newest[device] for device in sorted(newest)]


def page(folder: Path) -> str:
    """The whole page; with no GPU result it says so in one sentence."""
    checks, runs = load(folder, "gpu-check"), load(folder, "gpu-bench")
    parts = [HEAD, "## Kernels on a device", *(check_lines(found) for found in checks)]
    if not checks:
        parts.append(NO_CHECK)
    parts += ["## Speed", *(run_lines(found) for found in runs)]
    if not runs:
        parts.append(NONE)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def facts(found: dict[str, Any]) -> str:
    versions = found["versions"]
    commit = found["commit"]
    name = "unknown" if commit is None else commit["hash"][:10] + " with changes" * commit["dirty"]
    return (
        f"{found['device']['name']}, {found['created'][:10]}, torch {versions['torch']}, triton {versions['triton']}, "
        f"commit {name}"
    )


def check_lines(found: dict[str, Any]) -> str:
    results = found["checks"]
    by_result: dict[str, list[str]] = {}
    for name, check in results.items():
        by_result.setdefault(check["result"], []).append(name)
    good = len(by_result.pop("ok", []))
    rest = "".join(f"; {result}: {', '.join(names)}" for result, names in by_result.items())
    return f"**{facts(found)}**: {good} of {len(results)} checks hold{rest}."


def run_lines(found: dict[str, Any]) -> str:
    items = found["items"]
    parts = [f"### {facts(found)}"]
    for part, title, make in (
        ("layers", "The layer", layer_table),
        ("skew", "The layer under skewed routing", layer_table),
        ("decode", "The layer at few tokens", layer_table),
        ("kernels", "Each kernel, as its floor over its time", kernel_table),
    ):
        mine = [item for item in items.values() if item["part"] == part]
        good = [item for item in mine if item["status"] == "ok"]
        if good:
            parts.append(f"#### {title}\n\n{make(good)}")
        parts += [f"{item['title']}: {item['status']} ({item['note']})" for item in mine if item["status"] != "ok"]
    return "\n\n".join(parts)


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
    names = [name for name in KERNELS if any(name in item["kernels"] for item in items)]

    def cell(item: dict[str, Any], name: str) -> str:
        found = item["kernels"].get(name)
        return "" if found is None else f"{found['of_floor']:.2f} ({found['time_s']['p50'] * 1e6:.0f} us)"

    return markdown(["shape", *names], ([item["title"], *(cell(item, name) for name in names)] for item in items))
