"""An optimizer's state by the names of its parameters: global tensors like theirs, and scalars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_triton.distributed.checkpoint.global_tensors import GlobalTensor, ModelTensor, as_global
from moe_triton.distributed.checkpoint.manifest import decode, dtype_name, dtype_of, encode
from moe_triton.distributed.errors import CheckpointError

Described = dict[str, Any]


def parameter_names(optimizer: torch.optim.Optimizer, model: Mapping[str, ModelTensor]) -> list[list[str]]:
    """Return the names of the optimizer's parameters, group by group.

    Raises:
        TypeError: optimizer is no torch.optim.Optimizer.
        ValueError: a parameter that is not the model's.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, wanted a torch.optim.Optimizer or None")
    names = {id(tensor.live): name for name, tensor in model.items()}
    for i, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"optimizer: group {i} has a parameter of shape {list(parameter.shape)} that is not the model's"
                )
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def describe(
    optimizer: torch.optim.Optimizer, model: Mapping[str, ModelTensor]
) -> tuple[Described, dict[str, GlobalTensor]]:
    """Return the optimizer's kind, groups and state as JSON, and its state's tensors that have a parameter's shape.

    Raises TypeError naming the parameter and the entry: state that is neither such a tensor nor a scalar.
    """
    tensors: dict[str, GlobalTensor] = {}
    state: dict[str, dict[str, Any]] = {}
    names = parameter_names(optimizer, model)
    for name in (name for group in names for name in group):
        parameter, layout, _ = model[name]
        entries = optimizer.state.get(parameter, {})
        for entry, value in entries.items():
            where = f"optimizer.{name}.{entry}"
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0:
                tensors[where] = as_global(value, layout)
                state.setdefault(name, {})[entry] = {"saved_as": where, "dtype": dtype_name(value.dtype)}
            elif isinstance(value, Tensor) and value.numel() != 1:
                raise TypeError(
                    f"{where}: got a tensor of shape {list(value.shape)}, wanted the parameter's, "
                    f"{list(parameter.shape)}, or a scalar: it cannot be spread as the parameter is"
                )
            else:
                state.setdefault(name, {})[entry] = encode(where, value)
    groups = [
        {
            "names": names[i],
            "settings": {
                key: encode(f"optimizer.param_groups[{i}][{key!r}]", value)
                for key, value in group.items()
                if key not in ("params", "param_names")
            },
        }
        for i, group in enumerate(optimizer.param_groups)
    ]
    return {"kind": type(optimizer).__name__, "groups": groups, "state": state}, tensors


class Restoration:
    """Makes room for a saved state, spread as the parameters are now; once it is read, gives it to the optimizer.

    Raises CheckpointError: the state is of another kind of optimizer, or has other groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: Mapping[str, ModelTensor], saved: Described) -> None:
        names = parameter_names(optimizer, model)
        kind = type(optimizer).__name__
        if kind != saved["kind"]:
            raise CheckpointError(f"optimizer: got {kind}, but the state that was saved is of {saved['kind']}")
        if len(names) != len(saved["groups"]):
            raise CheckpointError(
                f"optimizer: got {len(names)} parameter groups, but {len(saved['groups'])} were saved"
            )
        for i, (mine, group) in enumerate(zip(names, saved["groups"], strict=True)):
            if strangers := sorted(set(mine) - set(group["names"])):
                raise CheckpointError(f"optimizer: group {i} has {strangers[0]!r}, which was not saved in that group")
        self.optimizer = optimizer
        self.tensors: dict[str, GlobalTensor] = {}
        self.state: dict[int, dict[str, Any]] = {}
        self.settings = [{key: decode(value) for key, value in group["settings"].items()} for group in saved["groups"]]
        for index, name in enumerate(name for group in names for name in group):
            parameter, layout, _ = model[name]
            for entry, value in saved["state"].get(name, {}).items():
                if isinstance(value, dict) and "saved_as" in value:
                    room = torch.zeros_like(parameter, dtype=dtype_of(value["dtype"]), requires_grad=False)
                    self.tensors[value["saved_as"]] = as_global(room, layout)
                    self.state.setdefault(index, {})[entry] = room
                else:
                    self.state.setdefault(index, {})[entry] = decode(value)

    def finish(self) -> None:
        current = self.optimizer.state_dict()["param_groups"]
        keep = [{key: group[key] for key in ("params", "param_names") if key in group} for group in current]
        groups = [{**settings, **kept} for settings, kept in zip(self.settings, keep, strict=True)]
        self.optimizer.load_state_dict({"state": self.state, "param_groups": groups})
        # torch casts state to the parameter's dtype, but a bf16 parameter's fp32 moments have to stay what they were
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, entries in self.state.items():
            for entry, value in entries.items():
                loaded = self.optimizer.state[parameters[index]][entry]
                if isinstance(value, Tensor) and loaded.dtype != value.dtype:
                    self.optimizer.state[parameters[index]][entry] = value.to(loaded.device)
