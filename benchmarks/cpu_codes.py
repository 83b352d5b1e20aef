"""Decoding over codes on a CPU: a few tokens through experts in every format of few bits, beside bf16.

    python benchmarks/cpu_codes.py                 # T=8 d=2048 n=1024 E=16 K=4, half a minute
    python benchmarks/cpu_codes.py --json          # prints the record as JSON too

One forward pass without gradients, where reading the projections takes most of the time: what fewer bits should spare.
For every format with the compiled loops (`pip install moe-triton[cpu]`) and by torch alone. All take turns over rounds;
what counts is the median of the rounds' ratios, a format's time over that of bf16. Choices of experts are drawn once.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_triton import QuantizedWeight, moe_mlp
from moe_triton.backends.torch.fused import VARIABLE, codes_in_words, loops_problem
from moe_triton.benchmarking.environment import environment
from moe_triton.benchmarking.report import write_json
from moe_triton.benchmarking.timing import make_timer, ratios, run_rounds, spread
from moe_triton.runtime import installed_version

RESULT = Path(__file__).parent / "results" / "cpu" / "codes.json"
FORMATS = ("mxfp4", "nvfp4", "int4", "int8", "fp8")
SIZES = {"tokens": 8, "hidden": 2048, "intermediate": 1024, "experts": 16, "top-k": 4}


def make_ways(options: argparse.Namespace) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """The forward passes by name, and the bytes of the projections that each reads."""
    num_experts, d, n = options.experts, options.hidden, options.intermediate
    torch.manual_seed(0)
    x = torch.randn(options.tokens, d).bfloat16()
    ids = torch.rand(options.tokens, num_experts).topk(options.top_k).indices
    weights = torch.rand(options.tokens, options.top_k)
    dense = [(torch.randn(num_experts, *shape) / shape[1] ** 0.5).bfloat16() for shape in ((2 * n, d), (d, n))]
    used = ids.unique().numel() / num_experts
    ways: dict[str, Callable[[], Tensor]] = {}
    read: dict[str, int] = {}

    def add(name: str, projections: list[Any], loops: str) -> None:
        def forward() -> Tensor:
            os.environ[VARIABLE] = loops
            return moe_mlp(x, ids, weights, *projections, backend="torch")

        ways[name], read[name] = forward, int(used * sum(weight.nbytes for weight in projections))

    add("bf16", dense, "1")
    for name in FORMATS:
        codes = [QuantizedWeight.quantize(weight, name) for weight in dense]
        if loops_problem() is None:
            add(name, codes, "1")
        add(f"{name}, by torch", codes, "0")
    return ways, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing")
    parser.add_argument("--json", action="store_true", help="print the record as well")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    how, before = codes_in_words(torch.bfloat16), os.environ.get(VARIABLE)
    try:
        with torch.no_grad():
            ways, read = make_ways(options)
            times = run_rounds(ways, make_timer(torch.device("cpu")), budget_s=options.budget)
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before
    rows: dict[str, dict[str, Any]] = {}
    print(f"Quantised projections are {how}.\n")
    print("| projections | ms | times bf16's (20% to 80%) | MB read | GB/s |")
    print("|---|--:|--:|--:|--:|")
    for name in ways:
        seconds, over = spread(times[name]), ratios(times[name], times["bf16"])
        assert seconds is not None
        assert over is not None
        rows[name] = {"seconds": asdict(seconds), "times_bf16": asdict(over), "bytes": read[name]}
        cells = [name, f"{1e3 * seconds.p50:.2f}", f"{over.p50:.2f} ({over.p20:.2f} to {over.p80:.2f})"]
        cells += [f"{read[name] / 1e6:.0f}", f"{read[name] / seconds.p50 / 1e9:.1f}"]
        print(f"| {' | '.join(cells)} |")
    record = {
        "schema": "moe-triton-cpu-codes/1",
        **environment(torch.device("cpu")),
        "numba": installed_version("numba"),
        "shape": {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in SIZES},
        "threads": options.threads,
        "ways": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, record)
    print(options.out)
    if options.json:
        print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
