"""Every kernel by itself, on the tensors of a real layer, against its floor."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from gpu_benches.limits import COPY_BYTES, DENSE_SIZE, limit_calls, measured_device
from moe_triton.backends.triton.experts import Problem, weight_gradient
from moe_triton.backends.triton.routing import route_backward, route_forward
from moe_triton.benchmarking.cases import Case, Workload, make_workload
from moe_triton.benchmarking.timing import Call, Timer, run_rounds, spread
from moe_triton.records import RouterSpec
from moe_triton_kernels.combine import combine
from moe_triton_kernels.d_hidden import d_hidden, d_router_weights
from moe_triton_kernels.d_weight import d_bias
from moe_triton_kernels.down import down
from moe_triton_kernels.permutation import permute
from moe_triton_kernels.tiles import tile_tables
from moe_triton_kernels.tools.floors import FLOORS, Shape

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def floor_shape(case: Case) -> Shape:
    return Shape(
        tokens=case.tokens,
        hidden=case.hidden,
        intermediate=case.intermediate,
        experts=case.experts,
        top_k=case.top_k,
        dtype=DTYPES[case.dtype],
        gated=case.expert_rows != case.intermediate,
    )


def kernel_calls(workload: Workload) -> dict[str, Call]:
    """A call per entry of FLOORS that a training step launches; each has its inputs ready and makes its outputs."""
    case, spec = workload.case, workload.spec
    hidden, grad_out = workload.hidden, workload.grad_out
    router = RouterSpec(top_k=case.top_k, normalize=case.top_k > 1)
    logits = hidden.float() @ workload.gate.float().T
    experts, weights, _, score_sums, z_sum = route_forward(logits, router, None, None, None)
    _, offsets, source, position = permute(experts, case.experts)
    parameters = (workload.gate_up, workload.down, workload.gate_up_bias, workload.down_bias)
    problem = Problem(hidden, offsets, source, position, *parameters, spec)
    tiles = tile_tables(offsets, problem.num_rows)

    def run_up() -> tuple[torch.Tensor, torch.Tensor]:
        return problem.up(hidden, source, tiles, keep_a=True, keep_h=True)

    a, h = run_up()

    def run_down() -> torch.Tensor:
        return down(
            a,
            tiles,
            problem.down,
            size_columns=problem.size_d,
            config=problem.config("down"),
            bias=problem.down_bias,
            router_weights=weights,
            source=source,
        )

    def grad_hidden_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return d_hidden(
            grad_out,
            source,
            tiles,
            problem.down.transposed(),
            h,
            weights,
            size_n=problem.size_n,
            activation=spec.activation,
            is_concatenated=spec.is_concatenated,
            config=problem.config("d_hidden"),
        )

    rows = run_down()
    weighted_a, grad_h, shares = grad_hidden_rows()

    def grad_input_rows() -> torch.Tensor:
        return down(
            grad_h,
            tiles,
            problem.gate_up.transposed(),
            size_columns=problem.size_d,
            config=problem.config("d_rows"),
        )

    calls: dict[str, Call] = {
        "topk": lambda: route_forward(logits, router, None, None, None),
        "permutation": lambda: permute(experts, case.experts),
        "tile_tables": lambda: tile_tables(offsets, problem.num_rows),
        "up": run_up,
        "down": run_down,
        "combine": lambda: combine(rows, position, hidden.dtype),
        "d_hidden": grad_hidden_rows,
        "d_router_weights": lambda: d_router_weights(shares, grad_out, source, tiles, problem.down_bias, weights),
        "d_weight_down": lambda: weight_gradient(problem, grad_out, weighted_a, source, offsets, tokens_first=True),
        "d_weight_up": lambda: weight_gradient(problem, hidden, grad_h, source, offsets, tokens_first=False),
        "d_rows": grad_input_rows,
        "topk_backward": lambda: route_backward(weights, score_sums, z_sum, logits, experts, router),
    }
    if case.bias:
        calls["d_bias_rows"] = lambda: d_bias(grad_h, source, offsets, top_k=case.top_k)
        calls["d_bias_gathered"] = lambda: d_bias(grad_out, source, offsets, top_k=case.top_k, router_weights=weights)
    return calls


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
    shape = floor_shape(case)
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
