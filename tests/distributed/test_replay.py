"""Replay over ranks: the router of each rank sees the tokens of its rank, also where FSDP2 shards the model."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from moe_triton import MoE, RoutingRecorder
from moe_triton.distributed import ExpertParallel, apply_fsdp2, make_groups
from tests.helpers.compare import assert_close

D, E, K = 8, 6, 2


def replayed_on_ranks():
    torch.manual_seed(0)
    layer = MoE(D, 4, E, K, expert_parallel=ExpertParallel())
    rank = torch.distributed.get_rank()
    x = torch.randn(2, 5, D)[rank]
    recorder = RoutingRecorder(layer)
    with recorder.record():
        out = layer(x).output
    assert torch.equal(recorder.data[:, 0], layer.router(x).experts)
    with recorder.replay(recorder.data):
        assert torch.equal(layer(x).output, out)
    data = torch.rand(2, 5, 1, E).argsort(-1)[rank, ..., :K].int()
    with recorder.replay(data):
        counts = layer(x).expert_counts
    assert torch.equal(counts, torch.bincount(data.reshape(-1), minlength=E))


def test_over_ranks(two_ranks):
    two_ranks.run(replayed_on_ranks)


class Stack(nn.Module):
    """Two layers, each under activation checkpointing where asked."""

    def __init__(self, is_checkpointed: bool, expert_parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        make = partial(MoE, D, 4, E, K, dtype=torch.float64, expert_parallel=expert_parallel)
        self.blocks = nn.ModuleList([make(), make()])
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False) if self.is_checkpointed else block
            x = x + run(x).output
        return x


def sharded(is_checkpointed: bool, has_ep: bool) -> None:
    """Loss and gradients of a replayed step of two ranks are those of one process with both ranks' tokens."""
    torch.manual_seed(0)
    whole = Stack(is_checkpointed=False)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    data = torch.rand(2, 5, 2, E).argsort(-1)[..., :K].int()
    rank = torch.distributed.get_rank()
    if has_ep:
        groups = make_groups(ep=2)
        model = Stack(is_checkpointed, ExpertParallel(groups, loss_reduction="sum"))
        experts = slice(rank * E // 2, (rank + 1) * E // 2)
        held = {k: v[experts] if ".experts." in k else v for k, v in whole.state_dict().items()}
        model.load_state_dict(held)
        apply_fsdp2(model, groups, blocks=list(model.blocks), rule="sum")
    else:
        experts = slice(0, E)
        model = copy.deepcopy(whole)
        model.is_checkpointed = is_checkpointed
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    recorder = RoutingRecorder(model)
    with recorder.replay(data[rank]):
        loss = model(x[rank]).square().sum()
    loss.backward()
    assert recorder.invalid == 0

    with RoutingRecorder(whole).replay(data.flatten(0, 1)):
        whole(x.flatten(0, 1)).square().sum().backward()
    with recorder.record():
        model(x[rank])
    assert not torch.equal(recorder.data, data[rank]), "the routers would have chosen the same"
    share = 1.0 if has_ep else 2.0  # FSDP2 averages; with the rule "sum" it does not
    for name, parameter in model.named_parameters():
        wanted = whole.get_parameter(name).grad
        wanted = wanted[experts] if ".experts." in name else wanted
        assert_close(parameter.grad.full_tensor() * share, wanted)


@pytest.mark.parametrize("has_ep", [False, True])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_under_fsdp2(is_checkpointed, has_ep, two_ranks):
    two_ranks.run(sharded, is_checkpointed, has_ep)
