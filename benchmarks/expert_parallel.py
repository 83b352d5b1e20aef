"""Tokens per second of an expert-parallel layer over 1, 2 and 4 processes on this CPU, and how much of it is exchange.

    python benchmarks/expert_parallel.py [--rounds N] [--out FILE]

Every process runs on one thread, so that 4 of them on 2 cores share these: what is shown is the cost of the exchange,
not a speed-up. Beside it stands what the cost model of `moe-triton simulate` predicts for the exchange, with a latency
and a bandwidth that are measured here in the same run. The overhead of `ExpertParallel` in a group of one is measured
too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_triton import MoE
from moe_triton.benchmarking.environment import environment
from moe_triton.benchmarking.report import write_json
from moe_triton.distributed import ExpertParallel, make_groups

RESULT = Path(__file__).parent / "results" / "cpu" / "expert-parallel.json"
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 512, 384, 64, 8  # of the whole batch
WORLDS = (1, 2, 4)


def layer(parallel: ExpertParallel | None) -> MoE:
    torch.manual_seed(0)
    return MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, expert_parallel=parallel)


def step(model: MoE, x: torch.Tensor) -> None:
    """Forward and backward."""
    model.zero_grad()
    model(x).output.sum().backward()


def timed(call: Callable[[], object], rounds: int) -> float:
    """The median of `rounds` calls, in seconds; all ranks begin each together."""
    found = []
    for number in range(rounds + 2):
        dist.barrier()
        begin = time.perf_counter()
        call()
        dist.barrier()
        if number >= 2:
            found.append(time.perf_counter() - begin)
    return statistics.median(found)


def in_rank(rank: int, world: int, store: str, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(minutes=5)
    )
    torch.manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN).tensor_split(world)[rank].requires_grad_()
    found: dict[str, Any] = {"processes": world}
    if world == 1:
        plain, alone = layer(None), layer(ExpertParallel())
        exchanging = layer(ExpertParallel(always_exchange=True))
        pairs = [
            (timed(lambda: step(plain, x), 1), timed(lambda: step(alone, x), 1), timed(lambda: step(exchanging, x), 1))
            for _ in range(rounds)
        ]
        found["step_s"] = statistics.median(pair[1] for pair in pairs)
        found["overhead_of_a_group_of_one"] = statistics.median(pair[1] / pair[0] for pair in pairs) - 1
        found["overhead_with_exchange_in_a_group_of_one"] = statistics.median(p[2] / p[0] for p in pairs) - 1
    else:
        groups = make_groups(ep=world)
        model = layer(ExpertParallel(groups))
        found["step_s"] = timed(lambda: step(model, x), rounds)
        rows = x.detach().repeat(TOP_K, 1)[: TOKENS // world * min(TOP_K, world)]
        out = torch.empty_like(rows)

        def exchange() -> None:  # what one direction of the layer's exchange moves, and nothing else
            dist.all_to_all_single(out, rows)

        found["exchange_s"] = timed(exchange, rounds)
        found["exchange_bytes"] = rows.nbytes * (world - 1) // world
        small, small_out = torch.zeros(world), torch.zeros(world)
        found["latency_s"] = timed(lambda: dist.all_to_all_single(small_out, small), rounds)
        found["exchanges_per_step"] = 4  # rows and results, output gradients and row gradients
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def measure(world: int, rounds: int) -> dict[str, Any]:
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, str(Path(folder) / "store"), rounds, results)
        processes = [context.Process(target=in_rank, args=(rank, *arguments)) for rank in range(world)]
        for process in processes:
            process.start()
        found: dict[str, Any] = results.get(timeout=900)
        for process in processes:
            process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = [measure(world, options.rounds) for world in WORLDS]
    bandwidth = rows[1]["exchange_bytes"] / max(rows[1]["exchange_s"] - rows[1]["latency_s"], 1e-9)
    for row in rows:
        row["tokens_per_s"] = TOKENS / row["step_s"]
        if row["processes"] > 1:
            row["exchange_share"] = row["exchanges_per_step"] * row["exchange_s"] / row["step_s"]
            # the model's "direct" exchange, a0 + bytes / bandwidth, fitted on two processes
            row["predicted_exchange_s"] = row["latency_s"] + row["exchange_bytes"] / bandwidth
    facts = environment(torch.device("cpu"))
    shape = {"tokens": TOKENS, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "experts": EXPERTS, "top_k": TOP_K}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {"schema": "moe-triton-expert-parallel/1", **facts, "shape": shape, "rows": rows})
    print(json.dumps(rows, indent=1))
    print(options.out)


if __name__ == "__main__":
    main()
