"""Experts in a latent space: a projection before them and one after their sum; the router sees the hidden states."""

from __future__ import annotations

import pytest
import torch

import moe_triton
from moe_triton import MoE, explain
from moe_triton.integrations import transformers as hf
from tests.helpers import parity
from tests.helpers.compare import assert_close
from tests.helpers.experts_classes import tiny_experts
from tests.helpers.parity import Case

LATENT = {"latent_size": 7, "shared_intermediate_size": 10, "shared_gate": True, "bias": True}


def by_hand(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The layer as a sum over tokens and choices."""
    routing, experts, rows = layer.router(x), layer.experts, []
    latent = x @ layer.latent_down_proj.weight.T + layer.latent_down_proj.bias
    for t in range(len(x)):
        total = torch.zeros(7, dtype=x.dtype)
        for expert, weight in zip(routing.experts[t].tolist(), routing.weights[t], strict=True):
            h = experts.gate_up_proj[expert] @ latent[t] + experts.gate_up_proj_bias[expert]
            gate, up = h.chunk(2)
            a = gate * torch.sigmoid(gate) * up
            total = total + weight * (experts.down_proj[expert] @ a + experts.down_proj_bias[expert])
        rows.append(layer.latent_up_proj.weight @ total + layer.latent_up_proj.bias)
    shared = layer.shared_expert(x) * torch.sigmoid(x @ layer.shared_expert_gate.weight.T)
    return torch.stack(rows) + shared


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_the_sum_by_hand(backend):
    layer = MoE(16, 12, 5, 2, backend=backend, dtype=torch.float64, **LATENT)
    assert layer.experts.gate_up_proj.shape == (5, 24, 7)
    assert layer.experts.down_proj.shape == (5, 7, 12)
    x, grad = torch.randn(9, 16, dtype=torch.float64), torch.randn(9, 16, dtype=torch.float64)
    found = []
    for run in (lambda leaf: layer(leaf).output, lambda leaf: by_hand(layer, leaf)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        out = run(leaf)
        out.backward(grad)
        found.append([out, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected.detach())


def test_masks_capacity_and_recomputation():
    layer = MoE(16, 12, 5, 2, capacity_factor=0.5, min_capacity=1, recompute=True, **LATENT)
    x, mask = torch.randn(11, 16), torch.arange(11) != 4
    x[4] = torch.nan
    out = torch.utils.checkpoint.checkpoint(lambda: layer(x, mask).output, use_reentrant=False)
    assert torch.equal(out[4], torch.zeros(16))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("exchange", [{}, {"mode": "allgather", "deduplicate": False}], ids=str)
def test_over_ranks(two_ranks, exchange):
    """The latent rows travel: the ranks compare their sizes as hidden_size."""
    two_ranks.run(
        parity.check, Case([5, 8], {"ep": 2}, exchange=exchange, layer={"aux_loss_weight": 0.1, **LATENT}, experts=4)
    )


def test_explained():
    layer = MoE(16, 12, 5, 2, **LATENT)
    (found,) = explain(layer)
    assert found.shape[1:3] == (7, 12)
    assert "latent projections" in str(found)
    assert "16 -> 7, and back" in str(found)
    assert "the sigmoid of its own gate" in str(found)
    assert "batch invariance" in str(explain(MoE(16, 12, 5, 2, batch_invariant=True))[0])


def test_nemotron_h_in_a_latent_space_is_swapped():
    module = tiny_experts("nemotron_h.NemotronHExperts")
    module.config.hidden_size = 4 * module.down_proj.shape[1]
    assert hf.latent_sizes(module) == (module.down_proj.shape[1], 4 * module.down_proj.shape[1])
    (entry,) = moe_triton.swap(module).swapped
    assert "fused, relu2, in a latent space of 16 of 64 numbers" in entry.action
