"""Every router of `moe-triton train --router` trains, is causal where it says so, and goes on after a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moe_triton.training.checkpoint import Checkpoint, restore, write_checkpoint
from moe_triton.training.config import TrainConfig
from moe_triton.training.loop import evaluate, make_optimizer, record_fault, train_step
from moe_triton.training.model import LanguageModel
from moe_triton.training.routers import ROUTERS

TINY = TrainConfig(
    steps=3, batch_size=4, seq_len=16, num_layers=1, hidden_size=8, num_heads=2, intermediate_size=8, num_experts=8
)
TOKENS = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_trains(name: str) -> None:
    config = dataclasses.replace(TINY, router=name)
    torch.manual_seed(0)
    model = LanguageModel(config, "moe")
    optimizer = make_optimizer(model, config)
    before = model.blocks[0].feed_forward.router.weight.clone()
    for step in range(2):
        record = {"step": step, **train_step(model, optimizer, TOKENS, 1e-2, 1.0)}
    assert record_fault(record, config=config, kind="moe") is None
    assert 4 < record["train_loss"] < 8
    assert not torch.equal(model.blocks[0].feed_forward.router.weight, before)
    moved = model.blocks[0].feed_forward.router.choice_bias
    assert moved is None or moved.abs().max() > 0
    assert 4 < evaluate(model, TOKENS.flatten().to(torch.uint8), config) < 8


@pytest.mark.parametrize("name", ROUTERS)
def test_all_but_expert_choice_are_causal(name: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(dataclasses.replace(TINY, router=name), "moe").eval()
    tokens = TOKENS[:, :-1]
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 256
    before, after = model(tokens).logits[:, :8], model(changed).logits[:, :8]
    assert torch.allclose(before, after, atol=1e-6) == (name != "expert_choice")


@pytest.mark.parametrize("name", ["quantile_bias", "sign_bias", "hash"])
def test_a_checkpoint_holds_the_routers_buffers(name: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, router=name)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = LanguageModel(config, "moe")
        models.append((model, make_optimizer(model, config)))
    (model, optimizer), (other, other_optimizer) = models
    for _ in range(3):
        train_step(model, optimizer, TOKENS, 1e-2, 1.0)
    write_checkpoint(
        Checkpoint(path=tmp_path / "c", step=3, config=config, digest="", compare_dense=False), model, optimizer
    )
    restore(tmp_path / "c", other, other_optimizer)
    for _ in range(2):
        wanted = train_step(model, optimizer, TOKENS, 1e-2, 1.0)["train_loss"]
        assert train_step(other, other_optimizer, TOKENS, 1e-2, 1.0)["train_loss"] == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "random"}, "router: got 'random', wanted one of softmax"),
        ({"router": "groups", "num_experts": 6}, "router: got 'groups', wanted num_experts in 4 groups"),
        ({"router": "quantile_bias", "top_k": 8}, "router: got 'quantile_bias' with top_k=8"),
    ],
)
def test_a_router_that_does_not_fit_is_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)
