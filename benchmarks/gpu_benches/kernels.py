"""Every kernel by itself, on the tensors of a real layer, against its floor."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from gpu_benches.limits import COPY_BYTES, DENSE_SIZE, limit_calls, measured_device
from moe_triton.backends.triton.routing import route_backward, route_forward
from moe_triton.benchmarking.cases import Case, Workload, make_workload
from moe_triton.benchmarking.stages_triton import ExpertKernels
from moe_triton.benchmarking.timing import Call, Timer, run_rounds, spread
from moe_triton.dispatch import dispatch
from moe_triton.kernel_stages import KERNELS
from moe_triton.records import RouterSpec
from moe_triton_kernels.permutation import permute
from moe_triton_kernels.tools.floors import FLOORS


def kernel_calls(workload: Workload) -> dict[str, Call]:
    """A call per entry of FLOORS that a training step launches; each has its inputs ready and makes its outputs."""
    case = workload.case
    router = RouterSpec(top_k=case.top_k, normalize=case.top_k > 1)
    logits = workload.hidden.float() @ workload.gate.float().T
    experts, weights, _, score_sums, z_sum = route_forward(logits, router, None, None, None)
    opened = ExpertKernels(workload.call(weights, dispatch(experts, case.experts, backend="triton")), workload.grad_out)
    return {
        "topk": lambda: route_forward(logits, router, None, None, None),
        "permutation": lambda: permute(experts, case.experts),
        **{name: opened.call(name) for name in KERNELS if name in FLOORS and (case.bias or "bias" not in name)},
        "topk_backward": lambda: route_backward(weights, score_sums, z_sum, logits, experts, router),
    }


def measure_kernels(
    case: Case,
    device: torch.device,
    timer: Timer,
    *,
    budget_s: float,
    min_rounds: int = 5,
    size: int = DENSE_SIZE,
    copied: int = COPY_BYTES,
) -> dict[str, Any]:
    """Times of every kernel and of the two limits, interleaved, and each kernel's floor at those limits."""
    workload = make_workload(case, device)
    limits = limit_calls(device, case.torch_dtype, size=size, copied=copied)
    calls = {**kernel_calls(workload), **limits}
    times = run_rounds(calls, timer, budget_s=budget_s, min_rounds=min_rounds)
    here = measured_device(str(device), times, size=size, copied=copied)
    shape = case.shape
    found = {}
    for name in calls:
        time = spread(times[name])
        if name in limits or time is None:
            continue
        work = FLOORS[name](shape)
        floor = work.floor_s(here, shape.dtype)
        found[name] = {
            "time_s": asdict(time),
            "flops": work.flops,
            "bytes": work.bytes,
            "tflops": work.flops / time.p50 / 1e12,
            "of_dense": work.flops / time.p50 / here.flops_16,
            "bytes_s": work.bytes / time.p50,
            "of_copy": work.bytes / time.p50 / here.bandwidth,
            "floor_s": floor,
            "of_floor": floor / time.p50,
        }
    return {"dense_flops": here.flops_16, "copy_bytes_s": here.bandwidth, "kernels": found}
