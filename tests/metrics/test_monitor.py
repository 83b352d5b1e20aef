"""The load monitor on our layers and on transformers models."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_triton
from moe_triton import LoadMonitor
from moe_triton.integrations.transformers_routers import routed_layers
from tests.helpers.families import VOCAB, tiny_model


def two_layers(**options):
    return nn.Sequential(*(moe_triton.MoE(8, 4, 4, top_k=2, **options) for _ in range(2)))


def run(model, tokens=12):
    x = torch.randn(tokens, 8)
    outs = []
    for layer in model:
        out = layer(x)
        x = out.output
        outs.append(out)
    return outs


def test_the_monitor_counts_what_the_layers_report():
    model = two_layers()
    with LoadMonitor(model) as monitor:
        outs = [run(model), run(model)]
        counts = monitor.counts()
        assert list(counts) == ["0.experts", "1.experts"]
        for layer, name in enumerate(counts):
            assert torch.equal(counts[name], outs[0][layer].expert_counts + outs[1][layer].expert_counts)
        found = monitor.read()
        assert found["0.experts"].assignments == 2 * 12 * 2
        assert found["0.experts"].dropped == 0.0
        assert monitor.read() == {}  # it started anew
        run(model)
        assert monitor.read(reset=False) == monitor.read()
    run(model)
    assert monitor.read() == {}  # closed


def test_the_monitor_sees_what_a_capacity_drops():
    layer = moe_triton.MoE(8, 4, 4, top_k=2, capacity_factor=0.5, min_capacity=0)
    monitor = LoadMonitor(layer)
    out = layer(torch.randn(16, 8))
    dropped = (out.expert_counts - layer.capacity(16)).clamp_min(0).sum().item()
    assert dropped > 0
    assert monitor.read()["experts"].dropped == pytest.approx(dropped / 32)


def test_a_recomputed_forward_counts_once():
    layer = moe_triton.MoE(8, 4, 4, top_k=2)
    monitor = LoadMonitor(layer)
    x = torch.randn(12, 8, requires_grad=True)
    checkpoint(lambda h: layer(h).output, x, use_reentrant=False).sum().backward()
    assert monitor.read()["experts"].assignments == 24


def test_training_and_evaluation_are_counted_apart():
    layer = moe_triton.MoE(8, 4, 4, top_k=2)
    monitor = LoadMonitor(layer)
    with torch.inference_mode():
        layer.eval()(torch.randn(12, 8))
    layer.train()(torch.randn(3, 8))
    assert monitor.read(reset=False)["experts"].assignments == 30
    assert monitor.read(mode="train")["experts"].assignments == 6
    with torch.inference_mode():
        layer.eval()(torch.randn(1, 8))
    assert monitor.read(mode="train") == {}
    assert monitor.counts("eval")["experts"].sum() == 26
    assert monitor.read()["experts"].assignments == 26
    with pytest.raises(ValueError, match="mode: got 'test', wanted one of train, eval"):
        monitor.read(mode="test")


def test_counting_waits_for_nothing(monkeypatch):
    layer = moe_triton.MoE(8, 4, 4, top_k=2)
    monitor = LoadMonitor(layer)
    block = tiny_model("granitemoe").model.layers[0].block_sparse_moe
    foreign = LoadMonitor(block)
    foreign.token_mask = torch.tensor([[1, 1, 0]])
    dispatched = moe_triton.dispatch(torch.tensor([[0, 1], [2, 3]]), 4)
    routing = layer.router(torch.randn(2, 8))
    routed = block.router(torch.randn(3, 32))
    ids = next(x for x in routed if not x.is_floating_point())
    (routed_layer,) = routed_layers(block)
    for name in ("item", "tolist", "cpu", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name: pytest.fail(f"{name} waits for the device"))
    for _ in range(2):
        monitor._count("experts", layer.experts, (None, None, dispatched), {})
        monitor._score("experts", layer.router, (), routing)
        foreign._count_foreign("experts", block.experts, (None, ids, None), {})
        foreign._score_foreign(routed_layer, block.router, (), routed)


def test_a_model_without_experts():
    with pytest.raises(ValueError, match="wanted at least one"):
        LoadMonitor(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: got int"):
        LoadMonitor(3)


def collapsed(num_layers=4, num_experts=8):
    """A gpt-oss whose layers each send every token to a pair of experts of their own."""
    config = transformers.GptOssConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=16, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=num_experts, num_experts_per_tok=2, pad_token_id=None,
        output_router_logits=True,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for index, (_, module) in enumerate((n, m) for n, m in model.named_modules() if n.endswith("mlp.router")):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        module.bias.data[2 * index : 2 * index + 2] = 20.0
    return model


def test_layers_that_collapse_apart_are_seen():
    """transformers pools the layers before it multiplies load and probability: together they look balanced."""
    model = collapsed()
    monitor = LoadMonitor(model)
    out = model(torch.randint(0, VOCAB, (2, 9)))
    assert out.aux_loss.item() == pytest.approx(2.0, rel=1e-4)  # K, the value of perfect balance there
    readings = list(monitor.read().values())
    assert [reading.balance for reading in readings] == pytest.approx([4.0] * 4, rel=1e-4)  # E / K, 1 is balanced
    assert [reading.dead_experts for reading in readings] == [
        [expert for expert in range(8) if expert // 2 != layer] for layer in range(4)
    ]
    assert all(reading.z == pytest.approx((20 + torch.tensor(2.0).log().item()) ** 2, rel=1e-4) for reading in readings)


def test_the_balance_of_our_own_layers_is_their_loss():
    model = two_layers(aux_loss_weight=1.0)
    monitor = LoadMonitor(model)
    for layer, reading in zip(run(model), monitor.read().values(), strict=True):
        assert reading.balance == pytest.approx(layer.aux_loss.item(), rel=1e-5)
        assert reading.z > 0


@pytest.mark.parametrize("swapped", [False, True])
def test_padding_does_not_count(swapped):
    model = tiny_model("mixtral")
    if swapped:
        moe_triton.swap(model)
    monitor = LoadMonitor(model)
    tokens = torch.randint(0, VOCAB, (2, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    model(tokens, attention_mask=mask)
    padded = monitor.read()
    assert [reading.assignments for reading in padded.values()] == [18, 18]
    assert list(padded) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    # the same tokens without the padding, one sequence after the other
    model(tokens[:1])
    model(tokens[1:, :3])
    for got, wanted in zip(padded.values(), monitor.read().values(), strict=True):
        assert got.loads == wanted.loads
        assert (got.balance, got.z) == pytest.approx((wanted.balance, wanted.z), rel=1e-4)


def test_padding_does_not_count_while_generating():
    model = tiny_model("mixtral").eval()
    monitor = LoadMonitor(model)
    tokens = torch.randint(2, VOCAB, (2, 4))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])  # on the left, as for generation
    model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [reading.assignments for reading in monitor.read(mode="eval").values()] == [2 * (6 + 2 * 2)] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_of_a_transformers_model_counts_once(use_reentrant):
    model = tiny_model("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    monitor = LoadMonitor(model)
    tokens = torch.randint(0, VOCAB, (2, 5))
    model(tokens, labels=tokens).loss.backward()
    assert [reading.assignments for reading in monitor.read(mode="train").values()] == [20, 20]
