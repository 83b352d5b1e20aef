"""Loss scaling: an overflow on one rank skips the step of all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_triton.distributed import (
    ExpertParallel,
    GradScaler,
    apply_fsdp2,
    clip_grad_norm_,
    make_groups,
    reduce_gradients,
)
from tests.helpers.gradient_parity import TOKENS, Model
from tests.helpers.parity import HIDDEN, Case
from tests.helpers.ranks import products

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def scaled(optimizer_name: str, unscales: bool, shards: bool, *, all_have_gradients: bool = True) -> tuple:
    """Step 0 overflows in an expert of rank 2 alone, step 1 nowhere."""
    groups = make_groups(ep=2 if shards else 4)
    model = Model(Case(TOKENS, dtype=torch.float32), ExpertParallel(groups))
    del model.unused
    if shards:
        apply_fsdp2(model, groups)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    stepped = []
    for step in range(2):
        before = [local(p).detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        x = torch.randn(5, HIDDEN)
        scaler.scale(model(x).output.square().mean()).backward()
        reduce_gradients(model)
        if step == 0 and dist.get_rank() == 2:
            local(model.moe.experts.down_proj.grad)[0, 0, 0] = torch.inf
        if not all_have_gradients and dist.get_rank() == 1:
            optimizer.zero_grad()
        if unscales:
            scaler.unscale_(optimizer)
        if unscales and step == 1:
            assert torch.isfinite(clip_grad_norm_(model, 1.0))
        scaler.step(optimizer)
        scaler.update()
        after = [local(p) for p in model.parameters()]
        stepped.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return stepped, scaler.get_scale()


def without_some_gradients(optimizer: str) -> tuple[list[bool], float]:
    return scaled(optimizer, unscales=True, shards=False, all_have_gradients=False)


@pytest.mark.parametrize(
    ("optimizer", "unscales", "shards"),
    products(optimizer=tuple(OPTIMIZERS), unscales=(True, False), shards=(False, True)),
)
def test_all_ranks_skip_together(four_ranks, optimizer, unscales, shards):
    assert four_ranks.run(scaled, optimizer, unscales, shards) == [([False, True], 4.0)] * 4


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_rank_without_gradients_takes_part(four_ranks, optimizer):
    found = four_ranks.run(without_some_gradients, optimizer)
    assert [stepped for stepped, _ in found] == [[False, True], [False, False], [False, True], [False, True]]
    assert {scale for _, scale in found} == {4.0}


def test_as_torchs_in_one_process():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, torch.inf):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(parameter, torch.zeros(3))
    assert scaler.get_scale() == 2.0
