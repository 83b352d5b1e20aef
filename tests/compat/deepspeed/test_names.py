"""The installed deepspeed's public names around its MoE layer: each is ours, or the reference page says why not."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from pathlib import Path

import deepspeed.moe
import pytest
from deepspeed.moe import experts, layer, sharded_moe, utils
from torch import nn

from moe_triton.compat import deepspeed as ours
from moe_triton.compat.deepspeed import experts as our_experts
from moe_triton.compat.deepspeed import gating
from moe_triton.compat.deepspeed import layer as our_layer
from moe_triton.compat.deepspeed import utils as our_utils

PAGE = (Path(__file__).parents[3] / "docs" / "deepspeed_reference.md").read_text(encoding="utf-8")
HERE = {
    "layer": {"MoE": our_layer.MoE},
    "experts": {"Experts": our_experts.Experts},
    "sharded_moe": {"TopKGate": gating.TopKGate, "MOELayer": our_layer.MOELayer},
    "utils": {name: getattr(our_utils, name, None) for name in (
        "has_moe_layers", "is_moe_param", "split_params_into_shared_and_expert_params",
        "split_params_grads_into_shared_and_expert_params", "split_params_into_different_moe_groups_for_optimizer",
        "is_moe_param_group", "configure_moe_param_groups")},
}  # fmt: skip
FOLDER = Path(deepspeed.moe.__file__).parent
MODULES = sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]))


def public_names(module: str) -> list[str]:
    """What a module of deepspeed.moe defines itself, without names that begin with an underscore."""
    found = []
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.col_offset == 0:
            found.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.col_offset in (0, 4):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [target.id for target in targets if isinstance(target, ast.Name) and node.col_offset == 0]
    return [name for name in found if not name.startswith("_")]


@pytest.mark.parametrize("module", MODULES)
def test_names(module):
    if f"`{module}`" in PAGE:  # a whole module that the page lists
        return
    given = HERE.get(module, {})
    assert all(given.values())
    assert [name for name in public_names(module) if name not in given and f"`{name}`" not in PAGE] == []


def test_the_walk_sees_the_names():
    assert set(HERE) <= set(MODULES)
    for module, names in HERE.items():
        assert set(names) <= set(public_names(module))
    assert {"MOELayer", "USE_EINSUM", "gumbel_map", "top1gating"} <= set(public_names("sharded_moe"))


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [(layer.MoE, our_layer.MoE), (experts.Experts, our_experts.Experts), (sharded_moe.TopKGate, gating.TopKGate),
     *((getattr(utils, name), function) for name, function in HERE["utils"].items())],
    ids=lambda value: value.__name__,
)  # fmt: skip
def test_arguments_come_in_deepspeeds_order(theirs, mine):
    wanted = tuple(inspect.signature(theirs).parameters.values())
    got = tuple(inspect.signature(mine).parameters.values())[: len(wanted)]
    assert [p.name for p in got] == [p.name for p in wanted]
    assert [p.default for p in got if p.name != "max_group_size"] == [
        p.default for p in wanted if p.name != "max_group_size"
    ]


def test_the_groups_belong_to_the_layer():
    with pytest.raises(ValueError, match="ep_group: got"):
        gating.TopKGate(8, 4, ep_group=object())
    assert ours.MoE is not our_layer.MoE
    assert isinstance(gating.TopKGate(8, 4, 2, 1.0, 1.0, 8, None, True, True, None, False).wg, nn.Linear)
