"""Is a kernel's result right? Against plain products in float64, expert by expert, on the kernel's own inputs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moe_triton.benchmarking.correctness import Difference
from moe_triton.benchmarking.stages_triton import ExpertKernels
from moe_triton.reference import activate, dequantized


def stage_error(kernels: ExpertKernels, stage: str, result: object) -> float:
    """The largest relative RMS error of any expert in any tensor that the stage made.

    stage: "up", "down", "d_hidden", "d_weight_down", "d_weight_up" or "d_rows".
    """
    tensors = result if isinstance(result, tuple) else (result,)
    worst = 0.0
    for expert, (start, end) in enumerate(pairwise(kernels.problem.dispatched.offsets.tolist())):
        is_weight = stage.startswith("d_weight")
        if start == end and not is_weight:
            continue
        for actual, expected in zip(tensors, expected_of(kernels, stage, expert, slice(start, end)), strict=False):
            assert isinstance(actual, Tensor)
            difference = Difference()
            own = actual[expert] if is_weight else actual[start:end]
            difference.add(own.reshape(1, -1), expected.reshape(1, -1))
            worst = max(worst, difference.result()[0])
    return worst


def expected_of(kernels: ExpertKernels, stage: str, expert: int, rows: slice) -> tuple[Tensor, ...]:
    """What the stage should make of one expert's rows, in float64, tensor by tensor."""
    call, spec = kernels.problem.call, kernels.problem.spec
    gate_up, down = (dequantized(p, torch.float32)[expert].double() for p in call.parameters[:2])
    gate_up_bias, down_bias = (None if p is None else p[expert].double() for p in call.parameters[2:4])
    if spec.is_transposed:
        gate_up, down = gate_up.T, down.T
    slots = call.dispatched.source[rows].long()
    tokens = slots // call.dispatched.top_k
    weights = call.weights.reshape(-1)[slots].double()[:, None]
    if stage == "up":
        h = call.hidden[tokens].double() @ gate_up.T
        h = h if gate_up_bias is None else h + gate_up_bias
        # the activation is taken of the rounded pre-activation, as the kernel's own backward sees it
        a = activate(kernels.h[rows].double(), spec.activation, spec.is_concatenated, spec.limit, spec.alpha)
        return a, h
    if stage == "down":
        y = kernels.a[rows].double() @ down.T
        return ((y if down_bias is None else y + down_bias) * weights,)
    if stage == "d_rows":
        return (kernels.grad_h[rows].double() @ gate_up,)
    if stage == "d_hidden":
        h = kernels.h[rows].double().requires_grad_()
        a = activate(h, spec.activation, spec.is_concatenated, spec.limit, spec.alpha)
        grad_a = kernels.grad_out[tokens].double() @ down
        (grad_h,) = torch.autograd.grad(a, h, grad_a * weights)
        return (a * weights).detach(), grad_h
    if stage == "d_weight_down":
        gradient = kernels.grad_out[tokens].double().T @ kernels.weighted_a[rows].double()
    else:
        gradient = kernels.grad_h[rows].double().T @ call.hidden[tokens].double()
    return (gradient.T if spec.is_transposed else gradient,)
