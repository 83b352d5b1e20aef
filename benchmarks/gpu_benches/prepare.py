"""Compiles the kernels of a shape into Triton's cache on disk, by running them once on few tokens and few experts.

A kernel is specialised for d, n, K, the bucket of rows per expert, and whether E is a multiple of 16: the number of
tokens and of experts may be small, and several processes fit beside each other on one GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

import moe_triton
from gpu_benches import kernel_sets
from moe_triton.benchmarking.cases import Case, make_workload
from moe_triton.benchmarking.providers import PROVIDERS
from moe_triton.benchmarking.providers.block import Provider
from moe_triton.benchmarking.ways import Runnable
from moe_triton_kernels.configs import bucket_of
from moe_triton_kernels.heuristics import BUCKETS

FEW_EXPERTS = 16


def few(case: Case) -> Case:
    """The case with as few experts and tokens as run the same kernels."""
    experts = FEW_EXPERTS if case.experts % FEW_EXPERTS == 0 and case.top_k <= FEW_EXPERTS else case.experts
    rows = bucket_of(case.tokens * case.top_k / case.experts)
    rows = rows + 1 if rows == BUCKETS[-1] else rows
    tokens = max(1, -(-rows * experts // case.top_k))
    while bucket_of(tokens * case.top_k / experts) > rows and tokens > 1:  # rounded up past the bucket
        tokens -= 1
    return replace(case, tokens=tokens, experts=experts, skew="uniform", name="")


def targets(cases: Iterable[Case]) -> list[Case]:
    """One case for each set of kernels."""
    found: dict[tuple[Case, int], Case] = {}
    for case in cases:
        found.setdefault((few(case), case.experts), case)
    return list(found.values())


def prepare(case: Case, device: torch.device, provider: Provider | None = None) -> str:
    """Inference and, if possible, a training step of the layer; the kernels of gate and routing at the case's own E."""
    workload = make_workload(few(case), device)
    block = (provider or PROVIDERS["triton"]).build(workload)
    run = Runnable(block, workload)
    run.infer()
    if block.is_trainable:
        run.train()
    logits = torch.randn(64, case.experts, device=device, requires_grad=True)
    routing = moe_triton.route(logits, case.top_k, normalize=case.top_k > 1, backend="triton")
    routing.weights.sum().backward()
    moe_triton.dispatch(routing.experts, case.experts, backend="triton")
    if case.torch_dtype in kernel_sets.NARROW:
        hidden = torch.randn(64, case.hidden, device=device).to(case.torch_dtype)
        weight = hidden.new_ones(case.experts, case.hidden)
        for run in kernel_sets.gate_calls(hidden, weight, logits.detach(), hidden).values():
            run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return few(case).title()
