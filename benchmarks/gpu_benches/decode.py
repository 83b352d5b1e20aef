"""Few tokens: the layer in inference as a CUDA graph and launched anew, beside reading the touched weights once."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from moe_triton.benchmarking.cases import Case, make_workload
from moe_triton.benchmarking.limits import floor
from moe_triton.benchmarking.runner import prepare
from moe_triton.benchmarking.timing import Call, Timer, run_rounds, spread

OURS, FLOOR = "triton", "floor"
WAYS = ("graph", "eager")


def measure_decode(case: Case, device: torch.device, timer: Timer, *, budget_s: float) -> dict[str, Any]:
    """Times of each way and of the floor. A way that is wrong, or cannot run, has a status and no time."""
    workload = make_workload(case, device)
    prepared = {way: prepare(OURS, workload, way=way) for way in WAYS}
    calls: dict[str, Call] = {
        way: found.runnable.call("forward") for way, found in prepared.items() if found.runnable is not None
    }
    if not calls:
        return {"title": case.title(), "status": "failed", "note": prepared["eager"].note}
    block = next(found.block for found in prepared.values() if found.block is not None)
    with torch.no_grad():
        chosen = block.choose(workload.hidden).long().flatten()
    counts = torch.bincount(chosen, minlength=case.experts).tolist()
    limit = floor(workload, counts, "forward")
    times = run_rounds({**calls, FLOOR: limit.call}, timer, budget_s=budget_s)
    least = spread(times[FLOOR])
    assert least is not None
    floor_s = least.p50 * limit.scale
    ways: dict[str, Any] = {}
    for way, found in prepared.items():
        ways[way] = {"status": found.status, "note": found.note}
        time = spread(times.get(way, []))
        if time is not None:
            ways[way] |= {"time_s": asdict(time), "of_floor": floor_s / time.p50}
    bad = [way for way, found in prepared.items() if found.status not in ("ok", "not measured")]
    result = {"title": case.title(), "floor_s": floor_s, "experts_touched": sum(n > 0 for n in counts), "ways": ways}
    return {**result, "status": prepared[bad[0]].status, "note": prepared[bad[0]].note} if bad else result
