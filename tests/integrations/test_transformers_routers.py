"""Replay and statistics on every family of transformers whose experts have its interface: one small block of each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_triton
from moe_triton.integrations.given_choices import samples_by_argmax
from moe_triton.integrations.transformers_routers import PROBABILITIES, routed_layers, router_scores
from tests.helpers.experts_modules import D, E, K, N
from tests.helpers.routed_blocks import EXPERTS, tiny_block

MASKED = ("zaya.ZayaExperts",)  # its router hands the ids of its last class, which is no expert, on as 0 of weight 0


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def run(block, x, extra):
    """The block's output and gradients by name, with the same noise every time."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    out = first_of(block(1.0 * x, **extra))  # jitter changes it in place
    leaves = {"x": x, **{name: leaf for name, leaf in block.named_parameters() if leaf.requires_grad}}
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def same_bits(found, wanted):
    return all(a is wanted[name] is None or torch.equal(a, wanted[name]) for name, a in found.items())


@pytest.mark.parametrize("name", EXPERTS)
def test_a_family(name):
    block, x, extra = tiny_block(name)
    (layer,) = routed_layers(block)
    assert (layer.num_experts, layer.top_k) == (E, K)
    given, logits = [], []
    layer.experts.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((*args, *kwargs.values())[1]), with_kwargs=True
    )
    layer.router.register_forward_hook(lambda _, args, out: logits.append(router_scores(layer, out)))
    monitor, recorder = moe_triton.LoadMonitor(block), moe_triton.RoutingRecorder(block)
    assert list(recorder.layers.values()) == [0]

    # what is recorded is what the experts are given, and nothing else changes
    plain = run(block, x, extra)
    readings, seen = monitor.read(mode="train"), (given[-1], logits[-1])
    monitor.close()
    with recorder.record():
        recorded = run(block, x, extra)
    assert same_bits(recorded, plain)
    data = recorder.data
    assert (data.shape[0], data.shape[2]) == (10, K)  # as many layers as the block's config says
    ids = given[-1].reshape(10, K).int()
    is_expert = data[:, 0] < E
    assert torch.equal(ids[is_expert], data[:, 0][is_expert])
    assert is_expert.all() or name in MASKED

    # the same choices give the same bits; other ones are made, in the rows that have data, and train the router
    with recorder.replay(data):
        assert same_bits(run(block, x, extra), plain)
    wanted = torch.stack([torch.randperm(E)[:K] for _ in range(10)]).int()
    has_data = torch.arange(10) % 3 != 0
    with recorder.replay(wanted[:, None], has_data):
        replayed = run(block, x, extra)
    assert torch.equal(given[-1].reshape(10, K)[has_data].int(), wanted[has_data])
    if not samples_by_argmax(layer.router):  # there the noise for the second choice depends on the first
        assert torch.equal(given[-1].reshape(10, K)[~has_data].int(), ids[~has_data])
    assert all(gradient is None or torch.isfinite(gradient).all() for gradient in replayed.values())
    of_router = [grad for key, grad in replayed.items() if key.startswith(("gate.", "router.")) and grad is not None]
    assert any(gradient.abs().sum() > 0 for gradient in of_router)

    # statistics: the counts of the ids, and the balance of the router's own probabilities
    (reading,) = readings.values()
    counts = torch.bincount(seen[0].reshape(-1), minlength=E)
    assert reading.loads == pytest.approx((counts / counts.float().mean()).tolist())
    probabilities, raw = seen[1]
    is_probability = type(layer.router).__name__ in PROBABILITIES
    assert (raw is None) == is_probability
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(10))
    if not is_probability:
        assert not torch.allclose(raw.sum(-1), torch.ones(10))
    f, p = counts / counts.sum(), probabilities[:, :E].mean(0)
    assert reading.balance == pytest.approx(E * (f * p).sum().item(), rel=1e-4)
    assert (reading.z is None) == is_probability

    (explained,) = moe_triton.explain(nn.ModuleDict({"block": block}), tokens=10)
    assert explained.backend == "transformers"
    assert explained.shape == (10, D, N, E, K)
    moe_triton.swap(block)
    assert moe_triton.explain(block)[0].backend == "torch"
