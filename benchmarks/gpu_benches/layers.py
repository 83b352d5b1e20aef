"""The whole layer, forward and backward, beside gather + grouped_mm + compiled SwiGLU, in time and in memory."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_triton
from gpu_benches.limits import COPY_BYTES, DENSE_SIZE, limit_calls, measured_device
from moe_triton.benchmarking.cases import Case, Workload, make_workload
from moe_triton.benchmarking.memory import peak_bytes, saved_bytes
from moe_triton.benchmarking.providers import PROVIDERS
from moe_triton.benchmarking.providers.block import Block, Provider, require_swiglu, share
from moe_triton.benchmarking.runner import Prepared, prepare
from moe_triton.benchmarking.timing import Call, Timer, Times, ratios, run_rounds, spread
from moe_triton.benchmarking.ways import Runnable

OURS, PEER = "triton", "gather-grouped_mm"


def swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_mm(workload: Workload) -> Block:
    """What a good user of torch writes: gather, F.grouped_mm, compiled SwiGLU, F.grouped_mm, weighted sum; no sync."""
    case = workload.case
    require_swiglu(case, "this block")
    gate, gate_up, down = share(workload.gate), share(workload.gate_up), share(workload.down)
    activation = torch.compile(swiglu, dynamic=True)

    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.float(), gate.float()).softmax(-1)
        weights, experts = scores.topk(case.top_k, dim=-1)
        if case.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts

    def forward(x: Tensor) -> Tensor:
        weights, experts = choose(x)
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        row_of_slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        counts = torch.zeros(case.experts, dtype=torch.int32, device=x.device)
        counts = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int32))
        offsets = counts.cumsum(0, dtype=torch.int32)
        h = F.grouped_mm(x[order // case.top_k], gate_up.mT, offs=offsets)
        rows = F.grouped_mm(activation(h), down.mT, offs=offsets)
        rows_TKd = rows[row_of_slot].view(case.tokens, case.top_k, case.hidden)
        return (rows_TKd * weights[..., None]).sum(1).to(x.dtype)

    return Block(
        forward=forward, choose=lambda x: choose(x)[1], parameters={"gate": gate, "gate_up": gate_up, "down": down}
    )


BLOCKS = {OURS: PROVIDERS[OURS], PEER: Provider(label="gather + grouped_mm + compiled SwiGLU", build=grouped_mm)}


def experts_alone(workload: Workload) -> Block:
    """The experts op without the router, for what it alone keeps for backward."""
    case = workload.case
    ours = PROVIDERS[OURS].build(workload)
    routing = moe_triton.route(workload.hidden.float() @ workload.gate.float().T, case.top_k, backend="triton")
    dispatched = moe_triton.dispatch(routing.experts, case.experts, backend="triton")
    named = dict(ours.parameters)
    projections = {"gate_up_proj": named["gate_up"], "down_proj": named["down"]}
    biases = {name: named[name] for name in ("gate_up_bias", "down_bias") if name in named}
    experts = partial(moe_triton.moe_experts, activation=case.activation, backend="triton", **projections, **biases)
    weights = routing.weights.detach()
    return Block(forward=lambda x: experts(x, weights, dispatched), choose=ours.choose, parameters=ours.parameters)


def saved_limit(case: Case) -> int:
    """Bytes of X and of the pre-activation H: what backward needs where no product is computed twice."""
    return case.torch_dtype.itemsize * (case.tokens * case.hidden + case.tokens * case.top_k * case.expert_rows)


def training_forward(block: Block, workload: Workload) -> Call:
    trained = workload.hidden.detach().clone().requires_grad_()
    return lambda: block.forward(trained)


def difference(full: Times, forward: Times) -> Times:
    """Backward of each round: the whole less its forward."""
    pairs = zip(full, forward, strict=True)
    return [None if a is None or b is None else max(a - b, 1e-9) for a, b in pairs]


def measure_layers(
    case: Case,
    device: torch.device,
    timer: Timer,
    *,
    budget_s: float,
    min_rounds: int = 5,
    size: int = DENSE_SIZE,
    copied: int = COPY_BYTES,
) -> dict[str, Any]:
    """Both blocks checked against the reference, then timed beside the two limits, interleaved.

    forward is a training step's (it keeps what backward needs); backward is forward and backward less forward, round by
    round. An entry whose result is wrong, or that cannot run, has a `status` and no times.
    """
    workload = make_workload(case, device)
    prepared = {name: prepare(name, workload, provider) for name, provider in BLOCKS.items()}
    blocks = {name: found.block for name, found in prepared.items() if found.block is not None}
    calls = limit_calls(device, case.torch_dtype, size=size, copied=copied)
    for name, block in blocks.items():
        calls[f"{name} forward"] = training_forward(block, workload)
        calls[f"{name} full"] = Runnable(block, workload).call("full")
    times = run_rounds(calls, timer, budget_s=budget_s, min_rounds=min_rounds)
    here = measured_device(str(device), times, size=size, copied=copied)
    modes: dict[str, dict[str, Times]] = {}
    for name in blocks:
        forward, full = times[f"{name} forward"], times[f"{name} full"]
        modes[name] = {"forward": forward, "backward": difference(full, forward), "full": full}
    rows = {}
    for name, found in prepared.items():
        rows[name] = describe(found, modes.get(name, {}), modes.get(OURS, {}), case, here.flops_16)
        if name in blocks:
            rows[name]["peak_bytes"] = peak_bytes(calls[f"{name} full"], device)
    result = {"dense_flops": here.flops_16, "copy_bytes_s": here.bandwidth, "rows": rows}
    if OURS in blocks:
        saved = saved_bytes(experts_alone(workload), workload.hidden)
        result |= {"experts_saved_bytes": saved, "saved_of_limit": saved / saved_limit(case)}
    return result


def describe(
    found: Prepared, modes: dict[str, Times], ours: dict[str, Times], case: Case, dense_flops: float
) -> dict[str, Any]:
    """One block: status, errors, memory, and of every mode the time, TFLOP/s, share of dense, and our speed-up."""
    flops = {"forward": case.flops("forward"), "full": case.flops("full")}
    flops["backward"] = flops["full"] - flops["forward"]
    row = {name: getattr(found, name) for name in ("label", "status", "note", "saved_bytes", "errors")}
    for mode, times in modes.items():
        time = spread(times)
        if time is None:
            continue
        rate = flops[mode] / time.p50
        row[mode] = {"time_s": asdict(time), "tflops": rate / 1e12, "of_dense": rate / dense_flops}
        speedup = ratios(times, ours[mode]) if mode in ours else None
        row[mode]["ours_is_faster"] = None if speedup is None else asdict(speedup)
    return row
