"""What the proxy fence costs: the kernels that need one, with it and without it, in the same rounds.

Without the fence a result may be wrong: it is compared with the one that has it, and the time is that of a kernel which
nobody may run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from gpu_checks.setting import Skipped

from moe_triton.benchmarking.cases import Case, make_workload
from moe_triton.benchmarking.kernel_search import open_kernels
from moe_triton.benchmarking.timing import Timer, ratios, run_rounds, spread
from moe_triton_kernels import launch

STAGES = ("up", "d_hidden", "d_weight_up", "d_weight_down")


def without_fence(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with mock.patch.object(launch, "compiler_fences", return_value=True):  # as if Triton put it
            return call()

    return run


def tensors(result: object) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def prepare_fences(case: Case, device: torch.device) -> str:
    """Compiles the kernels without it: each runs once."""
    kernels = open_kernels(make_workload(case, device))
    for stage in STAGES:
        without_fence(kernels.call(stage))()
    return case.title()


def measure_fences(case: Case, device: torch.device, timer: Timer, *, budget_s: float) -> dict[str, Any]:
    if launch.compiler_fences():
        raise Skipped("this version of Triton puts the fence itself")
    kernels = open_kernels(make_workload(case, device))
    calls = {stage: kernels.call(stage) for stage in STAGES}
    bare = {stage: without_fence(call) for stage, call in calls.items()}
    rows = kernels.problem.num_rows
    same = {
        stage: all(
            torch.equal(a[:rows], b[:rows])
            for a, b in zip(tensors(calls[stage]()), tensors(bare[stage]()), strict=True)
        )
        for stage in STAGES
    }
    named = {**calls, **{f"{stage} without": call for stage, call in bare.items()}}
    times = run_rounds(named, timer, budget_s=budget_s)
    found = {}
    for stage in STAGES:
        time, saved = spread(times[stage]), ratios(times[f"{stage} without"], times[stage])
        assert time is not None
        assert saved is not None
        found[stage] = {"time_s": asdict(time), "without_over_with": asdict(saved), "same_bits": same[stage]}
    return {"title": case.title(), "stages": found}
