"""The auxiliary losses against their papers' formulas, and what they keep for backward."""

from __future__ import annotations

import pytest
import torch

import moe_triton
from moe_triton import MoE, Router
from tests.helpers.compare import assert_close


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_per_sequence_is_deepseek_v3s(masked):
    """The mean over sequences of sum_i f_i P_i: f_i the load times E / K, P_i the mean of s_i / sum_j s_j (eq. 17)."""
    num_sequences, length, num_experts, top_k = 3, 7, 5, 2
    logits = torch.randn(num_sequences, length, num_experts, dtype=torch.float64)
    mask = torch.ones(num_sequences, length, dtype=torch.bool)
    if masked:
        mask[0, 4:], mask[2] = False, False  # the last sequence has no token
    losses = []
    for sequence, counted in zip(logits, mask, strict=True):
        scores = sequence[counted].sigmoid()
        if len(scores):
            chosen = torch.zeros_like(scores).scatter(1, scores.topk(top_k).indices, 1.0)
            f = num_experts / (top_k * len(scores)) * chosen.sum(0)
            losses.append((f * (scores / scores.sum(1, keepdim=True)).mean(0)).sum())
    options = {"score": "sigmoid", "token_mask": mask.flatten(), "sequences": num_sequences}
    sums = moe_triton.route(logits.flatten(0, 1), top_k, **options).sequences
    assert_close(moe_triton.load_balance_loss(*sums, top_k, per_sequence=True), torch.stack(losses).mean())


def test_a_layer_takes_the_last_but_one_dimension_for_sequences():
    torch.manual_seed(0)
    layer = MoE(8, 4, 5, 2, sequence_loss_weight=0.5)
    x = torch.randn(2, 3, 7, 8)
    alone = [layer(sequence).aux_loss for sequence in x.flatten(0, 1)]
    assert_close(layer(x).aux_loss, torch.stack(alone).mean())
    routing = layer.router(x[0, 0])
    balance = moe_triton.load_balance_loss(routing.counts, routing.score_sums, routing.num_tokens, 2)
    assert_close(alone[0], 0.5 * balance)
    assert layer(x[:0]).aux_loss == 0


def test_every_layer_has_factors_of_its_own():
    torch.manual_seed(0)
    router, x = Router(8, 4), torch.randn(20, 8)
    layers = [MoE(8, 4, 4, router=router, aux_loss_weight=weight) for weight in (0.01, 0.03)]
    small, large = (layer(x).aux_loss for layer in layers)
    assert_close(3 * small, large)
    layers[0].aux_loss_weight = 0.03
    assert torch.equal(layers[0](x).aux_loss, large)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "topk_softmax", "sqrt_softplus"])
@pytest.mark.parametrize("sequences", [1, 32])
def test_the_losses_keep_little_more_than_the_logits(score, sequences):
    """T = 131,072 tokens, E = 128 experts: one copy of the logits and the choices, whatever losses there are."""
    logits = torch.empty(131072, 128, device="meta", requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        routing = moe_triton.route(logits, 8, score=score, sequences=sequences, backend="torch")
        loss = moe_triton.load_balance_loss(routing.counts, routing.score_sums, routing.num_tokens, 8)
        loss = loss + moe_triton.z_loss(routing.z_sum, routing.num_tokens)
        if sequences > 1:
            loss = loss + moe_triton.load_balance_loss(*routing.sequences, 8, per_sequence=True)
    loss.backward()
    assert logits.grad.shape == logits.shape
    total = sum(storage.nbytes() for storage in kept)
    assert logits.nbytes <= total <= 1.1 * logits.nbytes
