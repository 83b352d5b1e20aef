"""Kernels by themselves, on the tensors of a real layer, against their floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from gpu_benches.kernel_sets import Kernel, training
from gpu_benches.limits import COPY_BYTES, DENSE_SIZE, codes_limit, limit_calls, measured_device
from moe_triton.benchmarking.cases import Case, Workload, make_workload
from moe_triton.benchmarking.timing import Call, Timer, run_rounds, spread

Kernels = Callable[[Workload], dict[str, Kernel]]  # one of `kernel_sets`


def measure_kernels(
    case: Case,
    device: torch.device,
    timer: Timer,
    *,
    budget_s: float,
    kernels: Kernels = training,
    min_rounds: int = 5,
    size: int = DENSE_SIZE,
    copied: int = COPY_BYTES,
) -> dict[str, Any]:
    """Times of every kernel of a set and of the device's limits, interleaved, and each kernel's floor at those."""
    found = kernels(make_workload(case, device))
    limits = limit_calls(device, case.torch_dtype, size=size, copied=copied)
    if any(kernel.dtype == "fp8" for kernel in found.values()):
        limits |= codes_limit(device, size=size)
    calls: dict[str, Call] = {name: kernel.call for name, kernel in found.items()}
    times = run_rounds({**calls, **limits}, timer, budget_s=budget_s, min_rounds=min_rounds)
    here = measured_device(str(device), times, size=size, copied=copied)
    rows = {}
    for name, (_, work, dtype) in found.items():
        time = spread(times[name])
        assert time is not None
        floor = work.floor_s(here, dtype)
        rows[name] = {
            "time_s": asdict(time),
            "flops": work.flops,
            "bytes": work.bytes,
            "tflops": work.flops / time.p50 / 1e12,
            "of_dense": work.flops / time.p50 / here.flops(dtype),
            "bytes_s": work.bytes / time.p50,
            "of_copy": work.bytes / time.p50 / here.bandwidth,
            "floor_s": floor,
            "of_floor": floor / time.p50,
        }
    return {"dense_flops": here.flops(case.shape.dtype), "copy_bytes_s": here.bandwidth, "kernels": rows}


def prepare_kernels(case: Case, kernels: Kernels, device: torch.device) -> str:
    """Compiles a set of kernels: each runs once."""
    found = kernels(make_workload(case, device))
    for kernel in found.values():
        kernel.call()
    return f"{len(found)} kernels of {case.title()}"
