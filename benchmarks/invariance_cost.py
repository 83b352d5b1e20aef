"""Batch invariance: what it costs on this CPU, measured, and on a GPU, by arithmetic.

    python benchmarks/invariance_cost.py [--dtype float32 --budget 20 --out FILE.json]

Measured: one forward of a layer without gradients, with and without `batch_invariant`. The two take turns over rounds;
what counts is the median of the rounds' ratios. Run it on a machine that does nothing else.

By arithmetic: the time of up and down is max(FLOPs of whole tiles / P, bytes / bandwidth), with the rows spread evenly
over the experts, once in the tiles that the configuration for these rows has and once in those of the one
configuration that batch invariance takes. It knows nothing of occupancy or latency, so it is a bound, no measurement.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_triton import MoE
from moe_triton.benchmarking.environment import environment
from moe_triton.benchmarking.report import write_json
from moe_triton.benchmarking.timing import make_timer, ratios, run_rounds
from moe_triton_kernels.configs import bucket_of
from moe_triton_kernels.heuristics import BUCKETS, heuristic
from moe_triton_kernels.tools.floors import DEVICES, FLOORS, Shape
from moe_triton_kernels.tools.models import MODELS

RESULT = Path(__file__).parent / "results" / "cpu" / "invariance-cost.json"
LAYERS = {"8 experts": (512, 768, 8, 2), "64 experts": (512, 256, 64, 8)}  # d, n, E, K
TOKENS = (1, 32, 512, 2048)
GPU_TOKENS = (1, 8, 64, 512, 4096, 32768)


def measured(dtype: torch.dtype, budget: float) -> list[dict[str, Any]]:
    """Time both ways for every layer and number of tokens."""
    found = []
    for name, (d, n, num_experts, top_k) in LAYERS.items():
        layer = MoE(d, n, num_experts, top_k, dtype=dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, d, dtype=dtype)

            def forward(invariant: bool, layer: MoE = layer, x: torch.Tensor = x) -> None:
                layer.batch_invariant = invariant
                with torch.no_grad():
                    layer(x)

            calls = {"plain": partial(forward, False), "invariant": partial(forward, True)}
            times = run_rounds(calls, make_timer(torch.device("cpu")), budget_s=budget / (len(TOKENS) * len(LAYERS)))
            cost = ratios(times["invariant"], times["plain"])
            assert cost is not None
            found.append({"layer": name, "tokens": tokens, "times_plain": asdict(cost)})
            print(f"{name:>11}, {tokens:5} tokens: {cost.p50:.2f} ({cost.p20:.2f} to {cost.p80:.2f})", flush=True)
    return found


def predicted(device: str = "h200") -> list[dict[str, Any]]:
    """The ratio of both tilings' times for published layers in bf16."""
    gpu, found = DEVICES[device], []
    for name, layer in MODELS.items():
        for tokens in GPU_TOKENS:
            shape = Shape(tokens=tokens, **layer._asdict())
            own = tiled(shape, bucket_of(shape.rows / layer.experts), gpu)
            ratio = tiled(shape, BUCKETS[-1], gpu) / own
            found.append({"model": name, "tokens": tokens, "device": device, "ratio": ratio})
            print(f"{name:>18}, {tokens:5} tokens on {device}: {ratio:.2f}", flush=True)
    return found


def tiled(shape: Shape, bucket: int, gpu: Any) -> float:
    """Seconds of up and down in whole tiles of this bucket's configurations."""
    used = min(shape.experts, shape.rows)
    total = 0.0
    for op, kernel in (("up_gated", "up"), ("down", "down")):
        config = heuristic(op, shape.hidden, shape.intermediate, shape.itemsize, "sm_90", bucket)
        tiles = math.ceil(math.ceil(shape.rows / used) / config.block_m)
        rows = used * tiles * config.block_m
        work = FLOORS[kernel](shape)
        idle = (shape.experts - used) * shape.intermediate * shape.hidden * shape.itemsize  # weights that nobody reads
        moved = work.bytes - idle * (shape.factor if kernel == "up" else 1)
        total += max(work.flops * rows / shape.rows / gpu.flops(shape.dtype), moved / gpu.bandwidth)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing on the CPU; 0 for none")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file of the results")
    options = parser.parse_args()
    times = measured(getattr(torch, options.dtype), options.budget) if options.budget else []
    record = {
        "schema": "moe-triton-invariance-cost/1",
        **environment(torch.device("cpu")),
        "dtype": options.dtype,
        "measured": times,
        "predicted": predicted(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, record)
    print(options.out)


if __name__ == "__main__":
    main()
