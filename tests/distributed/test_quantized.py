"""Quantised experts over two ranks: results and gradients of one process, and checkpoints of either for the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_triton import MoE, quantize
from moe_triton.distributed import ExpertParallel, load_checkpoint, make_groups, save_checkpoint
from tests.helpers.compare import assert_close

D, N, E, T = 64, 64, 4, 12


def make(parallel=None, *, seed=3, lora=True):
    torch.manual_seed(seed)
    layer = MoE(D, N, E, 2, expert_parallel=parallel)
    quantize(layer, "mxfp4")
    if lora:
        layer.experts.add_lora(r=3, alpha=6)
        torch.nn.init.constant_(layer.experts.down_lora_b, 0.1)
    return layer


def tokens():
    torch.manual_seed(5)
    return torch.randn(2, T, D)


def step(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x).output
    out.square().sum().backward()
    return out.detach(), x.grad, layer.router.weight.grad, layer.experts.down_lora_a.grad


def on_a_rank(sizes):
    parallel = ExpertParallel(make_groups(**sizes), loss_reduction="sum")
    out, dx, router, a = step(make(parallel), tokens()[torch.distributed.get_rank()])
    return [x.numpy() for x in (out, dx, router, a)]


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 1, "etp": 2}])
def test_one_process(two_ranks, sizes):
    x = tokens()
    layer = make()
    out, dx, router, a = step(layer, x.flatten(0, 1))
    found = [[torch.from_numpy(x) for x in one] for one in two_ranks.run(on_a_rank, sizes)]
    assert_close(torch.cat([one[0] for one in found]), out)
    assert_close(torch.cat([one[1] for one in found]), dx)
    assert_close(sum(one[2] for one in found), router)
    dimension = 0 if "etp" not in sizes else 2
    assert_close(torch.cat([one[3] for one in found], dimension), a)


def save(folder):
    parallel = ExpertParallel(make_groups(ep=2))
    save_checkpoint(folder, make(parallel))


def load(folder):
    layer = make(ExpertParallel(make_groups(ep=2)), seed=9)
    load_checkpoint(folder, layer)
    return [x.view(torch.uint8).numpy() for x in layer.experts.buffers()]


def test_checkpoints(two_ranks, tmp_path: Path):
    two_ranks.run(save, tmp_path / "two")
    one = make(seed=11)
    load_checkpoint(tmp_path / "two", one)
    wanted = make()
    for (name, found), expected in zip(one.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), name
    save_checkpoint(tmp_path / "one", one)
    halves = two_ranks.run(load, tmp_path / "one")
    for index, expected in enumerate(wanted.experts.buffers()):
        found = torch.cat([torch.from_numpy(half[index]) for half in halves])
        assert torch.equal(found, expected.view(torch.uint8))
