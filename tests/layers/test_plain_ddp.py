"""Layers without expert parallelism in DistributedDataParallel itself."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from moe_triton import MoE, Router, update_choice_biases


def counted(*, no_sync: bool, static_graph: bool) -> None:
    """Every rank's router counts its own tokens over the micro-batches, and the bias moves by the sum over ranks."""
    rank = dist.get_rank()
    layer = MoE(16, 8, 4, 2, router=Router(16, 4, 2, score="sigmoid", choice_bias=True))
    model = DistributedDataParallel(layer, static_graph=static_graph)
    torch.manual_seed(100 + rank)
    for step in range(2):
        wanted = torch.zeros(4, dtype=torch.int64)
        for last in (False, False, True):
            with model.no_sync() if no_sync and not last else contextlib.nullcontext():
                out = model(torch.randn(7, 16) + 3 * rank)
                out.output.sum().backward()
            wanted += out.expert_counts
        assert torch.equal(layer.router.load, wanted)
        dist.all_reduce(wanted)
        before = layer.router.choice_bias.clone()
        update_choice_biases(model, 0.01)
        mean = wanted.float().mean()
        assert torch.equal(layer.router.choice_bias, before + 0.01 * torch.sign(mean - wanted)), step
        assert layer.router.load.sum() == 0


def test_the_load_is_counted_by_each_rank(two_ranks):
    two_ranks.run(counted_every_way)


def counted_every_way() -> None:
    counted(no_sync=False, static_graph=False)
    counted(no_sync=True, static_graph=False)
    counted(no_sync=False, static_graph=True)
