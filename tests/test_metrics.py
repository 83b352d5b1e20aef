"""Load statistics: the arithmetic, and the monitor on real layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_triton
from moe_triton import LoadMonitor, load_statistics, plot_load


def test_an_even_load():
    found = load_statistics(torch.tensor([5, 5, 5, 5]), dropped=0)
    assert (found.assignments, found.max_load, found.min_load, found.idle) == (20, 1.0, 1.0, 0)
    assert found.entropy == pytest.approx(1.0)
    assert (found.max_violation, found.dropped) == (0.0, 0.0)


def test_an_uneven_load():
    found = load_statistics(torch.tensor([6, 2, 0, 0], dtype=torch.int32), dropped=2)
    assert found.max_load == pytest.approx(3.0)
    assert found.max_violation == pytest.approx(2.0)
    assert found.idle == 2
    assert found.dropped == pytest.approx(0.25)
    assert found.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert "2 idle, dropped 25.00%" in str(found)


def test_nothing_and_one_expert():
    assert load_statistics(torch.zeros(3, dtype=torch.int64)).entropy == 1.0
    assert load_statistics(torch.tensor([7])).max_load == 1.0
    assert load_statistics(torch.tensor([7])).dropped is None


@pytest.mark.parametrize(
    ("counts", "dropped", "message"),
    [
        (torch.ones(2), None, "counts: got dtype torch.float32"),
        (torch.ones(2, 2, dtype=torch.int64), None, r"counts: got shape \[2, 2\]"),
        ([1, 2], None, "counts: got list"),
        (torch.ones(2, dtype=torch.int64), -1, "dropped: got -1"),
    ],
)
def test_bad_arguments(counts, dropped, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_statistics(counts, dropped)


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


def test_an_evaluation_in_inference_mode_is_counted_on_top_of():
    layer = moe_triton.MoE(8, 4, 4, top_k=2)
    monitor = LoadMonitor(layer)
    with torch.inference_mode():
        layer.eval()(torch.randn(12, 8))
    layer.train()(torch.randn(3, 8))
    assert monitor.read()["experts"].assignments == 30


def test_counting_waits_for_nothing(monkeypatch):
    layer = moe_triton.MoE(8, 4, 4, top_k=2)
    monitor = LoadMonitor(layer)
    plan = moe_triton.dispatch(torch.tensor([[0, 1], [2, 3]]), 4)
    for name in ("item", "tolist", "cpu", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name: pytest.fail(f"{name} waits for the device"))
    monitor._add("experts", plan)
    monitor._add("experts", plan)


def test_a_model_without_experts():
    with pytest.raises(ValueError, match="wanted at least one"):
        LoadMonitor(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: got int"):
        LoadMonitor(3)


def test_the_plot(tmp_path):
    model = two_layers(capacity_factor=1.0)
    history = []
    with LoadMonitor(model) as monitor:
        for _ in range(3):
            run(model)
            history.append(monitor.read())
    plot_load(history, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="history: got nothing"):
        plot_load([], tmp_path / "x.png")
