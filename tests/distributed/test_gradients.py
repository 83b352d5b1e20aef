"""Gradients, their norm, DDP, FSDP2 and equal replicas, against one process on the global batch."""

from __future__ import annotations

import parity
import pytest
import torch
import torch.distributed as dist
from compare import assert_close
from parity import HIDDEN, Case
from ranks import products
from torch import nn

from moe_triton.distributed import (
    ConfigurationMismatch,
    ExpertParallel,
    apply_fsdp2,
    broadcast_parameters,
    check_replicas,
    clip_grad_norm_,
    make_groups,
    reduce_gradients,
    wrap_ddp,
)

TOKENS = [5, 5, 5, 5]
LAYER = {"aux_loss_weight": 0.1, "bias": True}


class Model(nn.Module):
    """A dense layer, an MoE layer, and a parameter that no loss reaches."""

    def __init__(self, case: Case, parallel: ExpertParallel | None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(HIDDEN, HIDDEN, dtype=case.dtype)
        self.unused = nn.Parameter(torch.ones(3, dtype=case.dtype))
        self.moe = parity.make_layer(case, parallel)

    def forward(self, x):
        return self.moe(self.first(x))


def losses(case, model, x, grad, divisor):
    out = model(x)
    return (out.output * grad).sum() / divisor + out.aux_loss


def expected_gradients(case: Case, scale: float) -> dict[str, torch.Tensor]:
    """Of the global batch in one process; `scale` times the loss without its auxiliary part."""
    model = Model(case, None)
    x, grad = parity.global_batch(case)
    losses(case, model, x, grad, 1 / scale).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


def local_part(model: Model, name: str, whole: torch.Tensor) -> torch.Tensor:
    if ".experts." not in name:
        return whole
    experts = model.moe.experts
    part = whole[list(experts.local_experts)]
    return torch.stack([experts.local_slice(name.rpartition(".")[2], expert) for expert in part])


def compare(case: Case, model: Model, expected: dict[str, torch.Tensor], factor=lambda name: 1.0) -> None:
    for name, parameter in model.named_parameters():
        wanted = local_part(model, name, expected[name]) * factor(name)
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        assert_close(grad, wanted)


def backward_here(case: Case, groups, rule: str, **exchange) -> Model:
    """Losses that sum, or that average, to the global one."""
    parallel = ExpertParallel(groups, loss_reduction="sum" if rule == "sum" else "mean", **exchange)
    model = Model(case, parallel)
    x, grad = parity.global_batch(case)
    start = sum(case.tokens[: groups.dp.rank])
    here = slice(start, start + case.tokens[groups.dp.rank])
    losses(case, model, x[here], grad[here], 1.0 if rule == "sum" else 1 / groups.dp.size).backward()
    return model


def reduced(sizes: dict, rule: str) -> None:
    groups = make_groups(**sizes)
    case = Case(TOKENS[: groups.dp.size], layer=LAYER)
    model = backward_here(case, groups, rule)
    reduce_gradients(model, rule=rule)
    expected = expected_gradients(case, 1.0)
    ep = groups.dp.size / groups.edp.size
    compare(case, model, expected, lambda name: ep if rule == "colossalai" and ".experts." in name else 1.0)
    assert torch.equal(model.unused.grad, torch.zeros_like(model.unused)), "a missing gradient becomes zeros"


def clipped(sizes: dict, norm_type: float) -> None:
    groups = make_groups(**sizes)
    case = Case(TOKENS[: groups.dp.size], layer=LAYER)
    whole = Model(case, None)
    x, grad = parity.global_batch(case)
    losses(case, whole, x, grad, 1.0).backward()
    for parameter in whole.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model = backward_here(case, groups, "sum")
    reduce_gradients(model, rule="sum")
    wanted = nn.utils.clip_grad_norm_(whole.parameters(), 0.5, norm_type=norm_type)
    got = clip_grad_norm_(model, 0.5, norm_type=norm_type)
    assert_close(got, wanted)
    compare(case, model, {name: p.grad for name, p in whole.named_parameters()})


def ddp(sizes: dict) -> None:
    groups = make_groups(**sizes)
    case = Case(TOKENS[: groups.dp.size], layer=LAYER)
    model = Model(case, ExpertParallel(groups, loss_reduction="mean"))
    wrapped = wrap_ddp(model, find_unused_parameters=True)
    x, grad = parity.global_batch(case)
    start = sum(case.tokens[: groups.dp.rank])
    here = slice(start, start + case.tokens[groups.dp.rank])
    for _ in range(2):  # two micro-batches, reduced once
        with wrapped.no_sync() if _ == 0 else torch.enable_grad():
            losses(case, wrapped, x[here], grad[here], 1 / groups.dp.size).backward()
    expected = {name: 2 * value for name, value in expected_gradients(case, 1.0).items()}
    model.unused.grad = torch.zeros_like(model.unused) if model.unused.grad is None else model.unused.grad
    compare(case, model, expected)


def fsdp(sizes: dict, rule: str) -> None:
    groups = make_groups(**sizes)
    case = Case(TOKENS[: groups.dp.size], layer=LAYER)
    model = Model(case, ExpertParallel(groups, loss_reduction=rule))
    del model.unused
    expected = expected_gradients(case, 1.0)
    x, grad = parity.global_batch(case)
    start = sum(case.tokens[: groups.dp.rank])
    here = slice(start, start + case.tokens[groups.dp.rank])
    whole = Model(case, None)
    losses(case, whole, x, grad, 1.0).backward()
    wanted = nn.utils.clip_grad_norm_([p for p in whole.parameters() if p.grad is not None], 0.5)
    apply_fsdp2(model, groups, rule=rule)
    losses(case, model, x[here], grad[here], 1.0 if rule == "sum" else 1 / groups.dp.size).backward()
    compare(case, model, expected)
    assert_close(clip_grad_norm_(model, 0.5), wanted)


def drifted() -> None:
    groups = make_groups(ep=2)
    model = Model(Case(TOKENS), ExpertParallel(groups))
    check_replicas(model, everything=True)
    rank = dist.get_rank()
    with torch.no_grad():
        model.moe.router.weight[0, 0] += rank == 2
        model.moe.experts.down_proj[0, 0, 0] += rank == 3
    with pytest.raises(ConfigurationMismatch, match=r"^not equal to rank 0's: moe\.router\.weight on rank 2$"):
        check_replicas(model)
    broadcast_parameters(model)
    check_replicas(model, everything=True)
    assert model.moe.experts.down_proj.shape[0] == parity.EXPERTS // 2


SIZES = ({"ep": 4}, {"ep": 2}, {"ep": 2, "tp": 2}, {"ep": 2, "etp": 2}, {"ep": 1})


@pytest.mark.parametrize(("sizes", "rule"), products(sizes=SIZES, rule=("sum", "mean", "colossalai")))
def test_rules(four_ranks, sizes, rule):
    four_ranks.run(reduced, sizes, rule)


@pytest.mark.parametrize(("sizes", "norm"), products(sizes=SIZES, norm=(2.0, float("inf"))))
def test_norm_over_dense_and_expert_gradients(four_ranks, sizes, norm):
    four_ranks.run(clipped, sizes, norm)


@pytest.mark.parametrize("sizes", [{"ep": 4}, {"ep": 2}], ids=str)
def test_ddp_with_accumulation(four_ranks, sizes):
    four_ranks.run(ddp, sizes)


@pytest.mark.parametrize(("sizes", "rule"), products(sizes=({"ep": 4}, {"ep": 2}), rule=("sum", "mean")))
def test_fsdp2(four_ranks, sizes, rule):
    four_ranks.run(fsdp, sizes, rule)


def test_drifted_routers_are_seen_and_mended(four_ranks):
    four_ranks.run(drifted)
