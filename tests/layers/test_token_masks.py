"""Tokens that a mask takes out of a layer: they count nowhere, whatever they hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_triton
from moe_triton import MoE, Router
from tests.helpers.compare import assert_close

EVERYTHING = {
    "bias": True, "shared_intermediate_size": 6, "shared_gate": True, "residual": True, "aux_loss_weight": 0.1,
    "z_loss_weight": 0.01,
}  # fmt: skip


class LinearRouter(nn.Linear):
    def forward(self, x, token_mask=None):
        return moe_triton.route(super().forward(x), 2, token_mask=token_mask)


ROUTERS = {
    "own": lambda backend: Router(8, 4, 2, bias=True, backend=backend),
    "balanced": lambda backend: Router(8, 4, 2, score="sigmoid", bias=True, choice_bias=True, backend=backend),
    "foreign": lambda backend: LinearRouter(8, 4),
}


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_masked_token_counts_nowhere_whatever_it_holds(router, backend, junk):
    layer = MoE(8, 4, 4, 2, router=router(backend), backend=backend, **EVERYTHING)
    x, mask, grad = torch.randn(9, 8), torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool), torch.randn(9, 8)

    def run(x, mask, grad):
        layer.zero_grad()
        x = x.clone().requires_grad_()
        out = layer(x, mask)
        ((out.output * grad).sum() + out.aux_loss).backward()
        return out, x.grad, [p.grad.clone() for p in layer.parameters()]

    wanted, x_grad, grads = run(x[mask], None, grad[mask])
    out, got_grad, got = run(torch.where(mask[:, None], x, junk), mask, torch.where(mask[:, None], grad, 7.0))
    assert (out.output[~mask] == 0).all()
    assert (got_grad[~mask] == 0).all()
    assert torch.equal(out.expert_counts, wanted.expert_counts)
    assert_close(out.output[mask], wanted.output)
    assert_close(out.aux_loss, wanted.aux_loss)
    assert_close(got_grad[mask], x_grad)
    for (name, _), a, b in zip(layer.named_parameters(), got, grads, strict=True):
        assert_close(a, b, scale=1.0 if name == "residual_coefficient.bias" else None)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "topk_softmax"])
def test_a_routers_gradients_are_finite_beside_a_masked_nan(backend, score):
    router = Router(8, 4, 2, score=score, bias=True, backend=backend)
    x = torch.randn(5, 8)
    x[2] = float("nan")
    x.requires_grad_()
    routing = router(x, torch.arange(5) != 2)
    (routing.weights.square().sum() + routing.z_sum + routing.score_sums.square().sum()).backward()
    for tensor in (x, router.weight, router.bias):
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().max() > 0
    logits = torch.randn(5, 4)
    logits[2] = float("nan")
    logits.requires_grad_()
    routing = moe_triton.route(logits, 2, score=score, token_mask=torch.arange(5) != 2, backend=backend)
    (routing.weights.square().sum() + routing.z_sum + routing.score_sums.square().sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_an_additive_mask_is_refused(dtype):
    additive = torch.zeros(5, dtype=dtype)
    additive[0] = float("-inf")
    for call in (Router(8, 4), MoE(8, 4, 4)):
        with pytest.raises(TypeError, match=rf"token_mask: got dtype {dtype}, wanted torch.bool or"):
            call(torch.randn(5, 8), additive)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_masks_of_all_integers_mean_the_same(dtype):
    layer = MoE(8, 4, 4)
    x, mask = torch.randn(2, 3, 8), torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert torch.equal(layer(x, mask.to(dtype)).output, layer(x, mask.bool()).output)
