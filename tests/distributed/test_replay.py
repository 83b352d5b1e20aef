"""Replay over ranks: the router of each rank sees the tokens of its rank."""

from __future__ import annotations

import torch

from moe_triton import MoE, RoutingRecorder
from moe_triton.distributed import ExpertParallel

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
