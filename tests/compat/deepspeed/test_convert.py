"""moe_triton.swap on models with DeepSpeed's MoE layers."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe.layer import MoE as UpstreamMoE
from torch import nn

import moe_triton
from moe_triton.compat.deepspeed.layer import MoE
from tests.compat.deepspeed.test_layer import assert_same
from tests.helpers.deepspeed_modules import EXPERTS, D, Gated, Mlp, pair, run


class Model(nn.Module):
    """A layer between others, used twice, and an MoE layer in a list."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.layer = pair(**options)[0]
        self.list = nn.ModuleList([nn.Linear(D, D), pair(**options)[0]])
        self.again = self.layer

    def forward(self, x, used_token=None):
        x, l_aux, counts = self.layer(x)
        x, more, _ = self.list[1](self.list[0](x))
        x, again, _ = self.again(x)
        return x, l_aux + more + again, counts


@pytest.mark.parametrize(("name", "k"), [*((name, 2) for name in EXPERTS), ("Gated", 1), ("linear", 4)])
def test_swapped_layers_compute_the_same(name, k):
    model = Model(expert=EXPERTS[name], num_experts=8, k=k, use_residual=True, noisy_gate_policy="Jitter")
    x = torch.randn(40, D)
    before, state = run(model, x), {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    generator = torch.get_rng_state()
    report = moe_triton.swap(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [entry.name for entry in report.swapped] == ["layer", "list.1"]
    assert report.skipped == []
    assert type(model.layer) is type(model.list[1]) is MoE
    assert model.again is model.layer
    assert_same(run(model, x), before)
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_report_and_the_backend():
    model = nn.ModuleList([pair(make, num_experts=4)[0] for make in (Gated, EXPERTS["linear"])])
    swapped = moe_triton.swap(model, backend="reference").swapped
    assert "backend='reference': experts fused, swiglu" in swapped[0].action
    assert "experts called one by one" in swapped[1].action
    assert model[0].deepspeed_moe.experts.backend == model[0].deepspeed_moe.gate.backend == "reference"
    again = moe_triton.swap(model)
    assert again.swapped == []
    assert [entry.reason for entry in again.skipped] == ["is moe_triton's own already"] * 2


def test_options_and_modes_stay():
    options = {
        "num_experts": 6, "k": 3, "capacity_factor": 1.25, "eval_capacity_factor": 2.0, "min_capacity": 1,
        "noisy_gate_policy": "RSample", "drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False,
        "ep_size": 2, "enable_expert_tensor_parallelism": True,
    }  # fmt: skip
    model = nn.ModuleList([pair(**options)[0]]).eval()
    theirs = model[0]
    theirs.deepspeed_moe.experts.deepspeed_experts[0].train()
    moe_triton.swap(model)
    ours = model[0]
    for name in vars(theirs.deepspeed_moe.gate).keys() & options.keys():
        assert getattr(ours.deepspeed_moe.gate, name) == options[name]
    assert (ours.ep_size, ours.num_experts, ours.num_local_experts) == (2, 6, 3)
    assert ours.expert_group_name == "ep_size_2"
    assert ours.enable_expert_tensor_parallelism
    modes = [module.training for module in ours.modules()]
    assert sum(modes) == len(list(Mlp().modules()))


def test_left_alone():
    class Own(UpstreamMoE):
        def forward(self, x):
            return super().forward(x)[0]

    hooked = pair(num_experts=2)[0]
    hooked.register_forward_hook(lambda *_: None)
    other_gate = pair(num_experts=2)[0]
    other_gate.deepspeed_moe.gate.wg = nn.Sequential(nn.Linear(D, 2))
    model = nn.ModuleList([Own(D, Mlp(), num_experts=2), hooked, other_gate])
    report = moe_triton.swap(model)
    assert report.swapped == []
    reasons = [entry.reason for entry in report.skipped]
    assert "got Own, wanted deepspeed.moe.layer.MoE itself" in reasons[0]
    assert "has hooks" in reasons[1]
    assert "deepspeed_moe.gate.wg: got Sequential, wanted torch.nn.Linear itself" in reasons[2]
    alone = moe_triton.swap(pair(num_experts=2)[0])
    assert "is the model itself" in alone.skipped[0].reason


def test_experts_that_differ_are_called_one_by_one():
    model = nn.ModuleList([pair(num_experts=4)[0]])
    experts = model[0].deepspeed_moe.experts.deepspeed_experts
    experts[2] = EXPERTS["sequential"]()
    x = torch.randn(30, D)
    before = run(model[0], x)
    moe_triton.swap(model)
    assert model[0].deepspeed_moe.experts.mlp is None
    assert_same(run(model[0], x), before)
