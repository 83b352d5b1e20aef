"""DeepSpeed's helpers for MoE parameters, and groups by layer and by expert (DeepSpeed #5064)."""

from __future__ import annotations

import copy
import itertools

import deepspeed.moe.utils as upstream
import pytest
import torch
from torch import nn

from moe_triton.compat.deepspeed import layer as our_layer
from moe_triton.compat.deepspeed import utils
from tests.helpers.deepspeed_modules import D, Gated, Mlp, pair


def parameter(numel: int, group_name: str | None = None, layer_name: str = "l", expert_number: int = 0) -> nn.Parameter:
    p = nn.Parameter(torch.zeros(numel))
    if group_name is not None:
        p.allreduce, p.group_name, p.layer_name, p.expert_number = False, group_name, layer_name, expert_number
    return p


def example() -> dict:
    names = {"ep_size_2": [5, 5, 9], "ep_size_4": [4]}
    expert = [parameter(numel, name) for name, numels in names.items() for numel in numels]
    return {"params": [expert[0], parameter(3), *expert[1:]], "name": "all", "lr": 0.5}


def sizes(groups: list[dict]) -> list[list[int]]:
    return [[p.numel() for p in group["params"]] for group in groups]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (utils.MAX_GROUP_SIZE, [[3], [5, 5, 9], [4]]),
        (None, [[3], [5, 5, 9], [4]]),
        (float("inf"), [[3], [5, 5, 9], [4]]),
        (10, [[3], [5, 5], [9], [4]]),
        (4, [[3], [5], [5], [9], [4]]),  # upstream begins with an empty group
    ],
)
def test_sizes(limit, expected):
    groups = utils.split_params_into_different_moe_groups_for_optimizer(example(), limit)
    assert sizes(groups) == expected


def test_keys():
    groups = utils.split_params_into_different_moe_groups_for_optimizer([example()])
    assert [group["name"] for group in groups] == ["all", "ep_size_2", "ep_size_4"]
    assert [group["lr"] for group in groups] == [0.5] * 3
    assert [utils.is_moe_param_group(group) for group in groups] == [False, True, True]
    assert [group.get("original_name") for group in groups] == [None, "all", "all"]
    assert not any("layer" in group or "expert_number" in group for group in groups)


@pytest.mark.parametrize("container", [list, tuple])
def test_the_input_is_not_changed(container):
    given = container([example(), {"params": [parameter(2)], "name": "more"}])
    before = copy.copy([dict(group, params=list(group["params"])) for group in given])
    utils.split_params_into_different_moe_groups_for_optimizer(given)
    for group, was in zip(given, before, strict=True):
        assert group.keys() == was.keys()
        assert all(p is q for p, q in zip(group["params"], was["params"], strict=True))


def two_layers(make=Mlp) -> nn.Module:
    encoder = our_layer.MoE(D, make(), num_experts=3, expert_group_name="encoder")
    decoder = our_layer.MoE(D, make(), num_experts=2, expert_group_name="decoder")
    return nn.ModuleDict({"norm": nn.LayerNorm(D), "encoder": encoder, "decoder": decoder})


def labels(groups: list[dict]) -> list[tuple]:
    return [(g["name"], g.get("layer"), g.get("expert_number")) for g in groups if g.get("moe")]


def test_by_layer_and_by_expert():
    model = two_layers()
    parameters = [{"params": list(model.parameters()), "name": "all"}]
    split = utils.split_params_into_different_moe_groups_for_optimizer
    assert labels(split(parameters)) == [("ep_size_1", None, None)]
    assert labels(split(parameters, by="layer")) == [("ep_size_1", "encoder", None), ("ep_size_1", "decoder", None)]
    experts = [("encoder", 0), ("encoder", 1), ("encoder", 2), ("decoder", 0), ("decoder", 1)]
    groups = split(parameters, by="expert")
    assert labels(groups) == [("ep_size_1", *expert) for expert in experts]
    for group, (name, number) in zip(groups[1:], experts, strict=True):
        expert = model[name].deepspeed_moe.experts.deepspeed_experts[number]
        assert all(p is q for p, q in zip(group["params"], expert.parameters(), strict=True))


@pytest.mark.parametrize("by", utils.BY)
@pytest.mark.parametrize("limit", [None, 1, 300, 700])
def test_every_parameter_once_and_homogeneous_groups(by, limit):
    model = two_layers(Gated)
    given = [
        {"params": list(model["encoder"].parameters()), "name": "a", "lr": 1.0},
        {"params": itertools.chain(model["norm"].parameters(), model["decoder"].parameters()), "name": "b"},
    ]
    groups = utils.split_params_into_different_moe_groups_for_optimizer(given, limit, by)
    found = [p for group in groups for p in group["params"]]
    assert {id(p) for p in found} == {id(p) for p in model.parameters()}
    assert len(found) == len(set(found))
    for group in groups:
        total = sum(p.numel() for p in group["params"])
        assert group["params"]
        assert limit is None or total <= limit or len(group["params"]) == 1 or not group.get("moe")
        if group.get("moe"):
            keys = {"group": "group_name", "layer": "layer_name", "expert": "expert_number"}
            marks = [tuple(getattr(p, keys[b]) for b in utils.BY[: utils.BY.index(by) + 1]) for p in group["params"]]
            assert len(set(marks)) == 1
            assert group["original_name"] == ("a" if group.get("lr") else "b")
    torch.optim.AdamW(groups, lr=1e-3)  # takes them


def test_a_group_that_is_left_without_parameters_goes():
    groups = utils.split_params_into_different_moe_groups_for_optimizer({"params": [parameter(2, "ep_size_2")]})
    assert sizes(groups) == [[2]]
    assert groups[0]["original_name"] is None


def test_layers_that_are_not_named_are_numbered():
    layers = [our_layer.MoE(D, Mlp(), num_experts=2) for _ in range(2)]
    names = [layer.layer_name for layer in layers]
    assert names[0] != names[1]
    assert [int(name.removeprefix("moe_")) for name in names] == [int(names[0][4:]), int(names[0][4:]) + 1]
    assert {layer.expert_group_name for layer in layers} == {"ep_size_1"}  # the process group's key is another thing


def test_copies_of_a_layer_are_layers_of_their_own():
    """nn.TransformerEncoder and others make their layers by deepcopy, which drops a parameter's attributes."""
    layer = our_layer.MoE(D, Mlp(), num_experts=2)
    copies = nn.ModuleList([copy.deepcopy(layer) for _ in range(2)])
    groups = utils.configure_moe_param_groups(list(copies.parameters()), by="layer")
    assert len({group.get("layer") for group in groups} - {None}) == 2
    named = our_layer.MoE(D, Mlp(), num_experts=2, expert_group_name="mine")
    assert copy.deepcopy(named).layer_name == "mine"


def test_parity_with_upstream():
    """One process group at a time, where upstream's order does not depend on the hash seed."""
    theirs, ours = pair(num_experts=3, use_residual=True)
    for limit in (utils.MAX_GROUP_SIZE, 900):
        groups = [
            module.split_params_into_different_moe_groups_for_optimizer(
                {"params": list(layer.parameters()), "name": "all", "weight_decay": 0.1}, limit
            )
            for module, layer in ((upstream, theirs), (utils, ours))
        ]
        assert sizes(groups[0]) == sizes(groups[1])
        for their_group, our_group in zip(*groups, strict=True):
            assert {k: v for k, v in our_group.items() if k not in ("params", "original_name")} == {
                k: v for k, v in their_group.items() if k != "params"
            }


def test_configure():
    _, layer = pair(num_experts=3)
    groups = utils.configure_moe_param_groups(list(layer.parameters()))
    assert [group["name"] for group in groups] == ["dense-params", "ep_size_1"]
    assert utils.configure_moe_param_groups(groups) is groups
    again = utils.configure_moe_param_groups([{"params": list(layer.parameters()), "name": "x"}], by="expert")
    assert [group["original_name"] for group in again[1:]] == ["x"] * 3


def test_small_helpers():
    theirs, ours = pair(num_experts=3, use_residual=True)
    assert utils.has_moe_layers(nn.Sequential(nn.Linear(2, 2), ours)) == (True, 3)
    assert utils.has_moe_layers(nn.Sequential(theirs)) == (True, 3)
    assert utils.has_moe_layers(nn.Linear(2, 2)) == (False, 0)
    assert upstream.has_moe_layers(ours) == (True, 3)
    shared, expert = utils.split_params_into_shared_and_expert_params(ours.parameters())
    assert {id(p) for p in expert} == {id(p) for p in ours.deepspeed_moe.experts.parameters()}
    assert len(shared) + len(expert) == len(list(ours.parameters()))
    assert all(utils.is_moe_param(p) == upstream.is_moe_param(p) for p in ours.parameters())
    ours(torch.randn(8, D))[0].sum().backward()
    ours.coefficient.weight.grad = None
    for parameters in (list(ours.parameters()), expert):
        mine = utils.split_params_grads_into_shared_and_expert_params(parameters)
        yours = upstream.split_params_grads_into_shared_and_expert_params(parameters)
        assert [[g.data_ptr() for g in grads] for grads in mine] == [[g.data_ptr() for g in grads] for grads in yours]


def test_bad_arguments():
    split = utils.split_params_into_different_moe_groups_for_optimizer
    with pytest.raises(ValueError, match="param_groups: got Linear"):
        split(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="by: got 'rank', wanted one of group, layer, expert"):
        split([], by="rank")
    theirs, _ = pair(num_experts=2)
    with pytest.raises(ValueError, match=r"by: got 'layer' for a parameter of shape \[24, 16\] without 'layer_name'"):
        split({"params": list(theirs.parameters())}, by="layer")
    with pytest.raises(ValueError, match="model_parameters: got tuple"):
        utils.configure_moe_param_groups((parameter(2),))
    with pytest.raises(TypeError, match="model_parameters: got a list with a str"):
        utils.configure_moe_param_groups(["a"])
    with pytest.raises(TypeError, match="tensors and dicts in one list"):
        utils.configure_moe_param_groups([parameter(2), {"params": []}])
