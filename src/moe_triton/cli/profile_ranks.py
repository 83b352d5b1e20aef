"""`moe-triton profile` under torchrun: the exchange of an expert-parallel layer, and how much of it is overlapped."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist

from moe_triton.benchmarking.cases import Case
from moe_triton.benchmarking.environment import environment
from moe_triton.benchmarking.exchange import RankExchange, as_json, profile_exchange
from moe_triton.benchmarking.report import milliseconds, write_json
from moe_triton.benchmarking.text_tables import plain_console, print_table
from moe_triton.distributed.groups import default_group
from moe_triton.metrics.statistics import exchange_statistics


def profile_over_ranks(
    out: Path, case: Case, device: torch.device, backend: str, mode: str, chunks: int, steps: int, seed: int
) -> dict[str, Any] | None:
    """The case's layer, its experts over all processes; rank 0 prints, writes out/profile.json and returns it."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    record = None
    with default_group(device):
        ranks = profile_exchange(
            case, device, backend=backend, mode=mode, chunks=chunks, steps=steps, seed=seed, out=out
        )
        if dist.get_rank() == 0:
            print_ranks(ranks, f"{case.title()}, experts over {len(ranks)} processes, mode {mode}, {chunks} chunks")
            exchange = {"mode": mode, "chunks": chunks, "ranks": as_json(ranks)}
            record = {"schema": "moe-triton-profile/1", **environment(device), "exchange": exchange}
            write_json(out / "profile.json", record)
            print(f"traces: {out / 'trace-rank-0.json'} and one per rank (open them at ui.perfetto.dev)")
    return record


def print_ranks(ranks: list[RankExchange], title: str) -> None:
    console = plain_console()
    print(f"forward and backward: {title}")
    rows = []
    for r in ranks:
        times = [milliseconds(seconds) for seconds in (r.step_s, r.exchange_s, r.exposed_s)]
        share = r.exposed_s / r.step_s if r.step_s > 0 else 0.0
        rows.append((str(r.rank), str(r.tokens), str(r.rows), *times, f"{r.overlap:.0%}", f"{share:.1%}"))
    columns = ("rank", "tokens", "rows", "step ms", "exchange ms", "exposed ms", "overlap", "exposed of step")
    print_table(console, columns, rows, less=("exposed of step",))
    imbalance = exchange_statistics([r.rows for r in ranks], [r.exchange_s for r in ranks]).imbalance
    if imbalance is not None:
        print(f"rows of the busiest rank: {imbalance:.2f} of the mean")
    waits = []
    phases = dict.fromkeys(phase for r in ranks for phase in r.waits)
    for phase in sorted(phases, key=lambda phase: -mean(r.waits.get(phase, 0.0) for r in ranks)):
        waited = [r.waits.get(phase, 0.0) for r in ranks]
        waits.append((phase, milliseconds(mean(waited)), milliseconds(max(waited))))
    print_table(console, ("waiting for", "ms, mean of ranks", "ms, longest rank"), waits, text=("waiting for",))
