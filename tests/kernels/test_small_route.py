"""Choice, permutation and tile tables in one launch: the bits of the two launches that it replaces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_triton import MoE, Router
from moe_triton.backends.triton import routing
from moe_triton.backends.triton.dispatch import build_small_dispatch
from moe_triton.records import RouterSpec
from moe_triton_kernels import small_route
from tests.helpers.pairs import every_pair

device = "cuda" if torch.cuda.is_available() else "cpu"
SPECS = {
    "softmax": (RouterSpec(top_k=2, normalize=True), 5),
    "sigmoid_in_groups": (RouterSpec(top_k=3, score="sigmoid", num_groups=3, top_groups=2, group_score="top2_sum"), 18),
    "topk_softmax": (RouterSpec(top_k=4, score="topk_softmax"), 60),
    "many_experts": (RouterSpec(top_k=8, normalize=True, weightless=3), 130),
}


def inputs(num_tokens: int, spec: RouterSpec, num_experts: int, which: str) -> list[torch.Tensor | None]:
    """Bias, noise, mask and given ids."""
    bias, noise = torch.randn(num_experts, device=device), torch.randn(num_tokens, num_experts, device=device)
    mask = torch.rand(num_tokens, device=device) < 0.7
    given = torch.full((num_tokens, spec.top_k), -1, dtype=torch.int32, device=device)
    given[:, 0] = torch.arange(num_tokens, device=device) % 3 - 1
    options = {"plain": (), "bias": (bias, noise), "mask": (None, None, mask), "given": (None, None, None, given)}[
        which
    ]
    return [*options, *[None] * (4 - len(options))]


@every_pair(name=list(SPECS), which=["plain", "bias", "mask", "given"], dtype=[torch.float32, torch.bfloat16])
def test_has_the_bits_of_two_launches(name, dtype, which):
    torch.manual_seed(0)
    spec, num_experts = SPECS[name]
    for num_tokens in (1, 7, 37):  # of one warp's tile, and of several of eight warps
        logits = torch.randn(num_tokens, num_experts, device=device, dtype=dtype)
        given = inputs(num_tokens, spec, num_experts, which)
        found = routing.route_and_dispatch(logits, spec, *given)
        assert found is not None
        routed, dispatched = found
        expected = routing.route_forward(logits, spec, *given)
        for tensor, other in zip(routed, expected, strict=True):
            assert tensor.dtype == other.dtype
            assert torch.equal(tensor, other)
        apart = build_small_dispatch(expected[0], num_experts)
        for field in ("counts", "offsets", "source", "position"):
            assert torch.equal(getattr(dispatched, field), getattr(apart, field)), field
        for number, table, other in zip(
            apart.tiles.num_tiles.tolist(), dispatched.tiles.tables, apart.tiles.tables, strict=True
        ):
            assert table.shape == other.shape
            assert torch.equal(table[:number], other[:number])


def test_the_most_tokens_and_those_that_take_more_launches():
    spec = RouterSpec(top_k=2)
    most = small_route.MAX_SLOTS // 2

    def run(num_tokens: int, spec: RouterSpec = spec, num_experts: int = 8):
        logits = torch.randn(num_tokens, num_experts, device=device)
        return routing.route_and_dispatch(logits, spec, None, None, None)[1]

    assert run(most) is not None
    assert run(most + 1) is None
    assert run(128, RouterSpec(top_k=8), 256) is not None
    assert run(257, RouterSpec(top_k=2), 128) is None  # more than one program's
    assert run(0) is None
    assert run(4, replace(spec, sequences=2)) is None


def test_a_layer_in_inference_takes_it(monkeypatch):
    layer = MoE(16, 8, 4, 2, backend="triton", device=device)
    x = torch.randn(6, 16, device=device)
    expected = layer(x)
    calls = []
    monkeypatch.setattr(
        routing, "small_route", lambda *args, **options: calls.append(1) or small_route.small_route(*args, **options)
    )
    monkeypatch.setattr("moe_triton.layers.moe.dispatch", lambda *args, **options: pytest.fail("a second launch"))
    with torch.no_grad():
        found = layer(x)
    assert calls == [1]
    assert torch.equal(found.output, expected.output)
    assert torch.equal(found.expert_counts, expected.expert_counts)


def test_choices_that_a_hook_changes_are_dispatched_anew():
    layer = MoE(16, 8, 4, 2, backend="triton", device=device).eval()
    x = torch.randn(6, 16, device=device)
    others = torch.tensor([[0, 1]] * 6, dtype=torch.int32, device=device)
    layer.router.register_forward_hook(lambda module, args, routing: replace(routing, experts=others))
    with torch.no_grad():
        assert layer(x).expert_counts.tolist() == [6, 6, 0, 0]


def test_null_experts_and_a_capacity_have_a_dispatch_of_their_own():
    x = torch.randn(6, 16, device=device)
    router = Router(16, 4, 2, null_experts=2, backend="triton", device=device)
    for layer in (
        MoE(16, 8, 4, 2, router=router, backend="triton", device=device),
        MoE(16, 8, 4, 2, capacity_factor=0.5, min_capacity=1, backend="triton", device=device),
    ):
        with torch.no_grad():
            found = layer(x)
        assert torch.equal(found.output, layer(x).output.detach())
