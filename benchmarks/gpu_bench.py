"""`make gpu-bench`: measures kernels and layers on the GPU of this machine, in resumable parts of under nine minutes.

    PYTHONPATH=src:kernels python benchmarks/gpu_bench.py [--part kernels|layers|skew|decode] [--budget SECONDS]

A call measures what benchmarks/results/<device>/gpu-bench-<commit>.json does not hold yet, one shape after another,
until the budget is spent; call it again for the rest. benchmarks/tables.py makes benchmarks/README.md from all results.
Exit code: 0, also when something is left to do; 1 when a result is wrong or a shape fails; 2 with no GPU, or for bad
arguments.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import torch  # noqa: E402
from gpu_benches.kernels import measure_kernels  # noqa: E402
from gpu_benches.layers import measure_layers  # noqa: E402
from gpu_checks.harness import RESULTS, result_path  # noqa: E402

from moe_triton.benchmarking.cases import PRESETS, Case  # noqa: E402
from moe_triton.benchmarking.environment import environment  # noqa: E402
from moe_triton.benchmarking.report import write_json  # noqa: E402
from moe_triton.benchmarking.results import FAULTS  # noqa: E402
from moe_triton.benchmarking.timing import Timer, make_timer  # noqa: E402

SCHEMA = "moe-triton-gpu-bench/1"
BUDGET_S = 500.0
ITEM_S = 4.0  # of timing per shape
Measure = Callable[..., dict[str, Any]]

PARTS: dict[str, tuple[Measure, tuple[str, ...]]] = {  # what is measured, on which presets
    "kernels": (measure_kernels, ("sonic-12", "models")),
    "layers": (measure_layers, ("sonic-12", "models")),
    "skew": (measure_layers, ("skew",)),
    "decode": (measure_layers, ("decode",)),
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One shape of one part: what is measured in one go and kept under `key`."""

    part: str
    case: Case

    @property
    def key(self) -> str:
        return f"{self.part}: {self.case.title()}"


def all_items(parts: Sequence[str]) -> list[Item]:
    return [Item(part=part, case=case) for part in parts for name in PARTS[part][1] for case in PRESETS[name].cases]


def measure_item(item: Item, device: torch.device, timer: Timer, **options: Any) -> dict[str, Any]:
    """The item's results with status "ok", or "out of memory", "failed", "mismatch" and the reason."""
    result: dict[str, Any] = {
        "part": item.part,
        "title": item.case.title(),
        "case": asdict(item.case),
        "status": "ok",
        "note": "",
    }
    try:
        result |= PARTS[item.part][0](item.case, device, timer, **options)
    except torch.OutOfMemoryError as error:
        result |= {"status": "out of memory", "note": str(error).splitlines()[0]}
    except Exception as error:  # whatever it is, it belongs to this shape; the next one is tried
        result |= {"status": "failed", "note": f"{type(error).__name__}: {error}"}
    for row in result.get("rows", {}).values():
        if row["status"] in FAULTS:
            result |= {"status": row["status"], "note": f"{row['label']}: {row['note']}"}
    return result


def run_items(
    items: Sequence[Item],
    done: dict[str, dict[str, Any]],
    measure: Callable[[Item], dict[str, Any]],
    *,
    budget_s: float,
    on_item: Callable[[Item, dict[str, Any]], None],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Item]:
    """Measures what is not done well, in order, while the longest one so far still fits; returns what is left.

    A device that reports an error of its own is of no more use to this process, so nothing follows that.
    """
    begin, longest = clock(), 0.0
    left = [item for item in items if done.get(item.key, {}).get("status") != "ok"]
    while left and clock() - begin + longest <= budget_s:
        item = left.pop(0)
        start = clock()
        found = measure(item)
        longest = max(longest, clock() - start)
        on_item(item, found)
        if "CUDA error" in found["note"] or "illegal memory access" in found["note"]:
            break
    return left


def run(options: argparse.Namespace) -> int:
    device = torch.device("cuda")
    facts = environment(device)
    path = result_path(facts, "gpu-bench", options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, Any]] = json.loads(path.read_text())["items"] if path.is_file() else {}
    items = all_items(options.part or list(PARTS))
    timer = make_timer(device)

    def measure(item: Item) -> dict[str, Any]:
        print(item.key, end=": ", flush=True)
        found = measure_item(item, device, timer, budget_s=options.seconds)
        gc.collect()
        torch.cuda.empty_cache()
        return found

    def note(item: Item, found: dict[str, Any]) -> None:
        done[item.key] = found
        write_json(path, {"schema": SCHEMA, **facts, "settings": {"item_s": options.seconds}, "items": done})
        print(found["status"], found["note"], flush=True)

    left = run_items(items, done, measure, budget_s=options.budget, on_item=note)
    print(f"{path}: {len(items) - len(left)} of {len(items)} tried" + "; call again for the rest" * bool(left))
    faults = [item.key for item in items if done.get(item.key, {}).get("status") in FAULTS]
    if faults:
        print("wrong or failed: " + "; ".join(faults), file=sys.stderr)
    return 1 if faults else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_bench", description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=list(PARTS), help="may be repeated; default: all, in order")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for this call")
    parser.add_argument("--seconds", type=float, default=ITEM_S, help="of timing per shape")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    for name in ("budget", "seconds"):
        if getattr(options, name) <= 0:
            print(f"gpu_bench: {name}: got {getattr(options, name)}, wanted more than 0", file=sys.stderr)
            return 2
    if not torch.cuda.is_available():
        print("gpu_bench: no GPU here: nothing was measured", file=sys.stderr)
        return 2
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
