"""Colossal-AI v0.1.6's public names around its mixture of experts: each is here, or the reference page says why not."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_triton.compat.colossalai.context import MOE_CONTEXT
from moe_triton.compat.colossalai.nn.layer.moe import (
    Experts,
    FFNExperts,
    MoeLayer,
    MoeModule,
    Top1Router,
    Top2Router,
    TPExperts,
)
from tests.helpers.colossalai_context import forget

ROOT = "moe_triton.compat.colossalai"
PAGE = Path(__file__).parents[3] / "docs" / "colossalai_reference.md"

LAYERS = (
    "Experts", "FFNExperts", "TPExperts", "Top1Router", "Top2Router", "MoeLayer", "NormalNoiseGenerator",
    "UniformNoiseGenerator", "build_ffn_experts", "MoeModule",
)  # fmt: skip
LOSSES = ("MoeCrossEntropyLoss", "MoeLoss")
PARAMETERS = ("get_moe_epsize_param_dict", "sync_moe_model_param")

HERE = {
    "": ("initialize", "launch", "launch_from_torch"),
    "context": ("MOE_CONTEXT", "ParallelContext", "ParallelMode", "seed", "with_seed", "add_seed", "get_seeds",
                "get_current_mode", "moe_set_seed", "reset_seeds"),
    "context.moe_context": ("MOE_CONTEXT", "MoeContext", "MoeParallelInfo"),
    "context.parallel_mode": ("ParallelMode",),
    "context.parallel_context": ("ParallelContext", "global_context"),
    "context.random": ("seed", "with_seed", "add_seed", "get_seeds", "get_current_mode", "moe_set_seed", "reset_seeds"),
    "core": ("global_context", "MOE_CONTEXT"),
    "engine": ("Engine",),
    "engine.gradient_handler": ("MoeGradientHandler",),
    "nn": (*LAYERS, *LOSSES),
    "nn.layer": LAYERS,
    "nn.layer.moe": LAYERS,
    "nn.layer.moe.experts": ("MoeExperts", "Experts", "FFNExperts", "TPExperts"),
    "nn.layer.moe.layers": ("Top1Router", "Top2Router", "FP32LinearGate", "MoeLayer", "MoeModule"),
    "nn.layer.moe.utils": ("NormalNoiseGenerator", "UniformNoiseGenerator", "build_ffn_experts"),
    "nn.loss": LOSSES,
    "nn.loss.loss_moe": LOSSES,
    "testing": ("assert_equal", "assert_not_equal", "assert_close", "assert_close_loose", "assert_equal_in_group"),
    "trainer": ("Trainer", "hooks"),
    "utils": ("checkpoint", "free_port", "get_current_device", "get_dataloader"),
    "utils.moe": PARAMETERS,
}  # fmt: skip

# what the page lists with a reason
LISTED = (
    "launch_from_slurm", "launch_from_openmpi", "get_default_parser", "Config", "ConfigException",
    "process_group_initializer", "set_mode", "get_states", "set_seed_states", "sync_states", "SingletonMeta",
    "ForceFP32Parameter", "autocast_softmax", "AllGather", "ReduceScatter", "AllToAll", "MoeDispatch", "MoeCombine",
    "moe_cumsum", "COL_MOE_KERNEL_FLAG", "use_kernel", "a2a_process", "tp_process", "colossal_moe_cuda",
    "no_shard_zero_context", "no_shard_zero_decrator", "CheckpointModule", "GRADIENT_HANDLER", "LOSSES",
    "drop", "loss", "normal", "uniform", "parameterize", "rerun_on_exception", "rerun_if_address_is_in_use",
    "BaseGradientHandler",
)  # fmt: skip

MEMBERS = {
    "context": ("world_size", "max_ep_size", "min_dp_size", "aux_loss", "use_kernel_optim", "has_setup",
                "parallel_info_dict", "is_initialized", "setup", "get_info", "set_kernel_not_use", "reset_loss",
                "add_loss", "get_loss"),
    "info": ("ep_size", "dp_size", "ep_group", "dp_group"),
    "experts": ("comm_name", "num_local_experts", "dist_info", "experts"),
    "ffn": ("comm_name", "num_local_experts", "dist_info", "w1", "b1", "w2", "b2", "act"),
    "layer": ("d_model", "num_experts", "gate", "router", "experts", "ep_group", "ep_size", "num_local_experts"),
    "module": ("moe_router", "use_residual", "residual_module", "residual_combine", "experts", "moe_layer"),
    "first": ("select_policy",),
    "router": ("capacity_factor_train", "capacity_factor_eval", "min_capacity", "noisy_func", "drop_tks",
               "get_capacity"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean():
    forget()
    yield
    forget()


@pytest.mark.parametrize("module", HERE)
def test_names(module):
    found = importlib.import_module(f"{ROOT}.{module}".removesuffix("."))
    assert [name for name in HERE[module] if not hasattr(found, name)] == []


def test_the_page_says_why_the_others_are_missing():
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in LISTED if f"`{name}`" not in page] == []


@pytest.mark.parametrize("kind", MEMBERS)
def test_members(kind):
    make = {
        "context": lambda: MOE_CONTEXT,
        "info": lambda: MOE_CONTEXT.get_info(4)[1],
        "experts": lambda: Experts(nn.Linear, 4, in_features=3, out_features=3),
        "ffn": lambda: FFNExperts(4, 3, 5),
        "layer": lambda: MoeLayer(3, 4, Top1Router(), FFNExperts(4, 3, 5)),
        "module": lambda: MoeModule(3, 4, use_residual=True, expert_cls=nn.Linear, in_features=3, out_features=3),
        "router": lambda: Top2Router(),
        "first": lambda: Top1Router(),
    }[kind]()
    assert [name for name in MEMBERS[kind] if not hasattr(make, name)] == []


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (MOE_CONTEXT.setup, ("seed", "use_kernel_optim")),
        (MOE_CONTEXT.get_info, ("num_experts",)),
        (FFNExperts, ("num_experts", "d_model", "d_ff", "activation", "drop_rate")),
        (TPExperts, ("num_experts", "d_model", "d_ff", "activation", "drop_rate")),
        (MoeLayer, ("dim_model", "num_experts", "router", "experts")),
        (
            MoeModule,
            ("dim_model", "num_experts", "top_k", "capacity_factor_train", "capacity_factor_eval", "min_capacity",
             "noisy_policy", "drop_tks", "use_residual", "residual_instance", "expert_instance", "expert_cls"),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_arguments_come_in_upstreams_order(call, names):
    assert tuple(inspect.signature(call).parameters)[: len(names)] == names


def test_contexts_words():
    MOE_CONTEXT.setup(3, use_kernel_optim=False)
    assert (MOE_CONTEXT.has_setup, MOE_CONTEXT.use_kernel_optim) == (True, False)
    MOE_CONTEXT.setup(3)
    assert MOE_CONTEXT.use_kernel_optim
    MOE_CONTEXT.set_kernel_not_use()
    assert not MOE_CONTEXT.use_kernel_optim
    assert MOE_CONTEXT.parallel_info_dict == {}
    _, info = MOE_CONTEXT.get_info(4)
    assert MOE_CONTEXT.parallel_info_dict == {1: info}
    assert (Experts.comm_name, FFNExperts.comm_name, TPExperts.comm_name) == ("all_to_all", "all_to_all", "all_gather")


def test_the_gate_of_v016_stays_in_fp32():
    layer = MoeLayer(8, 4, Top2Router(), FFNExperts(4, 8, 16))
    weight = layer.gate.weight.detach().clone()
    for cast in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.float()):
        cast(layer)
        assert torch.equal(layer.gate.weight, weight)
    layer.bfloat16()
    assert layer.experts.w1.dtype == torch.bfloat16
    x = torch.randn(5, 8).bfloat16()
    assert torch.equal(layer.gate(x), nn.functional.linear(x.float(), weight))
    assert layer(x).dtype == torch.bfloat16
    assert layer.double().gate.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="scale"):
        type(layer.gate)(8, 4, scale=0.0)
