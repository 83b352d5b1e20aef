"""Run in every rank: an expert-parallel layer beside the same layer in one process, on the same global batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moe_triton import Experts, MoE
from moe_triton.distributed import ExpertParallel, make_groups
from tests.helpers.compare import assert_close

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 24, 8, 3


@dataclass
class Case:
    """tokens: by data-parallel rank. The layer's and the exchange's further arguments are in the two dicts."""

    tokens: list[int]
    sizes: dict[str, Any] = field(default_factory=lambda: {"ep": 4})
    exchange: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    experts: int = EXPERTS
    one_expert: bool = False  # all tokens go to one
    lora: bool = False  # adapters, over projections that are trained too
    tolerance: float | None = None


def global_batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    total = sum(case.tokens)
    return torch.randn(total, HIDDEN, dtype=case.dtype), torch.randn(total, HIDDEN, dtype=case.dtype)


def make_layer(case: Case, parallel: ExpertParallel | None, **more: Any) -> MoE:
    torch.manual_seed(0)
    arguments = {"top_k": TOP_K, "dtype": case.dtype, **case.layer, **more}
    layer = MoE(HIDDEN, INTERMEDIATE, case.experts, expert_parallel=parallel, **arguments)
    if case.one_expert:
        with torch.no_grad():
            layer.router.weight.zero_()  # ties go to the lowest ids
    if case.lora:
        layer.experts.add_lora(4, 6.0)
        layer.experts.requires_grad_()
        set_b(layer.experts)
    return layer


@torch.no_grad()
def set_b(experts: Experts) -> None:
    """Give B values of its own for each expert and entry, however the experts are spread."""
    for name in ("gate_up", "down"):
        size_out, _ = experts.whole_shape(f"{name}_proj")
        b = experts.get_parameter(f"{name}_lora_b")
        if b.is_meta:
            continue
        for slot, expert in enumerate(experts.local_experts):
            draw = torch.Generator().manual_seed(100 + expert)
            whole = torch.randn(size_out, b.shape[2], generator=draw, dtype=torch.float64, device="cpu")
            b[slot] = experts.local_slice(f"{name}_lora_b", whole)


def check(case: Case) -> dict[str, torch.Tensor]:
    """Outputs, hidden-state gradients, every parameter's gradient and the loss; on every rank."""
    groups = make_groups(**case.sizes)
    parallel = ExpertParallel(groups, loss_reduction="sum", **case.exchange)
    local = make_layer(case, parallel)
    capacity_groups = groups.dp.size * case.layer.get("capacity_groups", 1)
    whole = make_layer(case, None, **({"capacity_groups": capacity_groups} if "capacity_factor" in case.layer else {}))
    experts = local.experts.local_experts
    for name, parameter in local.experts.named_parameters():
        full = getattr(whole.experts, name)[list(experts)]
        wanted = torch.stack([local.experts.local_slice(name, expert) for expert in full])
        assert torch.equal(parameter, wanted), f"{name} starts differently from the whole layer's"

    x_all, grad_all = global_batch(case)
    start = sum(case.tokens[: groups.dp.rank])
    here = slice(start, start + case.tokens[groups.dp.rank])
    x_whole = x_all.clone().requires_grad_()
    expected = whole(x_whole)
    ((expected.output * grad_all).sum() + expected.aux_loss).backward()
    x_local = x_all[here].clone().requires_grad_()
    got = local(x_local)
    loss = (got.output * grad_all[here]).sum() + got.aux_loss
    loss.backward()

    assert_close(got.output, expected.output[here], tolerance=case.tolerance)
    assert_close(x_local.grad, x_whole.grad[here], tolerance=case.tolerance)
    # dense gradients: summed over the data-parallel ranks; experts': over those with the same experts
    for name, parameter in local.named_parameters():
        assert parameter.grad is not None, name
        is_expert = name.startswith("experts.")
        group = groups.edp if is_expert else groups.dp
        total = parameter.grad.clone()
        if group.size > 1:
            dist.all_reduce(total, group=group.handle)
        wanted = whole.get_parameter(name).grad
        if is_expert:
            part = wanted[list(experts)]
            short = name.removeprefix("experts.")
            wanted = torch.stack([local.experts.local_slice(short, expert) for expert in part])
        assert_close(total, wanted, tolerance=case.tolerance)
    total = torch.stack([got.aux_loss.detach(), got.expert_counts.sum().to(got.aux_loss.dtype)])
    if groups.dp.size > 1:
        dist.all_reduce(total, group=groups.dp.handle)
    assert_close(total[0], expected.aux_loss, tolerance=case.tolerance)
    assert total[1] == expected.expert_counts.sum()
    return {"output": got.output.detach(), "expected": expected.output[here].detach()}


def check_bits(case: Case, backend: str) -> None:
    """Given the choices, a row per choice: the same bits as one process."""
    parallel = ExpertParallel(make_groups(**case.sizes), deduplicate=False, **case.exchange)
    local, whole = (make_layer(case, p, backend=backend).experts for p in (parallel, None))
    x_all, grad_all = global_batch(case)
    total = x_all.shape[0]
    ids_all = torch.rand(total, case.experts).topk(TOP_K).indices.int()
    ids_all[ids_all == case.experts - 2] = -1  # an expert without rows
    weights_all = torch.rand(total, TOP_K, dtype=torch.promote_types(case.dtype, torch.float32))
    rank = dist.get_rank()
    here = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))

    def run(experts: torch.nn.Module, part: slice) -> list[torch.Tensor]:
        from moe_triton import dispatch

        x, weights = (t[part].clone().requires_grad_() for t in (x_all, weights_all))
        dispatched = dispatch(ids_all[part], case.experts, backend=backend)
        out = experts(x, weights, dispatched)
        with torch.no_grad():
            unchanged = experts(x, weights, dispatched)
        assert torch.equal(out, unchanged), "the bits depend on autograd"
        out.backward(grad_all[part])
        return [out.detach(), x.grad, weights.grad, *(p.grad for p in experts.parameters())]

    expected, got = run(whole, slice(0, total)), run(local, here)
    mine = local.local_experts
    names = ["output", "hidden", "weights", *(name for name, _ in whole.named_parameters())]
    for i, (name, a, b) in enumerate(zip(names, got, expected, strict=True)):
        wanted = b[here] if i < 3 else b[mine.start : mine.stop]
        assert torch.equal(a, wanted), f"{name} differs by {(a - wanted).abs().max():.2e}"
