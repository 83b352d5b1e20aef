"""The language model: causal, fair to the dense one, and trained by every one of its parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moe_triton.training.config import TrainConfig
from moe_triton.training.loop import evaluate, kept_assignments, learning_rate, make_optimizer, train_step
from moe_triton.training.model import LanguageModel, rotary_table, rotate

TINY = TrainConfig(
    steps=20, batch_size=2, seq_len=24, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=8, num_experts=4
)


@pytest.mark.parametrize("kind", ["moe", "dense"])
@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
def test_future_bytes_do_not_change_past_logits(kind: str, capacity_factor: float) -> None:
    model = LanguageModel(dataclasses.replace(TINY, capacity_factor=capacity_factor), kind).eval()
    tokens = torch.randint(0, 256, (2, 24))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 256
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-6)
    assert (before[:, 12] - after[:, 12]).abs().max() > 1e-3  # the byte itself does matter
    earlier = tokens.clone()
    earlier[:, 0] = (earlier[:, 0] + 1) % 256
    assert (model(earlier).logits[:, -1] - before[:, -1]).abs().max() > 1e-5  # and the past reaches the end


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    cos, sin = rotary_table(32, 8, torch.device("cpu"))
    q, k = torch.randn(2, 8)
    rotated_q, rotated_k = (rotate(x.expand(32, 8), cos, sin) for x in (q, k))
    scores = rotated_q @ rotated_k.T
    torch.testing.assert_close(scores[5, 2], scores[25, 22])
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(32))
    assert abs(scores[5, 2] - scores[5, 3]) > 1e-4


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_size": 64, "intermediate_size": 48, "num_experts": 16, "top_k": 1},
        {"num_experts": 7, "top_k": 3, "intermediate_size": 33},
    ],
)
def test_active_parameters_agree_within_one_percent(sizes: dict[str, int]) -> None:
    config = dataclasses.replace(TrainConfig(), **sizes)
    moe, dense = LanguageModel(config, "moe"), LanguageModel(config, "dense")
    total, active = moe.parameter_counts()
    dense_total, dense_active = dense.parameter_counts()
    assert dense_total == dense_active == sum(weight.numel() for weight in dense.parameters())
    assert abs(active / dense_active - 1) < 0.01
    expert = 3 * config.hidden_size * config.intermediate_size
    assert total - active == config.num_layers * (config.num_experts - config.top_k) * expert


def test_expert_counts_and_what_the_capacity_keeps() -> None:
    config = dataclasses.replace(TINY, capacity_factor=1.0, capacity_groups=2)
    model = LanguageModel(config, "moe").train()
    with kept_assignments(model) as kept:
        out = model(torch.randint(0, 256, (2, 24)))
    assert out.expert_counts.shape == (2, 4)
    assert out.expert_counts.sum(1).tolist() == [2 * 24 * 2] * 2
    assert len(kept) == 2
    for wanted, survived in zip(out.expert_counts, kept, strict=True):
        assert (wanted - 24).clamp_min(0).sum() <= 96 - survived  # the groups' capacities of 12 drop at least as many
        assert 0 < survived < 96
    with kept_assignments(LanguageModel(TINY, "moe").train()) as kept:
        pass
    assert kept == []


@pytest.mark.parametrize("fp8", [False, True])
def test_products_in_bf16_and_fp8(fp8: bool) -> None:
    """Parameters, gradients and logits stay in fp32, and the loss falls."""
    config = dataclasses.replace(TINY, dtype="bfloat16", fp8=fp8)
    model = LanguageModel(config, "moe")
    assert [block.feed_forward.experts.spec.fp8 for block in model.blocks] == [fp8, fp8]
    optimizer, tokens = make_optimizer(model, config), torch.randint(0, 256, (2, 25))
    losses = [train_step(model, optimizer, tokens, 0.01, 1.0)["train_loss"] for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    found = [model(tokens[:, :-1]).logits, *model.parameters(), *(p.grad for p in model.parameters())]
    assert {x.dtype for x in found} == {torch.float32}
    wide = LanguageModel(TINY, "moe")
    wide.load_state_dict(model.state_dict())
    error = (wide(tokens[:, :-1]).logits - found[0]).norm() / found[0].norm()
    assert (0.004 if fp8 else 0.0005) < error < 0.1


def test_fp8_is_not_for_float64() -> None:
    with pytest.raises(ValueError, match="fp8: got True with dtype 'float64', wanted 'float32' or 'bfloat16'"):
        dataclasses.replace(TINY, dtype="float64", fp8=True)


def test_evaluation_drops_nothing() -> None:
    tokens = torch.randint(0, 256, (2, 24))
    torch.manual_seed(1)
    tight = LanguageModel(dataclasses.replace(TINY, capacity_factor=0.5), "moe")
    torch.manual_seed(1)
    free = LanguageModel(TINY, "moe")
    assert not torch.equal(tight(tokens).logits, free(tokens).logits)
    text = tokens.flatten().to(torch.uint8)
    assert evaluate(tight, text, TINY) == evaluate(free, text, TINY)
    assert not tight.training


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a_step_moves_every_parameter_and_learning_lowers_the_loss(kind: str) -> None:
    model = LanguageModel(TINY, kind)
    optimizer = make_optimizer(model, TINY)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tokens = torch.randint(0, 256, (2, 25))
    losses = [train_step(model, optimizer, tokens, 1e-2, 1.0)["train_loss"] for _ in range(12)]
    assert losses[-1] < losses[0] - 1.0
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, before[name]), name


def test_train_loss_is_the_mean_cross_entropy_without_the_auxiliary_loss() -> None:
    model = LanguageModel(dataclasses.replace(TINY, aux_loss_weight=5.0), "moe")
    tokens = torch.randint(0, 256, (2, 25))
    expected = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1).double(), tokens[:, 1:].flatten()).item()
    record = train_step(model, make_optimizer(model, TINY), tokens, 1e-3, 1.0)
    assert record["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert record["aux_loss"] > 1.0
    assert record["max_load"] == max(max(row) for row in record["expert_load"]) / (48 * 2 / 4)


def test_the_auxiliary_loss_is_trained() -> None:
    tokens = torch.randint(0, 256, (2, 25))
    routers = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        model = LanguageModel(dataclasses.replace(TINY, aux_loss_weight=weight, z_loss_weight=0.0), "moe")
        train_step(model, make_optimizer(model, TINY), tokens, 1e-2, 1.0)
        routers.append(next(value for name, value in model.named_parameters() if "router" in name))
    assert not torch.equal(*routers)


def test_learning_rate_schedule() -> None:
    config = TrainConfig(steps=100, lr=1.0, dense_lr=0.5)
    rates = [learning_rate(config, "moe", step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(config, "dense", 50) == pytest.approx(rates[49] / 2)
    assert learning_rate(TrainConfig(steps=1, lr=0.3), "moe", 1) == 0.3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("seed", -1), ("batch_size", 0), ("seq_len", 1), ("lr", 0.0), ("dense_lr", float("nan")),
        ("num_layers", 0), ("hidden_size", 30), ("top_k", 17), ("capacity_factor", -1.0), ("aux_loss_weight", -1.0),
        ("backend", "cuda"), ("steps", 1.5),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: got"):
        TrainConfig(**{name: value})
