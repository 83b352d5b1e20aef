"""Which modules hold experts, and what they say of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_triton import MoE
from moe_triton.compat.deepspeed.layer import MoE as DeepSpeedMoE
from moe_triton.compat.deepspeed.layer import MOELayer
from moe_triton.distributed import ExpertParallel, apply_fsdp2
from moe_triton.distributed.holders import ExpertHolder, StackedExperts, expert_modules, spread_experts
from moe_triton.layers import Experts


def test_a_compiled_module_is_found_once():
    experts = Experts(4, 4, 2, expert_parallel=ExpertParallel())
    model = nn.ModuleDict({"plain": MoE(4, 4, 2), "compiled": torch.compile(experts)})
    assert [name for name, _ in expert_modules(model, StackedExperts)] == ["plain.experts", "compiled._orig_mod"]
    assert [(name, module) for name, module, _ in spread_experts(model)] == [("compiled._orig_mod", experts)]


def test_kinds_of_holders():
    layer = DeepSpeedMoE(4, nn.Linear(4, 4), num_experts=2)
    assert [type(module) for _, module in expert_modules(layer, ExpertHolder)] == [MOELayer]
    assert list(expert_modules(layer, StackedExperts)) == []
    holder = layer.deepspeed_moe
    assert {id(p) for p in holder.held_parameters()} == {id(p) for p in holder.experts.parameters()}


def test_what_expert_tensor_parallelism_splits():
    experts = Experts(4, 4, 2, bias=True)
    whole = [name for name, parameter in experts.named_parameters() if not experts.is_sliced(parameter)]
    assert whole == ["down_proj_bias"]
    assert StackedExperts().sliced_dimensions is None


def test_fsdp2_refuses_a_holder_that_scales_no_gradients():
    model = StackedExperts()
    model.expert_parallel, model.num_experts = ExpertParallel(), 2
    groups = type("", (), {"edp": model.expert_parallel.edp, "dp": model.expert_parallel.edp})()
    with pytest.raises(TypeError, match="got StackedExperts at '', wanted Experts with a gradient_scale"):
        apply_fsdp2(model, groups)
