"""Is the result right? Every provider against the float64 reference, output and every gradient, before it is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_triton import reference
from moe_triton.benchmarking.cases import Workload
from moe_triton.benchmarking.providers.block import Block, Parameter
from moe_triton.records import ExpertCall, ExpertParameters, RouterSpec

# Relative RMS error of a whole tensor. bf16 and fp16 leave room for a router that computes its logits in that dtype.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# The worst row of output and hidden gradient, the worst expert of a weight gradient: there a dropped token or a swapped
# expert gives about 1, however large the tensor is.
WORST = {dtype: 20 * limit for dtype, limit in TOLERANCE.items()}
REFERENCE_BYTES = 1 << 30  # float64 weights and gradients of the experts that are checked at a time
# of products in fp8, whose results have about 6% of noise (docs/few_bits.md); a row of them more
FP8_TOLERANCE, FP8_WORST = 0.1, 0.5
FORCED = 1e6  # routing noise that puts an expert among the chosen


@dataclass(frozen=True, kw_only=True)
class Check:
    """Relative RMS errors by tensor name, the worst part of each, and whether all of it is within tolerance.

    `moved` is the share of choices that differ from the reference's own, all of them near-ties.
    """

    errors: dict[str, float]
    worst: dict[str, float]
    moved: float
    problem: str | None


class Difference:
    """Squared errors, gathered over the parts (rows, or experts) of one tensor."""

    def __init__(self) -> None:
        self.errors: list[Tensor] = []
        self.norms: list[Tensor] = []

    def add(self, actual_PD: Tensor, expected_PD: Tensor) -> None:
        """One row per part."""
        self.errors.append((actual_PD.double() - expected_PD).square().sum(1))
        self.norms.append(expected_PD.square().sum(1))

    def result(self) -> tuple[float, float]:
        """(relative RMS error of the whole, relative error of the worst part); infinite where a value is not finite.

        A part's error is compared with its own size, or with a twentieth of the typical size where it is smaller.
        """
        errors, norms = torch.cat(self.errors), torch.cat(self.norms)
        if not bool(torch.isfinite(errors).all()):
            return float("inf"), float("inf")
        if not bool(norms.any()):
            exact = 0.0 if not bool(errors.any()) else float("inf")
            return exact, exact
        typical = norms.mean().sqrt()
        whole = (errors.sum() / norms.sum()).sqrt().item()
        part = (errors.sqrt() / torch.maximum(norms.sqrt(), 0.05 * typical)).max().item()
        return whole, part


def verify(
    chosen_TK: Tensor, out_Td: Tensor, grads: Sequence[Tensor] | None, block: Block, workload: Workload
) -> Check:
    """Compares an output and its gradients (hidden states', then `block.leaves()`) with the reference's.

    Two experts may tie within the rounding of the logits, and a router may take either. So the block's own choices are
    first held against the float64 logits (each must be among the K best, up to that rounding) and then given to the
    reference. `moe_triton.reference` defines everything else.
    """
    problem, moved = check_choices(chosen_TK, workload)
    if problem is not None:
        return Check(errors={}, worst={}, moved=moved, problem=problem)
    named = None if grads is None else block.grouped(list(grads[1:]))
    differences = compare(out_Td, None if grads is None else grads[0], named, chosen_TK, workload)
    return judge(differences, moved, workload.case.torch_dtype, is_fp8=block.is_fp8)


def judge(differences: dict[str, Difference], moved: float, dtype: torch.dtype, *, is_fp8: bool = False) -> Check:
    most, most_worst = (FP8_TOLERANCE, FP8_WORST) if is_fp8 else (TOLERANCE[dtype], WORST[dtype])
    results = {name: difference.result() for name, difference in differences.items()}
    errors = {name: whole for name, (whole, _) in results.items()}
    worst = {name: part for name, (_, part) in results.items()}
    faults = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= most] + [
        f"worst part of {name} {error:.1e}" for name, error in worst.items() if not error <= most_worst
    ]
    return Check(errors=errors, worst=worst, moved=moved, problem=", ".join(faults) or None)


def check_choices(chosen_TK: Tensor, workload: Workload) -> tuple[str | None, float]:
    """(what is wrong with the choices or None, the share that is not the reference's own)."""
    case = workload.case
    if chosen_TK.shape != (case.tokens, case.top_k):
        return f"choices of shape {list(chosen_TK.shape)}, wanted [{case.tokens}, {case.top_k}]", 1.0
    ordered = chosen_TK.sort(dim=1).values
    in_range = bool((ordered[:, 0] >= 0).all()) and bool((ordered[:, -1] < case.experts).all())
    if not in_range or bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return "choices that are not distinct experts", 1.0
    logits = workload.hidden.double() @ workload.gate.double().T
    best = logits.topk(case.top_k, dim=1).values[:, -1:]
    picked = logits.gather(1, chosen_TK)
    moved = (picked < best).double().mean().item()
    slack = 2 * torch.finfo(case.torch_dtype).eps * logits.abs().amax(1, keepdim=True) + 1e-4
    if bool((picked < best - slack).any()):
        return "experts chosen that are not among the best K", moved
    return None, moved


def compare(
    out: Tensor, grad_hidden: Tensor | None, grads: dict[str, Parameter] | None, chosen_TK: Tensor, workload: Workload
) -> dict[str, Difference]:
    """The differences of every tensor, the reference being worked out for a few experts at a time.

    Without gradients only the output is compared.
    """
    case = workload.case
    spec = RouterSpec(top_k=case.top_k, normalize=case.top_k > 1)
    x = workload.hidden.double().requires_grad_()
    gate = workload.gate.double().requires_grad_()
    noise = torch.zeros(case.tokens, case.experts, dtype=torch.float64, device=x.device)
    routing = reference.route(x @ gate.T, spec, noise=noise.scatter_(1, chosen_TK, FORCED))
    dispatched = reference.dispatch(routing.experts, case.experts)

    hidden = x.detach().requires_grad_()
    weights = routing.weights.detach().requires_grad_()
    grad_out = workload.grad_out.double()
    out64, grad_hidden64, grad_weights64 = (torch.zeros_like(t) for t in (grad_out, hidden, weights))
    differences = {name: Difference() for name in ("output", "hidden", "gate", *workload.experts)}
    step = max(1, REFERENCE_BYTES // (2 * 8 * case.weight_elements))
    for first in range(0, case.experts, step):
        part = range(first, min(first + step, case.experts))
        own = replace(
            dispatched, counts=dispatched.counts[first : part.stop], offsets=dispatched.offsets[first : part.stop + 1]
        )
        # a leaf per expert: the gradient of an index into stacked weights would fill the whole stack every time
        named: dict[str, Any] = {
            name: [tensor[e].double().requires_grad_() for e in part] for name, tensor in workload.experts.items()
        }
        leaves = [tensor for tensors in named.values() for tensor in tensors]
        partial = reference.moe_experts(
            ExpertCall(
                hidden=hidden, weights=weights, dispatched=own, parameters=ExpertParameters(**named), spec=workload.spec
            )
        )
        partial_hidden, partial_weights, *expected = torch.autograd.grad(partial, [hidden, weights, *leaves], grad_out)
        out64 += partial.detach()
        grad_hidden64 += partial_hidden
        grad_weights64 += partial_weights
        if grads is None:  # inference only
            continue
        wanted = iter(expected)
        for name in named:
            for e in part:
                differences[name].add(grads[name][e].reshape(1, -1), next(wanted).reshape(1, -1))
    differences["output"].add(out, out64)
    if grad_hidden is None or grads is None:
        return {"output": differences["output"]}
    through_router, grad_gate64 = torch.autograd.grad(routing.weights, [x, gate], grad_weights64)
    differences["hidden"].add(grad_hidden, grad_hidden64 + through_router)
    grad_gate = grads["gate"]
    assert isinstance(grad_gate, Tensor)
    differences["gate"].add(grad_gate.reshape(1, -1), grad_gate64.reshape(1, -1))
    return differences
