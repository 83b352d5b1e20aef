"""DeepSpeed's helpers for MoE parameters (deepspeed/moe/utils.py), and the grouping that its issue #5064 asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_triton.checks import check_choice
from moe_triton.compat.deepspeed import upstream
from moe_triton.compat.deepspeed.layer import MoE

BY = ("group", "layer", "expert")
MAX_GROUP_SIZE = 178956971  # DeepSpeed's default


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Return (whether the model has a DeepSpeed MoE layer, ours or upstream's; the first one's number of experts)."""
    kinds = MoE if upstream.groups is None else (MoE, upstream.MoE)
    for module in m.modules():
        if isinstance(module, kinds):
            return True, module.num_experts
    return False, 0


def is_moe_param(param: Tensor) -> bool:
    """Return whether the parameter belongs to an expert: not to be reduced over all data-parallel ranks."""
    return getattr(param, "allreduce", True) is False


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    return bool(param_group.get("moe", False))


def split_params_into_shared_and_expert_params(
    params: Iterable[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (parameters that all ranks share, parameters of experts), each in the given order."""
    params = list(params)
    return [p for p in params if not is_moe_param(p)], [p for p in params if is_moe_param(p)]


def split_params_grads_into_shared_and_expert_params(
    group: Iterable[nn.Parameter],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients that exist, in the parameters' dtype: (of shared parameters, of experts' parameters)."""
    shared, expert = split_params_into_shared_and_expert_params(p for p in group if p.grad is not None)
    return [p.grad.to(p.dtype) for p in shared], [p.grad.to(p.dtype) for p in expert]  # type: ignore[union-attr]


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | Sequence[dict[str, Any]],
    max_group_size: float | None = MAX_GROUP_SIZE,
    by: str = "group",
) -> list[dict[str, Any]]:
    """Return optimizer groups that separate expert parameters from the others, and optionally from each other.

    First come the given groups without their expert parameters, then, for each given group in turn, its expert
    parameters' groups in the order of the parameters, which is the same on all ranks. No group is empty, and the input
    is not changed. The new groups have the given group's options and

    - `name`: the key of the process group, which DeepSpeed's engine looks up ("ep_size_N"), and `moe`: True;
    - `original_name`: the given group's name;
    - `layer` (for by="layer" and "expert"): the layer's name, the `expert_group_name` that it was made with;
    - `expert_number` (for by="expert"): the expert's place among this rank's experts.

    Args:
        param_groups: dicts with "params", as for a torch.optim.Optimizer, in a list or tuple; or one dict.
        max_group_size: elements per group; a group that would grow larger is split. A parameter that is larger by
            itself gets a group of its own. None: no limit.
        by: what a group keeps together: "group", the parameters of one process group (DeepSpeed's way); "layer", those
            of one MoE layer; "expert", those of one expert of one layer.

    Raises:
        ValueError: param_groups is none of these, `by` is unknown or wants marks that a parameter lacks.
    """
    check_choice("by", by, BY)
    if isinstance(param_groups, dict):
        param_groups = [param_groups]
    if not isinstance(param_groups, (list, tuple)) or not all(isinstance(group, dict) for group in param_groups):
        raise ValueError(f"param_groups: got {type(param_groups).__name__}, wanted a dict, or a list or tuple of dicts")
    shared_groups, expert_groups = [], []
    for group in param_groups:
        shared, expert = split_params_into_shared_and_expert_params(group["params"])
        if shared:
            shared_groups.append({**group, "params": shared})
        alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for param in expert:
            alike.setdefault(tuple(_marks(param, by).values()), []).append(param)
        for params in alike.values():
            marks = {"moe": True, "original_name": group.get("name"), **_marks(params[0], by)}
            expert_groups += [{**group, **marks, "params": part} for part in _parts(params, max_group_size)]
    return shared_groups + expert_groups


def configure_moe_param_groups(
    model_parameters: list[nn.Parameter] | list[dict[str, Any]], by: str = "group"
) -> list[dict[str, Any]]:
    """Turn parameters, or optimizer groups without any MoE group yet, into groups that DeepSpeed's engine takes.

    Plain parameters become one group named "dense-params" before the split. Groups of which one has a key "moe" already
    are returned as they are.

    Raises ValueError on anything but a list, TypeError on a list of other things.
    """
    if not isinstance(model_parameters, list):
        raise ValueError(f"model_parameters: got {type(model_parameters).__name__}, wanted a list")
    for p in model_parameters:
        if not isinstance(p, (torch.Tensor, dict)):
            raise TypeError(f"model_parameters: got a list with a {type(p).__name__}, wanted tensors or dicts")
    if all(isinstance(p, torch.Tensor) for p in model_parameters):
        group = {"params": model_parameters, "name": "dense-params"}
        return split_params_into_different_moe_groups_for_optimizer(group, by=by)
    if any(isinstance(p, torch.Tensor) for p in model_parameters):
        raise TypeError("model_parameters: got tensors and dicts in one list, wanted one kind")
    groups = cast(list[dict[str, Any]], model_parameters)
    if any("moe" in group for group in groups):
        return groups
    return split_params_into_different_moe_groups_for_optimizer(groups, by=by)


def _marks(param: nn.Parameter, by: str) -> dict[str, Any]:
    """Return the keys of the group that an expert's parameter belongs to."""
    wanted = {"name": "group_name", "layer": "layer_name", "expert_number": "expert_number"}
    marks = {}
    for key in list(wanted)[: BY.index(by) + 1]:
        if not hasattr(param, wanted[key]):
            raise ValueError(
                f"by: got {by!r} for a parameter of shape {list(param.shape)} without {wanted[key]!r}, "
                "wanted the parameters of a moe_triton.compat.deepspeed MoE layer"
            )
        marks[key] = getattr(param, wanted[key])
    return marks


def _parts(params: list[nn.Parameter], max_group_size: float | None) -> list[list[nn.Parameter]]:
    """Return the parameters in order, cut before each one that would make a part too large."""
    parts: list[list[nn.Parameter]] = []
    size = 0
    for param in params:
        numel = getattr(param, "ds_numel", param.numel())  # ZeRO keeps the size of a parameter that it has taken away
        if not parts or (max_group_size is not None and size + numel > max_group_size):
            parts.append([])
            size = 0
        parts[-1].append(param)
        size += numel
    return parts
