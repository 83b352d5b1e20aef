"""Adapters of a layer's experts: what they compute, how they start, how they are merged, saved and spread."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from moe_triton import Experts, MoE, dispatch
from moe_triton.distributed import ExpertParallel
from tests.helpers.compare import assert_close, relative_rms

D, N, E = 8, 6, 4
NAMES = ["gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b"]


def make(r=3, alpha=6.0, dtype=torch.float64, trained=True, **options):
    torch.manual_seed(0)
    experts = Experts(D, N, E, bias=True, dtype=dtype)
    experts.add_lora(r, alpha, **options)
    if trained:
        for name, parameter in experts.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter)
    return experts


def call(experts, x=None):
    torch.manual_seed(1)
    x = torch.randn(9, D, dtype=experts.down_proj.dtype) if x is None else x
    weights = torch.rand(9, 2, dtype=torch.promote_types(x.dtype, torch.float32))
    return experts(x, weights, dispatch(torch.rand(9, E).argsort(1)[:, :2], E))


def test_new_adapters_change_nothing_and_alone_are_trained():
    torch.manual_seed(0)
    plain = Experts(D, N, E, bias=True, dtype=torch.float64)
    experts = make(trained=False)
    out = call(experts)
    assert torch.equal(out, call(plain))
    out.square().sum().backward()
    assert {name for name, p in experts.named_parameters() if p.grad is not None} == set(NAMES)
    assert torch.equal(experts.down_lora_a.grad, torch.zeros_like(experts.down_lora_a))  # B is 0
    assert experts.down_lora_b.grad.abs().sum() > 0
    assert [tuple(experts.get_parameter(name).shape) for name in NAMES] == [(E, 3, D), (E, 12, 3), (E, 3, N), (E, D, 3)]
    assert experts.gate_up_lora_a.abs().max() <= D**-0.5
    assert experts.gate_up_lora_a.std() > 0.4 * D**-0.5


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"projections": ["down"]}, {"projections": ("gate_up",)}])
def test_the_layer_with_changed_projections(options):
    experts = make(**options)
    scaling = 6.0 / 3**0.5 if options.get("rslora") else 2.0
    changed = Experts(D, N, E, bias=True, dtype=torch.float64)
    given = {name: p for name, p in experts.state_dict().items() if "lora" not in name}
    assert len(experts.state_dict()) - len(given) == 2 * len(options.get("projections", "ab"))
    for name in options.get("projections", ("gate_up", "down")):
        a, b = experts.get_parameter(f"{name}_lora_a"), experts.get_parameter(f"{name}_lora_b")
        given[f"{name}_proj"] = given[f"{name}_proj"] + scaling * b @ a
    before = call(experts)
    changed.load_state_dict(given)
    assert_close(before, call(changed))
    projections = {name: p.clone() for name, p in experts.named_parameters() if name.endswith("proj")}
    adapters = {name: p for name, p in experts.named_parameters() if "lora" in name}

    experts.merge_lora()
    assert_close(call(experts), before)
    assert experts.state_dict().keys() == changed.state_dict().keys()
    for name, p in experts.named_parameters():
        assert_close(p, given[name])
    duplicate = pickle.loads(pickle.dumps(copy.deepcopy(experts)))
    for merged in (experts, duplicate):
        merged.unmerge_lora()
        for name, p in projections.items():
            assert_close(merged.get_parameter(name), p)
        assert torch.equal(call(merged), call(experts))
    assert all(experts.get_parameter(name) is p for name, p in adapters.items())  # an optimizer goes on
    assert relative_rms(call(experts), call(Experts(D, N, E, bias=True, dtype=torch.float64))) > 0.1


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_narrow_projections(dtype):
    torch.manual_seed(0)
    experts = Experts(D, N, E, dtype=torch.bfloat16)
    experts.add_lora(4, 4.0, dtype=dtype)
    torch.nn.init.normal_(experts.down_lora_b)
    torch.nn.init.normal_(experts.gate_up_lora_b)
    assert experts.down_lora_a.dtype == (dtype or torch.bfloat16)
    out = call(experts)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert experts.down_lora_a.grad.dtype == (dtype or torch.bfloat16)
    experts.merge_lora()
    assert_close(call(experts), out.float(), tolerance=2e-2)


def test_a_state_dict_with_adapters():
    experts, other = make(), make(trained=False)
    assert set(NAMES) <= experts.state_dict().keys()
    other.load_state_dict(experts.state_dict())
    assert torch.equal(call(other), call(experts))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gate_up_lora_a"):
        Experts(D, N, E, bias=True, dtype=torch.float64).load_state_dict(experts.state_dict())


def test_meta_tensors_and_a_new_start():
    experts = Experts(D, N, E, device="meta")
    experts.add_lora(2, 2.0, projections=["down"])
    assert experts.down_lora_a.is_meta
    experts.to_empty(device="cpu")
    experts.reset_parameters()
    assert torch.equal(experts.down_lora_b, torch.zeros(E, D, 2))
    assert 0 < experts.down_lora_a.abs().max() <= N**-0.5
    assert "lora: down r=2" in repr(experts)


def test_adapters_of_a_model_that_has_moved_while_they_were_merged():
    experts = make()
    experts.merge_lora()
    assert "lora merged" in repr(experts)
    for move in (experts.float, lambda: experts.to("meta")):
        move()
        assert not any("lora" in name for name, _ in experts.named_parameters())
    experts.unmerge_lora()
    assert experts.gate_up_lora_b.is_meta
    assert experts.gate_up_lora_b.dtype == torch.float32


def test_a_layer_trains_its_adapters():
    torch.manual_seed(0)
    layer = MoE(D, N, E, expert_parallel=ExpertParallel())
    layer.experts.add_lora(2, 4.0)
    x, target = torch.randn(20, D), torch.randn(20, D)
    base = {name: p.clone() for name, p in layer.experts.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in layer.experts.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        loss = (layer(x).output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert len(base) == 2
    assert all(torch.equal(layer.experts.get_parameter(name), p) for name, p in base.items())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 1.0), {}, ValueError, "r: got 0, wanted at least 1"),
        ((2.0, 1.0), {}, TypeError, "r: got 2.0, wanted an int"),
        ((2, "1"), {}, TypeError, "alpha: got '1', wanted a number"),
        ((2, 1.0), {"projections": ()}, ValueError, "projections: got none, wanted gate_up, down or both"),
        ((2, 1.0), {"projections": ["up"]}, ValueError, "projections: got 'up', wanted one of gate_up, down"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    experts = Experts(D, N, E)
    with pytest.raises(error, match=message):
        experts.add_lora(*arguments, **options)
    assert experts.down_proj.requires_grad
    assert experts.lora("down") is None


def test_what_is_out_of_turn():
    experts = Experts(D, N, E)
    with pytest.raises(ValueError, match="merge_lora: got experts without adapters"):
        experts.merge_lora()
    with pytest.raises(ValueError, match="unmerge_lora: got no merged adapters"):
        experts.unmerge_lora()
    experts.add_lora(2, 1.0)
    with pytest.raises(ValueError, match="add_lora: got experts that have adapters"):
        experts.add_lora(2, 1.0)
    experts.merge_lora()
    with pytest.raises(ValueError, match="merge_lora: got merged adapters"):
        experts.merge_lora()
    with pytest.raises(ValueError, match="add_lora: got experts that have adapters"):
        experts.add_lora(2, 1.0)
