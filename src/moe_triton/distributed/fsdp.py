"""FSDP2 for models with expert-parallel layers, with the experts' gradients divided by the right number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from moe_triton.checks import check_choice
from moe_triton.distributed.groups import ParallelGroups
from moe_triton.distributed.holders import StackedExperts, spread_experts
from moe_triton.distributed.parameters import check_rule


def apply_fsdp2(
    model: nn.Module, groups: ParallelGroups, *, blocks: Iterable[nn.Module] = (), rule: str = "mean", **arguments: Any
) -> nn.Module:
    """Shard the experts over the ranks that hold the same ones, and everything else over the data-parallel ranks.

    With groups of several replicas, `make_groups(dp_replicate=)`, both are sharded inside a replica, and the shards'
    gradients reduced over the replicas (HSDP).

    FSDP2 averages gradients over the ranks that it shards over. For experts these are the edp copies, but their
    gradients hold the tokens of all dp ranks: the average is ep times too large. Here experts are summed over edp and
    divided by dp.

    Args:
        model: changed in place, and returned.
        groups: from `make_groups` or `ParallelGroups.from_meshes`, the ones the layers' ExpertParallel was made from.
        blocks: modules to shard as units of their own, such as the transformer's layers, innermost first.
        rule: "mean": for losses that are means over a rank's tokens, and `ExpertParallel(loss_reduction="mean")`, as
            both are by default. "sum": for losses that sum over ranks, and `loss_reduction="sum"`.
        arguments: of `torch.distributed.fsdp.fully_shard`: mp_policy, reshard_after_forward, offload_policy. The router
            weights stay fp32 where mp_policy casts the experts' inputs.

    Raises:
        ValueError: an unknown rule, or a layer's `loss_reduction` is of the other one; redundant_experts.
    """
    check_choice("rule", rule, ("mean", "sum"))
    check_rule(model, rule)
    # FSDP2 averages over edp. What it gets is scaled, which needs no divide factor: that one counts twice on one rank.
    scale = groups.edp.size / (groups.dp.size if rule == "mean" else 1)
    for name, module, parallel in list(spread_experts(model)):
        if parallel.redundant_experts:
            raise ValueError(f"model: got redundant_experts at {name!r}, whose replicas FSDP2 would not sum")
        if not isinstance(module, StackedExperts) or module.gradient_scale is None:
            raise TypeError(f"model: got {type(module).__name__} at {name!r}, wanted Experts with a gradient_scale")
        module.gradient_scale = scale
        own = arguments
        if module.casts_inputs and (policy := arguments.get("mp_policy")) is not None:
            own = {**arguments, "mp_policy": replace(policy, cast_forward_inputs=False)}
        fully_shard(module, mesh=groups.edp_mesh, **own)
    for block in (*blocks, model):
        fully_shard(block, mesh=groups.dp_mesh, **arguments)
        if rule == "sum" and groups.dp.size > 1:
            assert isinstance(block, FSDPModule)
            block.set_gradient_divide_factor(1.0)
            block.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that divides
    return model
