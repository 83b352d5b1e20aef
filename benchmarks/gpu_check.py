"""`make gpu`: proves the kernels on the GPU of this machine, in less than nine minutes, with nothing downloaded.

    PYTHONPATH=src:kernels python benchmarks/gpu_check.py [--only NAME,...] [--budget SECONDS] [--seed N]

Every check runs in a process of its own, several at a time, on fresh random inputs (the seed is printed). Prints a
table, and writes benchmarks/results/<device>/gpu-check-<commit>.json as it goes; with --only, the other results there
are kept. Exit code: 0; 1 when a check fails, or does not get its turn; 2 with no GPU, or for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import torch  # noqa: E402
from gpu_checks import behaviour, harness, numerics  # noqa: E402
from gpu_checks.harness import Check, Setting  # noqa: E402

from moe_triton.benchmarking.environment import environment  # noqa: E402
from moe_triton.benchmarking.report import write_json  # noqa: E402

BUDGET_S = 520.0
STRESS_S = 60.0
JOBS = 6
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# the longest first, so that none begins last
CHECKS: dict[str, Check] = {
    **{f"experts_gated_{numerics.name_of(dtype)}": numerics.experts_gated(dtype) for dtype in DTYPES},
    **{f"experts_ungated_{numerics.name_of(dtype)}": numerics.experts_ungated(dtype) for dtype in DTYPES},
    "layer": numerics.layer,
    "buckets": numerics.buckets,
    "stress": behaviour.stress,
    "no_recompilation": behaviour.no_recompilation,
    "beyond_int32": behaviour.beyond_int32,
    "routing": numerics.routing,
    "determinism": behaviour.determinism,
    "compile": behaviour.compiled,
    "empty": numerics.empty,
    "dispatch": numerics.dispatch,
    "no_host_sync": behaviour.no_host_sync,
    "cuda_graph": behaviour.cuda_graph,
    "nan_logits": numerics.nan_logits,
    "mutations": numerics.mutations,
    "small": numerics.small,
    "sanitizer": behaviour.sanitizer,
    "nccl": behaviour.nccl,
}


def pick(names: str | None) -> list[str]:
    if names is None:
        return list(CHECKS)
    found = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in found if name not in CHECKS]
    if unknown or not found:
        raise ValueError(f"only: got {', '.join(unknown) or 'nothing'}, wanted one of {', '.join(CHECKS)}")
    return found


def earlier(path: Path) -> dict[str, dict[str, Any]]:
    """The results that the file holds already."""
    return json.loads(path.read_text())["checks"] if path.is_file() else {}


def run_all(options: argparse.Namespace, names: Sequence[str]) -> int:
    facts = environment(torch.device("cuda"))
    path = harness.result_path(facts, "gpu-check", options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = earlier(path) if options.only is not None else {}
    settings = {"seed": options.seed, "budget_s": options.budget, "jobs": options.jobs}
    print(f"{facts['device']['name']}, seed {options.seed}, {len(names)} checks, {options.jobs} at a time", flush=True)

    def note(name: str, found: dict[str, Any]) -> None:
        results[name] = found
        write_json(path, {"schema": harness.SCHEMA, **facts, "settings": settings, "checks": results})
        print(f"{found['result']:7}  {name}  ({found['seconds']} s)", flush=True)

    def command(name: str) -> list[str]:
        return harness.worker_command(name, options.seed, "cuda", options.seconds)

    harness.run_apart(names, command, jobs=options.jobs, budget_s=options.budget, on_result=note)
    shown = {name: results[name] for name in names}
    print(f"\n{harness.table(shown)}\n\n{path}")
    return 0 if all(found["result"] in harness.GOOD for found in shown.values()) else 1


def work(options: argparse.Namespace) -> int:
    """One check in this process; the last line of the output is its result."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    found = harness.run_here(CHECKS[options.worker], Setting(device=device, seconds=options.seconds))
    print(json.dumps(found), flush=True)
    return 0 if found["result"] in harness.GOOD else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names with commas; of " + ", ".join(CHECKS))
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all of it")
    parser.add_argument("--seed", type=int, help="of the random inputs; default: another one every time")
    parser.add_argument("--jobs", type=int, default=JOBS, help="checks that run at a time")
    parser.add_argument("--seconds", type=float, default=STRESS_S, help="how long the stress test repeats itself")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=list(CHECKS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.seed = int(time.time()) if options.seed is None else options.seed
    try:
        names = pick(options.only)
        for name in ("budget", "jobs"):
            if getattr(options, name) <= 0:
                raise ValueError(f"{name}: got {getattr(options, name)}, wanted more than 0")
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu_check: no GPU here: nothing was checked", file=sys.stderr)
        return 2
    return run_all(options, names) if options.worker is None else work(options)


if __name__ == "__main__":
    sys.exit(main())
