"""The MoE layer: what it computes, what it drops, what it returns, and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import moe_triton
from moe_triton import MoE, Router
from moe_triton.distributed import ExpertParallel
from moe_triton.reference import activate
from tests.helpers.compare import assert_close


def dense_by_hand(layer, x):
    """The dropless layer as a loop over tokens."""
    flat = x.reshape(-1, x.shape[-1])
    probs = F.linear(flat.float(), layer.router.weight.float()).softmax(-1)
    out = torch.zeros_like(flat)
    for t, row in enumerate(flat):
        weights, experts = probs[t].topk(layer.top_k)
        if layer.top_k > 1:
            weights = weights / weights.sum()
        for w, e in zip(weights, experts, strict=True):
            hidden = activate(layer.experts.gate_up_proj[e] @ row, layer.experts.spec.activation)
            out[t] += w * (layer.experts.down_proj[e] @ hidden)
    return out.view_as(x)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_is_the_sum_over_chosen_experts(top_k):
    layer = MoE(12, 8, 6, top_k)
    x = torch.randn(2, 5, 12)
    out = layer(x)
    assert_close(out.output, dense_by_hand(layer, x))
    assert out.expert_counts.dtype == torch.int64
    assert out.expert_counts.sum() == 10 * top_k
    assert out.aux_loss == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backends_agree_with_the_reference(backend):
    torch.manual_seed(1)
    options = {"bias": True, "capacity_factor": 1.0, "min_capacity": 1, "renormalize": True, "drop_policy": "choice"}
    losses = {"aux_loss_weight": 0.01, "z_loss_weight": 0.001}
    extras = {"shared_intermediate_size": 6, "shared_gate": True, "residual": True}
    layer = MoE(12, 8, 6, 2, backend=backend, **options, **losses, **extras)
    twin = MoE(12, 8, 6, 2, backend="reference", **options, **losses, **extras).double()
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, 7, 12)
    grad = torch.randn(3, 7, 12)
    inputs, outputs = [], []
    for module, dtype in ((layer, torch.float32), (twin, torch.float64)):
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        out = module(leaf, token_mask=torch.arange(21).view(3, 7) % 5 > 0)
        ((out.output * grad.to(dtype)).sum() + out.aux_loss).backward()
        inputs.append(leaf)
        outputs.append(out)
    assert torch.equal(outputs[0].expert_counts, outputs[1].expert_counts)
    assert_close(outputs[0].output, outputs[1].output)
    assert_close(outputs[0].aux_loss, outputs[1].aux_loss)
    assert_close(inputs[0].grad, inputs[1].grad)
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None, name
        assert_close(a.grad, b.grad, tolerance=4e-5)


def test_capacity_by_mode_groups_and_dropless():
    layer = MoE(8, 4, 4, 2, capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=3)
    assert (layer.capacity(10), layer.eval().capacity(10)) == (5, 10)
    assert layer.capacity(1) == 3
    assert MoE(8, 4, 4, 2, capacity_factor=1.5).eval().capacity(16) == 12
    assert MoE(8, 4, 4, 2).capacity(10) is None
    grouped = MoE(8, 4, 4, 2, capacity_factor=0.5, min_capacity=0, capacity_groups=2)
    alone = MoE(8, 4, 4, 2, capacity_factor=0.5, min_capacity=0)
    alone.load_state_dict(grouped.state_dict())
    x = torch.randn(24, 8)
    both = torch.cat([alone(half).output for half in x.chunk(2)])
    assert_close(grouped(x).output, both)
    assert not torch.allclose(alone(x).output, both)


def test_fully_dropped_tokens_give_zeros():
    layer = MoE(8, 4, 2, 1, capacity_factor=1e-6, min_capacity=1)
    out = layer(torch.randn(1, 8).expand(5, 8)).output
    assert (out[0] != 0).any()
    assert (out[1:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (1, 1, 3, 8)])
def test_any_leading_shape_and_no_tokens(shape):
    layer = MoE(8, 4, 4, 2, aux_loss_weight=0.1, z_loss_weight=0.1, capacity_factor=1.0)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.output.shape == shape
    assert torch.isfinite(out.aux_loss)
    (out.output.sum() + out.aux_loss).backward()
    assert x.grad.shape == shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_token_mask_takes_tokens_out(top_k):
    layer = MoE(8, 4, 4, top_k, aux_loss_weight=1.0, z_loss_weight=1.0, capacity_factor=1.0, min_capacity=0)
    x = torch.randn(9, 8)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 1])
    out = layer(x, token_mask=mask)
    assert (out.output[mask == 0] == 0).all()
    assert out.expert_counts.sum() == 6 * top_k
    layer.capacity_factor *= 9 / 6  # the same capacity for the six tokens alone
    alone = layer(x[mask == 1])
    assert_close(out.output[mask == 1], alone.output)
    assert_close(out.aux_loss, alone.aux_loss)


def test_shared_and_residual_experts():
    x = torch.randn(6, 8)
    layer = MoE(8, 4, 4, 2, shared_intermediate_size=10, shared_gate=True)
    plain = MoE(8, 4, 4, 2)
    plain.load_state_dict(layer.state_dict(), strict=False)
    shared = layer.shared_expert(x) * torch.sigmoid(layer.shared_expert_gate(x))
    assert_close(layer(x).output, plain(x).output + shared)
    layer = MoE(8, 4, 4, 2, residual=True)
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.nn.init.zeros_(layer.residual_coefficient.weight)
    torch.nn.init.zeros_(layer.residual_coefficient.bias)
    assert_close(layer(x).output, (plain(x).output + layer.residual_mlp(x)) / 2)


def test_the_residual_mix_weighs_the_experts_first():
    layer, plain = MoE(8, 4, 4, 2, residual=True), MoE(8, 4, 4, 2)
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        layer.residual_coefficient.bias.copy_(torch.tensor([2.0, -1.0]))
    x = torch.randn(6, 8)
    logits = x @ layer.residual_coefficient.weight.T + torch.tensor([2.0, -1.0])
    first = 1 / (1 + (logits[:, 1:] - logits[:, :1]).exp())
    wanted = first * plain(x).output + (1 - first) * layer.residual_mlp(x)
    assert_close(layer(x).output, wanted)


@pytest.mark.parametrize("grad", [True, False])
def test_the_shared_expert_runs_in_the_callers_modes_beside_experts_of_a_group(grad):
    shared = {"shared_intermediate_size": 6, "shared_gate": True}
    layer = MoE(8, 4, 4, 2, expert_parallel=ExpertParallel(redundant_experts=2), **shared)
    plain = MoE(8, 4, 4, 2, **shared)
    x = torch.randn(6, 8)
    seen = []
    for part in (layer.shared_expert, layer.shared_expert_gate):
        part.register_forward_hook(lambda module, args, out: seen.append((out.dtype, out.requires_grad)))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert seen == [(torch.bfloat16, grad)] * 2
    seen.clear()
    with torch.set_grad_enabled(grad):
        layer(x)
    assert seen == [(torch.float32, grad)] * 2
    order = layer.experts.placement.physical_to_logical.tolist()
    state = layer.state_dict()
    slots = [order.index(expert) for expert in range(4)]
    state = {
        name: t[slots] if name.startswith("experts.") else t for name, t in state.items() if "physical" not in name
    }
    plain.load_state_dict(state)
    assert_close(layer(x).output, plain(x).output)


def test_state_dict_holds_transformers_names_and_loads_back():
    layer = MoE(8, 4, 3, 2, bias=True, shared_intermediate_size=6)
    state = layer.state_dict()
    assert {name: list(t.shape) for name, t in state.items()} == {
        "router.weight": [3, 8],
        "experts.gate_up_proj": [3, 8, 8],
        "experts.down_proj": [3, 8, 4],
        "experts.gate_up_proj_bias": [3, 8],
        "experts.down_proj_bias": [3, 8],
        "shared_expert.gate_up_proj.weight": [12, 8],
        "shared_expert.gate_up_proj.bias": [12],
        "shared_expert.down_proj.weight": [8, 6],
        "shared_expert.down_proj.bias": [8],
    }
    twin = MoE(8, 4, 3, 2, bias=True, shared_intermediate_size=6)
    x = torch.randn(5, 8)
    assert not torch.equal(twin(x).output, layer(x).output)
    twin.load_state_dict(state)
    assert torch.equal(twin(x).output, layer(x).output)


def test_aux_loss_is_the_weighted_sum_of_the_documented_formulas():
    layer = MoE(8, 4, 4, 2, aux_loss_weight=0.5, z_loss_weight=0.25)
    x = torch.randn(10, 8)
    out = layer(x)
    logits = F.linear(x, layer.router.weight)
    load, share = out.expert_counts / 10, logits.softmax(-1).mean(0)
    expected = 0.5 * 4 / 2 * (load * share).sum() + 0.25 * logits.logsumexp(-1).square().mean()
    assert_close(out.aux_loss, expected)
    out.aux_loss.backward()
    assert layer.router.weight.grad.abs().max() > 0
    assert layer.experts.gate_up_proj.grad is None


def test_bf16_layer_routes_in_fp32():
    layer = MoE(32, 16, 4, 2, dtype=torch.bfloat16)
    x = torch.randn(20, 32, dtype=torch.bfloat16)
    out = layer(x)
    assert out.output.dtype == torch.bfloat16
    exact = F.linear(x.double(), layer.router.weight.double())
    assert_close(layer.router.gate(x), exact, tolerance=2e-6)
    with pytest.raises(AssertionError):
        assert_close(F.linear(x, layer.router.weight), exact, tolerance=2e-6)
    want = F.linear(x.float(), layer.router.weight.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.float().router.gate(x), want)


def test_same_seed_same_bits_and_random_drops_differ():
    layer = MoE(8, 4, 4, 2, capacity_factor=0.5, min_capacity=0, drop_policy="random")
    x = torch.randn(40, 8)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x).output

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("options", [{"jitter": 0.1}, {"gumbel": True}])
def test_noise_is_for_training_only(options):
    layer = MoE(8, 4, 16, 1, router=Router(8, 16, 1, **options))
    x = torch.randn(200, 8)
    torch.manual_seed(0)
    first = layer(x).expert_counts
    assert not torch.equal(first, layer(x).expert_counts)
    torch.manual_seed(0)
    assert torch.equal(first, layer(x).expert_counts)
    layer.eval()
    assert torch.equal(layer(x).output, layer(x).output)


def test_activation_checkpointing_repeats_the_routing_and_counts_once():
    router = Router(8, 4, 2, jitter=0.3, gumbel=True, choice_bias=True)
    layer = MoE(8, 4, 4, 2, router=router, capacity_factor=1.0, drop_policy="random")
    x = torch.randn(30, 8, requires_grad=True)

    def run(use_checkpoint):
        layer.zero_grad()
        x.grad = None
        router.load.zero_()
        torch.manual_seed(3)
        out = checkpoint(lambda y: layer(y).output, x, use_reentrant=False) if use_checkpoint else layer(x).output
        out.square().sum().backward()
        return [x.grad, router.load.clone()] + [p.grad.clone() for p in layer.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
    assert router.load.sum() == 60


def test_choice_bias_balances_the_load_without_a_loss():
    torch.manual_seed(0)
    router = Router(8, 8, 2, score="sigmoid", choice_bias=True)
    layer = MoE(8, 4, 8, 2, router=router)
    x = torch.randn(256, 8) + 1.0  # skewed

    def imbalance():
        counts = layer(x).expert_counts.float()
        return (counts.max() / counts.mean()).item()

    before = imbalance()
    router.load.zero_()
    for _ in range(300):
        layer(x)
        assert router.load.sum() == 512
        moe_triton.update_choice_biases(layer, rate=5e-3)
        assert router.load.sum() == 0
    assert imbalance() < 1.15 < before
    assert "router.choice_bias" in layer.state_dict()
    router.load.zero_()
    layer.eval()
    layer(x)
    assert router.load.sum() == 0  # eval does not count
    with pytest.raises(ValueError, match="choice_bias=False"):
        Router(8, 4).update_choice_bias()


def test_the_load_of_the_choice_bias_is_summed_over_the_group_that_is_named(monkeypatch):
    summed = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda load, group: summed.append((load.tolist(), group)))
    layer = MoE(8, 4, 4, 2, router=Router(8, 4, 2, score="sigmoid", choice_bias=True))
    counts = layer(torch.randn(6, 8)).expert_counts.tolist()
    moe_triton.update_choice_biases(layer, group="stage")
    moe_triton.update_choice_biases(layer)
    assert summed == [(counts, "stage"), ([0, 0, 0, 0], None)]


def test_a_router_of_ones_own():
    class RoundRobin(torch.nn.Module):
        def forward(self, x, token_mask=None):
            logits = torch.full((x.shape[0], 4), -9.0)
            logits[torch.arange(x.shape[0]), torch.arange(x.shape[0]) % 4] = 9.0
            return moe_triton.route(logits, 1, token_mask=token_mask)

    out = MoE(8, 4, 4, 1, router=RoundRobin())(torch.randn(12, 8))
    assert out.expert_counts.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top_k": 5}, ValueError, "top_k: got 5, wanted 1 to 4"),
        ({"top_k": 0}, ValueError, "top_k: got 0, wanted 1 to 4"),
        ({"hidden_size": 0}, ValueError, "hidden_size: got 0"),
        ({"intermediate_size": -3}, ValueError, "intermediate_size: got -3"),
        ({"num_experts": 2.0}, TypeError, "num_experts: got 2.0, wanted an int"),
        ({"capacity_factor": 0}, ValueError, "capacity_factor: got 0, wanted a number > 0"),
        ({"capacity_factor": -1.5}, ValueError, "capacity_factor: got -1.5"),
        ({"eval_capacity_factor": 0.0}, ValueError, "eval_capacity_factor: got 0.0"),
        ({"capacity_factor": "1"}, TypeError, "capacity_factor: got '1', wanted a number"),
        ({"min_capacity": -1}, ValueError, "min_capacity: got -1"),
        ({"capacity_groups": 0}, ValueError, "capacity_groups: got 0"),
        ({"drop_policy": "lifo"}, ValueError, "drop_policy: got 'lifo', wanted one of position"),
        ({"activation": "mish"}, ValueError, "activation: got 'mish', wanted one of swiglu"),
        ({"backend": "jax"}, ValueError, "backend: got 'jax', wanted one of auto"),
        ({"router": "topk"}, TypeError, "router: got str"),
        ({"router": Router(8, 4, 1)}, ValueError, "router: got one for hidden_size=8, num_experts=4, top_k=1, wanted"),
        ({"aux_loss_weight": -0.1}, ValueError, "aux_loss_weight: got -0.1"),
        ({"shared_gate": True}, ValueError, "shared_gate: got True"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    good = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 4, "top_k": 2}
    with pytest.raises(error, match=message):
        MoE(**(good | arguments))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((torch.zeros(3, 7),), ValueError, r"hidden_states: got shape \[3, 7\], wanted \[..., 8\]"),
        ((torch.zeros(3, 8).long(),), TypeError, "hidden_states: got dtype torch.int64"),
        (([1.0] * 8,), TypeError, "hidden_states: got list"),
        ((torch.zeros(3, 8), torch.ones(4)), ValueError, r"token_mask: got shape \[4\], wanted \[3\]"),
        (
            (torch.zeros(3, 8, dtype=torch.float64),),
            TypeError,
            "hidden_states: got dtype torch.float64, wanted torch.float32",
        ),
        ((torch.zeros(4, 8),), ValueError, "capacity_groups: got 3, wanted a divisor of the 4 tokens"),
    ],
)
def test_bad_inputs_are_named(inputs, error, message):
    with pytest.raises(error, match=message):
        MoE(8, 4, 4, 2, capacity_factor=1.0, capacity_groups=3)(*inputs)
