"""Colossal-AI's experts, layers and losses on one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_triton.compat.colossalai import initialize
from moe_triton.compat.colossalai.context import MOE_CONTEXT, moe_set_seed
from moe_triton.compat.colossalai.global_variables import moe_env
from moe_triton.compat.colossalai.model_zoo.moe.models import VanillaFFN, Widenet, moe_mlp_args
from moe_triton.compat.colossalai.nn.layer.moe import (
    Experts,
    FFNExperts,
    MoeLayer,
    MoeModule,
    Top1Router,
    Top2Router,
    TPExperts,
)
from moe_triton.compat.colossalai.nn.loss import MoeCrossEntropyLoss, MoeLoss
from tests.helpers.colossalai_context import forget
from tests.helpers.colossalai_models import TanhExpert, TwoLayers, layers, widenet
from tests.helpers.colossalai_reference import combine_weights
from tests.helpers.compare import assert_close

D, F_, E = 16, 24, 4


@pytest.fixture(autouse=True)
def clean():
    forget()
    moe_set_seed(7)
    yield
    forget()


def experts_of(kind: str, drop_rate: float = 0.0):
    return {
        "ffn": lambda: FFNExperts(E, D, F_, drop_rate=drop_rate),
        "tp": lambda: TPExperts(E, D, F_, drop_rate=drop_rate),
        "ffn, unknown": lambda: FFNExperts(E, D, F_, activation=nn.Tanh()),
        "experts": lambda: Experts(VanillaFFN, E, **moe_mlp_args(D, F_, drop_rate)),
        "experts, no bias": lambda: Experts(expert_cls=VanillaFFN, num_experts=E, d_model=D, d_ff=F_, bias=False),
        "experts, unknown": lambda: Experts(expert=TanhExpert, num_experts=E, d_model=D),
    }[kind]()


def one_expert(experts, number: int, x: torch.Tensor) -> torch.Tensor:
    """Expert `number` on x, by its parameters alone."""
    if isinstance(experts, FFNExperts):
        hidden = experts.act(x @ experts.w1[number] + experts.b1[number])
        return hidden @ experts.w2[number] + experts.b2[number]
    parts = {name: parameter[number] for name, parameter in experts.named_parameters()}
    if "first_weight" in parts:
        return torch.tanh(x @ parts["first_weight"].T) @ parts["first_weight"].T + parts["second_bias"]
    hidden = F.gelu(F.linear(x, parts["ffn_0_weight"], parts.get("ffn_0_bias")))
    return F.linear(hidden, parts["ffn_3_weight"], parts.get("ffn_3_bias"))


KINDS = ["ffn", "tp", "ffn, unknown", "experts", "experts, no bias", "experts, unknown"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_layer_is_its_formula(kind, top_k):
    experts = experts_of(kind)
    router = Top1Router(1.0, 1.0, 1) if top_k == 1 else Top2Router(0.7)
    layer = MoeLayer(D, E, router, experts).double()
    x = torch.randn(3, 10, D, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    flat = x.detach().reshape(-1, D).requires_grad_()
    logits = F.linear(flat, layer.gate.weight, layer.gate.bias)
    kept, aux = combine_weights(logits, top_k, router.get_capacity((30, E)))
    expected = sum(kept[:, e, None] * one_expert(experts, e, flat) for e in range(E)).reshape(out.shape)
    assert_close(out, expected)
    assert_close(MOE_CONTEXT.get_loss(), aux)
    grad = torch.randn_like(out)
    parameters = dict(layer.named_parameters())
    got = torch.autograd.grad((out * grad).sum(), [x, *parameters.values()])
    wanted = torch.autograd.grad((expected * grad).sum(), [flat, *parameters.values()])
    for a, b in zip(got, wanted, strict=True):
        assert_close(a.reshape(b.shape), b)


@pytest.mark.parametrize("kind", KINDS)
def test_which_experts_run_fused(kind):
    assert experts_of(kind).is_fused == ("unknown" not in kind)


@pytest.mark.parametrize("kind", ["ffn", "tp", "experts"])
def test_dropout_is_for_training(kind):
    experts = experts_of(kind, drop_rate=0.5)
    layer = MoeLayer(D, E, Top2Router(None), experts)
    assert not experts.is_fused
    x = torch.randn(16, D)
    once, again = layer(x), layer(x)
    assert not torch.equal(once, again)
    layer.eval()
    assert experts.is_fused
    assert_close(sum(layer.train()(x) for _ in range(40)) / 40, layer.eval()(x), tolerance=0.5)


def test_hooks_on_an_expert_are_run():
    experts = experts_of("experts")
    layer = MoeLayer(D, E, Top2Router(None), experts)
    x = torch.randn(8, D)
    before = layer(x)
    experts.expert.ffn[1].register_forward_hook(lambda module, args, out: 2 * out)
    assert not experts.is_fused
    assert not torch.allclose(layer(x), before)


def test_experts_differ_and_come_from_the_seed():
    first = experts_of("experts").ffn_0_weight
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, experts_of("experts").ffn_0_weight)  # another container
    moe_set_seed(7)
    assert torch.equal(first, experts_of("experts").ffn_0_weight)
    state = torch.get_rng_state()
    experts_of("ffn")
    assert torch.equal(state, torch.get_rng_state())  # the dense parameters' stream is left alone
    forget()
    torch.manual_seed(5)
    unseeded = experts_of("ffn").w1
    torch.manual_seed(5)
    assert torch.equal(unseeded, experts_of("ffn").w1)


def test_start_of_ffn_experts():
    experts = FFNExperts(2, 200, 400)
    for parameter, std in ((experts.w1, 0.1 / 200), (experts.w2, 0.1 / 400), (experts.b1, 0.1 / 200)):
        assert parameter.std().item() == pytest.approx(std**0.5, rel=0.1)
    assert [tuple(p.shape) for p in (experts.w1, experts.b1, experts.w2, experts.b2)] == [
        (2, 200, 400), (2, 1, 400), (2, 400, 200), (2, 1, 200),
    ]  # fmt: skip


def test_marks_on_expert_parameters():
    for experts in (experts_of("ffn"), experts_of("experts")):
        assert all(p.moe_param == 1 and p.moe_info.ep_size == 1 for p in experts.parameters())


def test_gates_of_the_generations():
    assert MoeLayer(D, E, Top2Router(1.0), experts_of("ffn")).gate.bias is not None
    gate = MoeLayer(4 * D, E, Top2Router(), FFNExperts(E, 4 * D, 8)).gate
    assert gate.bias is None
    assert gate.weight.std().item() == pytest.approx((0.1 / 64) ** 0.5, rel=0.2)


def test_gate_in_a_bf16_model():
    layer = MoeLayer(D, E, Top2Router(None), experts_of("ffn")).bfloat16()
    x = torch.randn(20, D, dtype=torch.bfloat16)
    assert torch.equal(layer.logits(x), F.linear(x.float(), layer.gate.weight.float(), layer.gate.bias.float()))
    assert layer(x).dtype == torch.bfloat16


def test_residual():
    module = MoeModule(D, E, 2, 9.0, 9.0, use_residual=True, expert_cls=VanillaFFN, d_model=D, d_ff=F_)
    nn.init.zeros_(module.residual_combine.weight)
    nn.init.zeros_(module.residual_combine.bias)
    x = torch.randn(5, 6, D)
    assert_close(module(x), (module.moe_layer(x) + module.residual_module(x)) / 2)


@pytest.mark.parametrize("policy", ["Jitter", "Gaussian"])
def test_noisy_policies(policy):
    module = MoeModule(D, E, 1, noisy_policy=policy, expert_cls=VanillaFFN, d_model=D, d_ff=F_)
    x = torch.randn(64, D)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: MoeLayer(D, 3, Top2Router(1.0), experts_of("ffn")), ValueError, "experts"),
        (lambda: MoeLayer(D, E, nn.Identity(), experts_of("ffn")), TypeError, "router"),
        (lambda: MoeLayer(D, E, Top2Router(1.0), nn.Identity()), TypeError, "experts"),
        (lambda: MoeLayer(D, 1, Top2Router(1.0), FFNExperts(1, D, F_)), ValueError, "num_experts"),
        (lambda: MoeLayer(D, E, Top2Router(1.0), experts_of("ffn"))(torch.randn(3, D + 1)), ValueError, "inputs"),
        (lambda: MoeLayer(D, E, Top2Router(1.0), experts_of("ffn"))(torch.ones(3, D).int()), TypeError, "inputs"),
        (lambda: Experts(), TypeError, "expert"),
        (lambda: Experts(VanillaFFN, E, expert_cls=VanillaFFN), TypeError, "expert"),
        (lambda: Experts(nn.Linear(2, 2), E), TypeError, "expert"),
        (lambda: Experts(dict, E), TypeError, "expert"),
        (lambda: MoeModule(D, E), ValueError, "expert_cls"),
        (lambda: MoeModule(D, E, 3, expert_cls=VanillaFFN), ValueError, "top_k"),
        (lambda: MoeModule(D, E, noisy_policy="RSample", expert_cls=VanillaFFN), ValueError, "noisy_policy"),
        (lambda: FFNExperts(E, D, F_, drop_rate=-1), ValueError, "drop_rate"),
        (lambda: FFNExperts(E, D, F_, drop_rate=0.1).add_lora(2, 1.0), ValueError, "add_lora: got drop_rate=0.1"),
        (lambda: Widenet(E, 1.0, img_size=9, patch_size=2), ValueError, "img_size"),
        (lambda: MoeLoss(-1.0, nn.CrossEntropyLoss), ValueError, "aux_weight"),
        (lambda: MoeLoss(1.0, 3), TypeError, "loss_fn"),
    ],
)
def test_bad_arguments(make, error, name):
    with pytest.raises(error, match=name):
        make()


def test_loss_is_the_criterion_and_the_layers():
    model, y = layers(), torch.randint(5, (8,))
    x = torch.randn(8, 3, D)
    criterion = MoeLoss(aux_weight=0.01, loss_fn=nn.CrossEntropyLoss, label_smoothing=0.1)
    out = model(x)
    aux = MOE_CONTEXT.get_loss()
    assert aux.item() > 1.0
    assert moe_env.get_loss() is not None
    loss = criterion(out, y)
    assert_close(loss, F.cross_entropy(out, y, label_smoothing=0.1) + 0.01 * aux)
    assert MOE_CONTEXT.get_loss() == 0.0
    loss.backward()
    assert model.first.gate.weight.grad.abs().sum() > 0
    # a forward whose loss nobody asked for does not pile up
    model(x)
    assert_close(MoeCrossEntropyLoss(0.01, label_smoothing=0.1)(model(x), y), loss)


def test_a_layer_that_is_used_twice_counts_twice_in_a_watched_model():
    shared = MoeLayer(D, E, Top2Router(None), experts_of("ffn"))
    model = TwoLayers(shared, shared)
    engine, *_ = initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), MoeCrossEntropyLoss(1.0), verbose=False)
    x, y = torch.randn(8, 3, D), torch.randint(5, (8,))
    for _ in range(2):  # also after a forward without a loss
        out = engine(x)
        assert len(MOE_CONTEXT._losses) == 2
    main = F.cross_entropy(out, y)
    assert engine.criterion(out, y).item() - main.item() == pytest.approx(2.0, abs=0.5)


@pytest.mark.parametrize("model", ["layers", "called", "dropout"])
def test_activation_checkpointing_keeps_the_loss(model):
    """Neither lost nor piling up, and random streams repeat."""
    make = {
        "layers": lambda: layers(),
        "called": lambda: layers(kind="called"),
        "dropout": lambda: TwoLayers(
            MoeLayer(D, E, Top1Router(0.5, 1), experts_of("experts", 0.3)),
            MoeLayer(D, E, Top2Router(0.8), experts_of("ffn", 0.3)),
        ),
    }[model]
    plain = make()
    again = copy.deepcopy(plain)
    x, y = torch.randn(8, 3, D), torch.randint(5, (8,))
    criterion = MoeCrossEntropyLoss(0.5)
    losses = []
    for one, run in ((plain, lambda m: m(x)), (again, lambda m: checkpoint(m, x, use_reentrant=False))):
        for _ in range(2):
            torch.manual_seed(3)
            one.zero_grad()
            loss = criterion(run(one), y)
            loss.backward()
            assert MOE_CONTEXT.get_loss() == 0.0  # what backward runs again is no loss of its own
            losses.append(loss.item())
    assert len(set(losses)) == 1
    for (name, a), b in zip(again.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_a_recomputation_adds_no_loss_to_the_next_one():
    """Under `initialize`, where the losses of a step are summed: one part's backward between two forwards."""
    model = layers()
    engine, *_ = initialize(model, torch.optim.SGD(model.parameters(), lr=0.0), MoeCrossEntropyLoss(1.0), verbose=False)
    x, y = torch.randn(8, 3, D), torch.randint(5, (8,))
    out = engine(x)
    expected = engine.criterion(out, y).item()
    MOE_CONTEXT.reset_loss()
    part = checkpoint(model.first, x, use_reentrant=False)
    part.sum().backward()  # runs the layer again
    assert len(MOE_CONTEXT._losses) == 1
    assert engine.criterion(engine(x), y).item() == pytest.approx(expected, rel=1e-6)


def test_reentrant_checkpointing_would_lose_the_loss():
    model, y = layers(), torch.randint(5, (8,))
    x = torch.randn(8, 3, D, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        MoeCrossEntropyLoss()(checkpoint(model, x, use_reentrant=True), y)
    with torch.no_grad():
        MoeCrossEntropyLoss()(model(x), y)  # without training there is nothing to lose


def test_widenet_shares_what_it_should():
    model = widenet(1.2, noisy=True, drop_rate=0.1, drop_path=0.2, attention_drop=0.1)
    first, second = model.blocks
    assert first.att is second.att
    assert first.ffn.experts is second.ffn.experts
    assert first.ffn.router is second.ffn.router
    assert first.ffn.gate is not second.ffn.gate
    assert first.norm1 is not second.norm1
    assert first.norm1.eps == 1e-6
    assert (first.droppath.p, second.droppath.p) == (0.0, pytest.approx(0.2))
    x = torch.randn(3, 1, 4, 4)
    assert model(x).shape == (3, 5)
    assert len(MOE_CONTEXT._losses) == 2
    with pytest.raises(ValueError, match="images"):
        model(torch.randn(3, 3, 4, 4))
    fresh = Widenet(2, None, 4, 2, 1, 5, 1, 8, 2, 4, 8)
    assert not fresh(x).any()  # the classifier starts at zero


def test_a_model_can_be_copied_saved_and_loaded():
    model = widenet(1.2)
    other = widenet(1.2)
    other.load_state_dict(copy.deepcopy(model).state_dict())
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(other.eval()(x), model.eval()(x))
