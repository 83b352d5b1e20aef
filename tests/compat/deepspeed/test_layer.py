"""DeepSpeed's layer and ours side by side: outputs, losses, counts, gradients, state dicts; and what ours adds."""

from __future__ import annotations

import copy
import inspect
import io
import subprocess
import sys

import deepspeed.moe.layer as upstream_layer
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_triton.compat import deepspeed as compat
from moe_triton.compat.deepspeed import layer as our_layer
from tests.helpers.compare import assert_close, relative_rms
from tests.helpers.deepspeed_modules import EXPERTS, D, Gated, Mlp, linear, pair, run

E = 8


def assert_same_decisions(ours: dict, theirs: dict) -> None:
    """The same names and dtypes; counts and the generator's state bit for bit."""
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in theirs.items()}
    assert torch.equal(ours["exp_counts"], theirs["exp_counts"])
    assert torch.equal(ours["next draw"], theirs["next draw"])


def assert_same(ours: dict, theirs: dict) -> None:
    """Also every output and gradient of `run`."""
    assert_same_decisions(ours, theirs)
    for name, value in theirs.items():
        if value.is_floating_point() and name != "next draw":
            error = relative_rms(ours[name], value)
            assert error <= 2e-5, f"{name}: relative RMS error {error:.2e}"


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_kind_of_expert(k, name):
    theirs, ours = pair(EXPERTS[name], num_experts=E, k=k)
    x = torch.randn(3, 20, D)
    assert_same(run(ours, x), run(theirs, x))


OPTIONS = {
    "tight": {"capacity_factor": 0.5, "min_capacity": 0},
    "wide": {"capacity_factor": 20.0},
    "dropless": {"drop_tokens": False},
    "no lots": {"use_rts": False, "capacity_factor": 8.0},
    "jitter": {"noisy_gate_policy": "Jitter"},
    "rsample": {"noisy_gate_policy": "RSample"},
    "none": {"noisy_gate_policy": "None", "use_tutel": True},
    "no sampling": {"top2_2nd_expert_sampling": False, "capacity_factor": 0.6},
    "residual": {"use_residual": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_option(k, name):
    """The same seed makes the same noise and the same lots, so the random policies agree too."""
    theirs, ours = pair(num_experts=E, k=k, **OPTIONS[name])
    x = torch.randn(61, D)
    assert_same(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_option_in_bf16(k, name):
    """The same decisions, and as close as upstream to the same layer in fp32."""
    theirs, ours = pair(Gated, torch.bfloat16, num_experts=E, k=k, **OPTIONS[name])
    x = torch.randn(61, D).bfloat16()
    truth = run(copy.deepcopy(theirs).float(), x.float())
    theirs, ours = run(theirs, x), run(ours, x)
    assert_same_decisions(ours, theirs)
    for value_name, value in truth.items():
        if value.is_floating_point():
            limit = max(1.2e-2, 1.5 * relative_rms(theirs[value_name], value))
            error = relative_rms(ours[value_name], value)
            assert error <= limit, f"{value_name}: relative RMS error {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("k", [1, 4])
def test_eval(k):
    theirs, ours = pair(num_experts=E, k=k, eval_capacity_factor=0.5, min_capacity=0, noisy_gate_policy="Jitter")
    x = torch.randn(61, D)
    assert_same(run(ours.eval(), x), run(theirs.eval(), x))


def test_eval_does_not_sample_the_second_expert():
    """Upstream does (DeepSpeed #8620): two evaluations of one input differ."""
    theirs, ours = pair(num_experts=E, k=2)
    x = torch.randn(64, D)
    for layer, same in ((ours, True), (theirs, False)):
        first, second = (layer.eval()(x)[0] for _ in range(2))
        assert torch.equal(first, second) is same


def test_used_token():
    theirs, ours = pair(num_experts=E, k=1)
    x, used = torch.randn(40, D), torch.randint(0, 2, (40,))
    assert_same(run(ours, x, used), run(theirs, x, used))
    for k in (2, 3):  # upstream ignores it there
        _, ours = pair(num_experts=E, k=k, top2_2nd_expert_sampling=False, drop_tokens=False)
        output, _, counts = ours(x.view(4, 10, D), used.view(4, 10))
        assert counts.sum() == k * used.sum()
        assert not output.view(40, D)[used == 0].any()
        assert_close(output.view(40, D)[used == 1], ours(x[used == 1])[0])


def test_the_same_seed_makes_the_same_layer():
    layers = []
    for module in (upstream_layer, our_layer):
        torch.manual_seed(5)
        layers.append(module.MoE(D, Mlp(), num_experts=4, use_residual=True))
    theirs, ours = (layer.state_dict() for layer in layers)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "deepspeed_moe.gate.wg.weight" in ours
    first, *others = layers[1].deepspeed_moe.experts.deepspeed_experts
    for other in others:  # local experts start equal
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))
        assert first.up.weight is not other.up.weight


@pytest.mark.parametrize("name", EXPERTS)
def test_state_dicts_load_both_ways(name):
    theirs, ours = pair(EXPERTS[name], num_experts=E, k=2, use_residual=True)
    before = run(ours, torch.ones(9, D))
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    for target in (theirs, ours):
        for parameter in target.parameters():
            nn.init.zeros_(parameter)
        target.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
        for found, expected in zip(
            target.state_dict().values(), torch.load(io.BytesIO(buffer.getvalue())).values(), strict=True
        ):
            assert torch.equal(found, expected)
    assert_same(run(theirs, torch.ones(9, D)), before)
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_identity_experts(k):
    """One choice: the largest probability times x. More: weights sum to one, so x itself."""
    layer = our_layer.MoE(D, nn.Identity(), num_experts=E, k=k, drop_tokens=False)
    x = torch.randn(12, D)
    scale = layer.deepspeed_moe.gate.logits(x).softmax(-1).max(-1, keepdim=True).values if k == 1 else 1.0
    assert_close(layer(x)[0], (scale * x).detach())


def test_fully_dropped_tokens_are_zero():
    layer = our_layer.MoE(D, nn.Identity(), num_experts=2, k=1, capacity_factor=0.5, min_capacity=0)
    nn.init.zeros_(layer.deepspeed_moe.gate.wg.weight)
    output = layer(torch.randn(8, D))[0]
    assert (output != 0).any(1).sum() == 2


def test_residual_with_an_even_mix():
    layer = our_layer.MoE(D, Mlp(), num_experts=4, use_residual=True, drop_tokens=False)
    for parameter in layer.coefficient.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(9, D)
    expected = (layer.deepspeed_moe(x)[0] + layer.mlp(x)) / 2
    assert_close(layer(x)[0], expected.detach())


def test_the_residual_mlp_is_the_expert_itself():
    expert = Mlp()
    layer = our_layer.MoE(D, expert, num_experts=4, use_residual=True)
    assert layer.mlp is expert
    assert not hasattr(expert.up.weight, "allreduce")


def test_autocast_and_dtype():
    """Fact 26: in a bf16 model the output has the input's dtype, and the router computes in fp32."""
    _, ours = pair(Mlp, torch.bfloat16, num_experts=E, k=2)
    output, l_aux, _ = ours(torch.randn(5, 7, D).bfloat16())
    assert (output.dtype, output.shape, l_aux.dtype) == (torch.bfloat16, (5, 7, D), torch.float32)
    _, ours = pair(num_experts=E, k=2)
    with torch.autocast("cpu", torch.bfloat16):
        output, l_aux, _ = ours(torch.randn(5, D))
    assert (output.dtype, l_aux.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("k", [1, 2])
def test_activation_checkpointing_keeps_the_loss(k):
    """The auxiliary loss is returned, so that recomputation loses nothing (Colossal-AI #1633); noise repeats."""
    _, ours = pair(num_experts=E, k=k, noisy_gate_policy="Jitter")
    x = torch.randn(30, D)
    plain = run(ours, x)

    class Checkpointed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, used_token=None):
            return checkpoint(self.layer, x, used_token, use_reentrant=False)

    again = run(Checkpointed(ours), x)
    for name, value in plain.items():
        assert torch.equal(again[name.replace("d deep", "d layer.deep")], value), name


def test_a_layer_can_be_copied_and_pickled_after_a_forward():
    """Upstream's cannot: it holds the loss with its graph."""
    _, ours = pair(num_experts=E, k=2)
    x = torch.randn(9, D)
    expected = run(ours, x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    for other in (copy.deepcopy(ours), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
        assert_same(run(other, x), expected)
        parameter = next(other.deepspeed_moe.experts.parameters())
        assert (parameter.allreduce, parameter.group_name, parameter.expert_number) == (False, "ep_size_1", 0)


def test_loss_and_counts_stay_on_the_layer():
    _, ours = pair(num_experts=E, k=1)
    _, l_aux, counts = ours(torch.randn(9, D))
    assert ours.deepspeed_moe.l_aux is l_aux
    assert ours.deepspeed_moe.exp_counts is counts


def test_one_process_needs_no_groups():
    """Upstream's layer wanted torch.distributed even on one process (DeepSpeed #1872)."""
    assert not torch.distributed.is_initialized()
    layer = compat.MoE(D, Mlp(), 4)
    layer.set_deepspeed_parallelism()
    assert layer(torch.randn(6, D))[0].shape == (6, D)
    compat.groups.reset()


def test_signatures():
    """Ours takes today's arguments in today's order, and the documentation's in the documentation's."""
    modern = list(inspect.signature(upstream_layer.MoE.__init__).parameters)
    assert list(inspect.signature(our_layer.MoE.__init__).parameters)[: len(modern)] == modern
    documented = list(inspect.signature(compat.MoE.__init__).parameters)
    assert documented[1:12] == [
        "hidden_size", "expert", "num_experts", "k", "capacity_factor", "eval_capacity_factor", "min_capacity",
        "noisy_gate_policy", "drop_tokens", "use_rts", "use_tutel",
    ]  # fmt: skip
    assert set(modern) <= set(documented)
    layer = compat.MoE(D, Mlp(), 4, 2, 1.5, 2.0, 3, "Jitter", False, False, True)
    gate = layer.deepspeed_moe.gate
    assert (layer.ep_size, layer.num_local_experts) == (1, 4)  # the number of experts is not ep_size (DeepSpeed #4562)
    assert (gate.k, gate.capacity_factor, gate.eval_capacity_factor, gate.min_capacity) == (2, 1.5, 2.0, 3)
    assert (gate.noisy_gate_policy, gate.drop_tokens, gate.use_rts) == ("Jitter", False, False)


def test_the_engine_knows_the_layer():
    for kind in (our_layer.MoE, compat.MoE):
        layer = kind(D, Mlp(), num_experts=4)
        assert isinstance(layer, upstream_layer.MoE)
        assert (layer.expert_group_name, layer.num_experts, layer.num_local_experts) == ("ep_size_1", 4, 4)


def test_without_deepspeed():
    """Everything else works the same on a machine that has no deepspeed."""
    program = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import torch
from torch import nn
from moe_triton.compat import deepspeed as compat
expert = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
compat.groups.initialize()
layer = compat.MoE(8, expert, 4, 2)
layer.set_deepspeed_parallelism()
output, l_aux, counts = layer(torch.randn(5, 8))
(output.sum() + l_aux).backward()
assert compat.utils.has_moe_layers(layer) == (True, 4)
groups = compat.utils.configure_moe_param_groups(list(layer.parameters()), by="expert")
torch.optim.AdamW(groups).step()
assert [g["name"] for g in groups] == ["dense-params"] + 4 * ["ep_size_1"]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"expert": "mlp"}, TypeError, "expert: got str"),
        ({"num_experts": 6, "ep_size": 4}, ValueError, "num_experts: got 6, wanted a multiple of ep_size=4"),
        ({"k": 5}, ValueError, "k: got 5, wanted 1 to 4"),
        ({"capacity_factor": 0.0}, ValueError, "capacity_factor: got 0.0"),
        ({"noisy_gate_policy": "Gumbel"}, ValueError, "noisy_gate_policy: got 'Gumbel'"),
        ({"min_capacity": -1}, ValueError, "min_capacity: got -1"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
        ({"expert_group_name": 3}, TypeError, "expert_group_name: got 3"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    arguments = {"hidden_size": D, "expert": linear(), "num_experts": 4, **arguments}
    with pytest.raises(error, match=message):
        our_layer.MoE(**arguments)


def test_bad_inputs():
    layer = our_layer.MoE(D, Gated(), num_experts=4)
    with pytest.raises(ValueError, match=r"hidden_states: got shape \[3, 5\], wanted \[..., 16\]"):
        layer(torch.randn(3, 5))
    with pytest.raises(TypeError, match="hidden_states: got list"):
        layer([1.0])
    with pytest.raises(TypeError, match="gate_up_proj"):
        layer(torch.randn(9, D).half())
    with pytest.raises(ValueError, match=r"used_token: got shape \[4\], wanted \[9\]"):
        layer(torch.randn(9, D), torch.ones(4))
    with pytest.raises(ValueError, match="min_capacity: got 4 for 2 tokens"):
        layer(torch.randn(2, D))
