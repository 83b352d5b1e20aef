"""Gradients, their norm and equal replicas, against one process on the global batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_triton.compat.deepspeed.layer import MoE as DeepSpeedMoE
from moe_triton.distributed import (
    ConfigurationMismatch,
    ExpertParallel,
    broadcast_parameters,
    check_replicas,
    clip_grad_norm_,
    make_groups,
    reduce_gradients,
)
from moe_triton.distributed.exchange.channel import Channel
from tests.helpers import parity
from tests.helpers.compare import assert_close
from tests.helpers.gradient_parity import LAYER, TOKENS, Model, backward_here, compare, expected_gradients, losses
from tests.helpers.parity import HIDDEN, Case
from tests.helpers.ranks import products


def reduced(sizes: dict, rule: str) -> None:
    groups = make_groups(**sizes)
    case = Case(TOKENS[: groups.dp.size], layer=LAYER, lora=True)
    model = backward_here(case, groups, rule)
    reduce_gradients(model, rule=rule)
    expected = expected_gradients(case, 1.0)
    ep = groups.dp.size / groups.edp.size
    compare(case, model, expected, lambda name: ep if rule == "colossalai" and ".experts." in name else 1.0)
    assert torch.equal(model.unused.grad, torch.zeros_like(model.unused)), "a missing gradient becomes zeros"


def clipped(sizes: dict, norm_type: float) -> None:
    groups = make_groups(**sizes)
    case = Case(TOKENS[: groups.dp.size], layer=LAYER, lora=True)
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


def test_drifted_routers_are_seen_and_mended(four_ranks):
    four_ranks.run(drifted)


def disagreeing(rule: str) -> None:
    """Every rank refuses, before anything is sent."""
    groups = make_groups(ep=2)
    other = "mean" if rule == "sum" else "sum"
    model = backward_here(Case(TOKENS, layer=LAYER), groups, other)
    before = model.first.weight.grad.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "_issue", None)
        with pytest.raises(ValueError, match=rf"rule: got '{rule}' with loss_reduction='{other}' at 'moe.experts'"):
            reduce_gradients(model, rule=rule)
    assert torch.equal(model.first.weight.grad, before)


def disagreeing_ranks() -> None:
    groups = make_groups(ep=4)
    reduction = "sum" if dist.get_rank() == 2 else "mean"
    model = Model(Case(TOKENS), ExpertParallel(groups, loss_reduction=reduction))
    with pytest.raises(ConfigurationMismatch, match="loss_reduction"):
        model(torch.randn(5, HIDDEN, dtype=torch.float64))


def clipped_with_gradients_on_some_ranks(without: list[int], pieces: list[str]) -> None:
    """The norm counts what there is; a rank without any gradient takes part."""
    groups = make_groups(ep=2)
    model = Model(Case(TOKENS, layer=LAYER), ExpertParallel(groups))
    rank = dist.get_rank()
    for name, parameter in model.named_parameters():
        if rank not in without and any(piece in name for piece in pieces):
            parameter.grad = torch.full_like(parameter, rank + 1.0)
    given = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    dense = sum(g.square().sum() for name, g in given.items() if ".experts." not in name)
    expert = torch.tensor(0.0, dtype=torch.float64) + sum(
        g.square().sum() for name, g in given.items() if ".experts." in name
    )
    dist.all_reduce(expert, group=groups.ep.handle)
    wanted = (dense + expert).sqrt()
    assert_close(clip_grad_norm_(model, 1.0, groups), wanted)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in given)
        if name in given:
            assert_close(parameter.grad, given[name] * (1 / (wanted + 1e-6)).clamp_max(1))


def deepspeed_layer() -> None:
    """The experts of a DeepSpeed layer are no copies of each other either."""
    torch.manual_seed(0)
    expert = nn.Sequential(nn.Linear(HIDDEN, 8), nn.ReLU(), nn.Linear(8, HIDDEN))
    layer = DeepSpeedMoE(HIDDEN, expert, num_experts=4, ep_size=2, k=1, capacity_factor=4.0)
    torch.manual_seed(dist.get_rank())
    layer(torch.randn(6, HIDDEN))[0].square().sum().backward()
    held = dict(layer.deepspeed_moe.experts.named_parameters())
    pairs = list(layer.named_parameters())
    wanted, copies = {}, layer.deepspeed_moe.expert_parallel.edp
    for name, parameter in pairs:
        total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(total, group=copies.handle if any(parameter is p for p in held.values()) else None)
        wanted[name] = total / 4
    reduce_gradients(layer)
    squares = torch.zeros(2)
    for name, parameter in pairs:
        assert_close(parameter.grad, wanted[name])
        squares[int(any(parameter is p for p in held.values()))] += wanted[name].square().sum()
    dist.all_reduce(squares[1:], group=layer.deepspeed_moe.expert_parallel.ep.handle)
    assert_close(clip_grad_norm_(layer, 1.0), squares.sum().sqrt())


@pytest.mark.parametrize("rule", ["sum", "mean", "colossalai"])
def test_layer_and_reducer_have_to_agree(four_ranks, rule):
    four_ranks.run(disagreeing, rule)


def test_ranks_have_to_agree_on_the_loss(four_ranks):
    four_ranks.run(disagreeing_ranks)


@pytest.mark.parametrize("without", [[1], [0, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("pieces", [[""], ["experts"], ["first"]], ids=str)
def test_norm_where_ranks_have_no_gradients(four_ranks, without, pieces):
    four_ranks.run(clipped_with_gradients_on_some_ranks, without, pieces)


def test_deepspeed_experts_are_experts(four_ranks):
    four_ranks.run(deepspeed_layer)
