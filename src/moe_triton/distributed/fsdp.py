"""FSDP2 for models with expert-parallel layers, with the experts' gradients divided by the right number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

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
        blocks: modules to shard as units of their own, such as the transformer's layers: in the order in which they
            run, and those inside of others before them. While one of them computes, the next one and its experts are
            gathered, in forward and in backward: FSDP2 does not by itself, since the host waits for the counts of rows.
        rule: "mean": for losses that are means over a rank's tokens, and `ExpertParallel(loss_reduction="mean")`, as
            both are by default. "sum": for losses that sum over ranks, and `loss_reduction="sum"`.
        arguments: of `torch.distributed.fsdp.fully_shard`: mp_policy, reshard_after_forward, offload_policy. The router
            weights stay fp32 where mp_policy casts the experts' inputs. Experts that are fewer than their copies are
            cut along dimension 1 where that divides, since the first would be padded, unless there is a
            shard_placement_fn.

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
        own: dict[str, Any] = {"shard_placement_fn": _cut_over(groups.edp_mesh.shape[-1]), **arguments}
        if module.casts_inputs and (policy := arguments.get("mp_policy")) is not None:
            own["mp_policy"] = replace(policy, cast_forward_inputs=False)
        fully_shard(module, mesh=groups.edp_mesh, **own)
    blocks = list(blocks)
    for block in (*blocks, model):
        fully_shard(block, mesh=groups.dp_mesh, **arguments)
        if rule == "sum" and groups.dp.size > 1:
            assert isinstance(block, FSDPModule)
            block.set_gradient_divide_factor(1.0)
            block.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that divides
    _prefetch(model, blocks)
    return model


def _cut_over(copies: int) -> Callable[[nn.Parameter], Shard | None]:
    """Where the ranks cut a parameter of stacked experts [slots, ...]; None is the first dimension."""

    def cut(parameter: nn.Parameter) -> Shard | None:
        is_few = parameter.dim() > 1 and parameter.shape[0] < copies and parameter.shape[1] % copies == 0
        return Shard(1) if is_few else None

    return cut


def _prefetch(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Let every block gather the next one and its experts, in forward and in backward."""
    inner = {module for block in blocks for module in block.modules() if module is not block}
    outer = [block for block in blocks if block not in inner and block is not model]
    assert isinstance(model, FSDPModule)
    units: list[list[FSDPModule]] = [
        [module for module in block.modules() if isinstance(module, FSDPModule)] for block in outer
    ]
    root: list[FSDPModule] = [model]
    for (first, *_), after in pairwise([root, *units]):
        first.set_modules_to_forward_prefetch(after)
    for (first, *_), after in pairwise([root, *reversed(units)]):
        first.set_modules_to_backward_prefetch(after)
