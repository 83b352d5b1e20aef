"""Colossal-AI's routers: the decisions of both generations, on the specification's numbers and at random."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_triton.compat.colossalai.context.random import moe_set_seed
from moe_triton.compat.colossalai.nn.layer.moe import (
    NormalNoiseGenerator,
    Top1Router,
    Top2Router,
    UniformNoiseGenerator,
)
from tests.helpers.colossalai_context import forget
from tests.helpers.colossalai_reference import L, as_dense, capacity, combine_weights
from tests.helpers.compare import assert_close


@pytest.fixture(autouse=True)
def clean():
    forget()
    yield
    forget()


def aux_of(routing, top_k: int) -> torch.Tensor:
    from moe_triton import load_balance_loss

    return load_balance_loss(routing.counts, routing.score_sums, routing.num_tokens, top_k)


@pytest.mark.parametrize(("shape", "train", "evaluation"), [((10, 4), 4, 6), ((100, 8), 16, 26), ((64, 8), 10, 16)])
@pytest.mark.parametrize("kind", [Top1Router, Top2Router])
def test_capacity_of_v016(kind, shape, train, evaluation):
    router = kind()
    assert (router.generation, router.get_capacity(shape)) == ("v0.1.6", train)
    assert router.eval().get_capacity(shape) == evaluation


def test_capacity_of_v002():
    assert Top2Router(1.2).get_capacity((10, 4)) == 6
    assert Top1Router(1.2, 4).get_capacity((10, 4)) == 4
    assert Top1Router(1.2, 1).get_capacity((10, 4)) == 3
    assert Top2Router(1.1).get_capacity((10, 2)) == 11  # the decimal that was written, not its binary neighbour
    assert Top2Router(capacity_factor=None).get_capacity((10, 4)) is None


@pytest.mark.parametrize(
    ("make", "places"),
    [(lambda: Top2Router(1.0, 1.0, 1), 2), (lambda: Top2Router(1.0), 3)],
    ids=["v0.1.6", "v0.0.2"],
)
def test_top2_on_the_given_logits(make, places):
    router = make()
    assert router.get_capacity((4, 3)) == places
    routed = router(L)
    assert aux_of(routed.routing, 2).item() == pytest.approx(1.0664282, abs=1e-6)
    assert routed.routing.weights[0].tolist() == pytest.approx([0.665241, 0.244728], abs=1e-6)
    assert routed.routing.counts.tolist() == [3, 3, 2]
    assert int(routed.dispatched.offsets.diff().max()) <= places


@pytest.mark.parametrize(
    ("generation", "top_k", "shape", "factor"),
    list(itertools.product(("v0.0.2", "v0.1.6"), (1, 2), ((40, 5), (33, 4), (7, 8)), (0.5, 1.0, 1.25, 4.0))),
)
def test_decisions_are_the_formulas(generation, top_k, shape, factor):
    logits = torch.randn(shape)
    if generation == "v0.0.2":
        minimum = 2 if top_k == 1 else 0
        router = Top1Router(factor, 2) if top_k == 1 else Top2Router(factor)
        router.priority = "position" if top_k == 1 else router.priority  # lots are drawn otherwise
    else:
        minimum = 2
        router = (Top1Router if top_k == 1 else Top2Router)(factor, 2.0, minimum)
    assert router.generation == generation
    places = capacity(generation, *shape, top_k, factor, minimum)
    expected, aux = combine_weights(logits, top_k, places)
    routed = router(logits)
    got = as_dense(routed.routing.experts, routed.routing.weights, routed.dispatched.position, shape[1])
    assert_close(got, expected, tolerance=1e-6)
    assert torch.equal(got > 0, expected > 0)
    assert_close(aux_of(routed.routing, top_k), aux.float())


def test_the_comparison_of_decisions_can_fail():
    logits = torch.randn(40, 5)
    routed = Top2Router(1.0)(logits)
    got = as_dense(routed.routing.experts, routed.routing.weights, routed.dispatched.position, 5)
    fewer, _ = combine_weights(logits, 2, capacity("v0.0.2", 40, 5, 2, 1.0, 0) - 1)
    assert not torch.equal(got > 0, fewer > 0)


@pytest.mark.parametrize("router", [Top1Router(0.5, 1), Top1Router(0.5, 2.0, 1, "random")], ids=["v0.0.2", "v0.1.6"])
def test_lots(router):
    logits = torch.tensor([[1.0, 0.0]]).repeat(16, 1)
    survivors = [tuple((router(logits).dispatched.position >= 0).flatten().tolist()) for _ in range(4)]
    assert {sum(kept) for kept in survivors} == {4}
    assert len(set(survivors)) > 1


@pytest.mark.parametrize(
    ("make", "generation"),
    [
        (lambda: Top1Router(1.2, 4), "v0.0.2"),
        (lambda: Top1Router(capacity_factor=1.2, min_capacity=4), "v0.0.2"),
        (lambda: Top1Router(1.25, 2.0), "v0.1.6"),
        (lambda: Top1Router(1.25, select_policy="random"), "v0.1.6"),
        (lambda: Top1Router(capacity_factor_train=1.0), "v0.1.6"),
        (lambda: Top1Router(1.2, 4, generation="v0.1.6"), "v0.1.6"),
        (lambda: Top2Router(1.2, noisy_func=NormalNoiseGenerator(4)), "v0.0.2"),
        (lambda: Top2Router(1.2, NormalNoiseGenerator(4)), "v0.0.2"),
        (lambda: Top2Router(1.25, 2.0, 4, NormalNoiseGenerator(4), False), "v0.1.6"),
        (lambda: Top2Router(1.25, min_capacity=2), "v0.1.6"),
    ],
)
def test_generation_by_arguments(make, generation):
    assert make().generation == generation


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: Top1Router(0.0, 1), ValueError, "capacity_factor"),
        (lambda: Top1Router(select_policy="last"), ValueError, "select_policy"),
        (lambda: Top2Router(capacity_factor=1.0, drop_tks=False), TypeError, "drop_tks"),
        (lambda: Top2Router(1.0, generation="v9"), ValueError, "generation"),
        (lambda: Top2Router(1.0, 2.0, noisy_func=3), TypeError, "noisy_func"),
        (lambda: Top2Router(1.0, capacity_groups=3)(torch.randn(4, 2)), ValueError, "capacity_groups"),
        (lambda: Top2Router(1.0)(torch.randn(4)), ValueError, "inputs"),
        (lambda: NormalNoiseGenerator(0), ValueError, "num_experts"),
        (lambda: UniformNoiseGenerator(-1.0), ValueError, "eps"),
    ],
)
def test_bad_arguments(make, error, name):
    with pytest.raises(error, match=name):
        make()


def test_noise_is_for_training_and_for_what_the_generation_says():
    logits = torch.randn(64, 4)

    def strong(x):
        return x + 3 * torch.randn_like(x)

    quiet, first = Top1Router(9.0, 1), Top1Router(9.0, 1, strong)
    noisy = first(logits).routing
    assert not torch.equal(noisy.experts, quiet(logits).routing.experts)
    torch.testing.assert_close(noisy.weights, logits.softmax(-1).gather(1, noisy.experts.long()))  # of the clean logits
    second = Top2Router(9.0, strong)(logits).routing
    assert not torch.allclose(second.weights, logits.softmax(-1).gather(1, second.experts.long()))
    first.eval()
    assert torch.equal(first(logits).routing.experts, quiet(logits).routing.experts)
    upstream = Top1Router(9.0, 1, strong, noise_in_eval=True).eval()
    assert not torch.equal(upstream(logits).routing.experts, quiet(logits).routing.experts)


def test_dropping_in_eval():
    logits = torch.tensor([[1.0, 0.0, -1.0]]).repeat(8, 1)
    router = Top2Router(0.5, 0.5, 1, drop_tks=False)
    assert int((router(logits).dispatched.position >= 0).sum()) == 4
    assert int((router.eval()(logits).dispatched.position >= 0).sum()) == 16


@pytest.mark.parametrize("kind", [NormalNoiseGenerator(4), UniformNoiseGenerator(0.1)], ids=["normal", "uniform"])
def test_noise_generators(kind):
    moe_set_seed(1)
    x = torch.full((4096, 4), 2.0)
    noise = kind(x) - x
    spread = 1 / 16 if isinstance(kind, NormalNoiseGenerator) else 2 * 0.1 / 3**0.5
    assert noise.std().item() == pytest.approx(spread, rel=0.05)
    assert abs(noise.mean().item()) < 0.05 * spread
    assert not torch.equal(kind(x) - x, noise)


def test_capacity_groups_are_ranks():
    logits = torch.randn(24, 4)
    whole = Top2Router(0.5, capacity_groups=3)(logits).dispatched.position >= 0
    parts = torch.cat([Top2Router(0.5)(part).dispatched.position >= 0 for part in logits.chunk(3)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, Top2Router(0.5)(logits).dispatched.position >= 0)
