"""Colossal-AI's experts of any class."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT
from moe_triton.compat.colossalai.context.random import expert_seeds, generators_seeded
from moe_triton.compat.colossalai.nn.layer.moe.base import Capacity, MoeExperts
from moe_triton.compat.mlps import is_tampered, recognise
from moe_triton.compat.opaque import call_one_by_one
from moe_triton.records import Dispatch, ExpertCall, ExpertParameters, ExpertSpec


class Experts(MoeExperts):
    """E experts of any class, each constructed on its own, spread over the ranks that the MoE context names.

    Only their parameters differ: those of the local experts are stacked, [local, ...] each, and `expert` is the module
    that computes with one slice of them. MLPs (Linear, activation, Linear, with dropout that is not active, and gated
    ones) run fused; any other class is called expert by expert, on [1, 1, rows, d].

    Args:
        expert: the class of an expert (v0.0.2), or `expert_cls` (v0.1.6).
        num_experts: E.
        expert_args: of the class.

    Raises:
        ValueError, TypeError: E does not fit the ranks, or `expert` is no class of Modules.
    """

    def __init__(self, expert: Any = None, num_experts: int = 1, *, expert_cls: Any = None, **expert_args: Any) -> None:
        super().__init__()
        if (expert is None) == (expert_cls is None):
            raise TypeError("expert, expert_cls: wanted one of the two, the class of an expert")
        kind = expert if expert_cls is None else expert_cls
        if not callable(kind) or isinstance(kind, nn.Module):
            raise TypeError(f"expert: got {type(kind).__name__}, wanted a class of Modules")
        self.num_experts = num_experts
        self.num_local_experts, self.dist_info = MOE_CONTEXT.get_info(num_experts)
        self.expert_parallel = self.parallel
        self.layer_name = self.parallel.new_layer()
        self.backend = "auto"
        seeds = expert_seeds()
        made = []
        for number in self.local_experts:
            with generators_seeded(seeds(number)):
                made.append(kind(**expert_args))
        if not isinstance(made[0], nn.Module):
            raise TypeError(f"expert: {kind!r} made a {type(made[0]).__name__}, wanted a Module")
        self.mlp = recognise(_without_dropout(made[0]))
        self._stack(made)
        self.bind(self.dist_info)

    @property
    def experts(self) -> tuple[nn.Module, ...]:
        """Return this rank's experts as modules, made from slices of our parameters at every access.

        `experts[0].weight` has upstream's names, shapes, values, gradients and marks. Values and gradients are views:
        what is written into them in place is written into ours, and a call's gradients reach ours. Hooks belong on
        `expert`, the one module that computes.
        """
        return tuple(self._view(number) for number in range(self.num_local_experts))

    def _view(self, number: int) -> nn.Module:
        view = copy.deepcopy(self.expert)
        for name, paths in self.paths.items():
            whole = getattr(self, name)
            own = whole[number]
            if own.requires_grad:
                own.retain_grad()  # so that torch does not warn when the gradient of a slice is read
            if whole.grad is not None:
                own.grad = whole.grad[number]
            own.moe_param, own.moe_info = 1, self.dist_info
            for path in paths:
                parent, _, last = path.rpartition(".")
                module = view.get_submodule(parent)
                (module._parameters if last in module._parameters else module._buffers)[last] = own
        return view

    def _stack(self, made: list[Any]) -> None:
        """Register the experts' tensors, stacked, as ours; keep the first expert, without tensors, as what computes."""
        self.paths: dict[str, list[str]] = {}  # of each of our tensors, where it belongs in the expert
        for kind in ("parameters", "buffers"):
            named = [dict(getattr(one, f"named_{kind}")(remove_duplicate=False)) for one in made]
            names: dict[int, str] = {}
            for path, tensor in named[0].items():
                name = names.setdefault(id(tensor), path.replace(".", "_"))
                if path.replace(".", "_") != name:  # tied to an earlier one
                    self.paths[name].append(path)
                    continue
                if name in self.paths or hasattr(type(self), name) or hasattr(self, name):
                    raise ValueError(f"expert: the name of its tensor {path} is taken here, wanted another one")
                stacked = torch.stack([one[path].detach() for one in named])
                if kind == "buffers" and self.parallel.ep.size > 1:
                    raise ValueError(f"expert: has a buffer, {path}, wanted parameters only for experts over ranks")
                if kind == "parameters":
                    self.register_parameter(name, nn.Parameter(stacked, requires_grad=tensor.requires_grad))
                else:
                    self.register_buffer(name, stacked)
                self.paths[name] = [path]
        self.expert = made[0]
        for module in self.expert.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update(dict.fromkeys(tensors))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_weights: Tensor,
        dispatched: Dispatch,
        *,
        capacity: Capacity = lambda num_tokens: None,
    ) -> Tensor:
        """hidden_states [T, d], weights [T, K], a Dispatch of the T tokens over all experts -> [T, d].

        `capacity` (tokens -> places of an expert) is for expert parallelism.
        """
        if self.is_fused and self.mlp is not None:
            call = ExpertCall(
                hidden=hidden_states,
                weights=top_k_weights,
                dispatched=dispatched,
                parameters=self._mlp_parameters(),
                spec=ExpertSpec(activation=self.mlp.activation),
            )
            return self.compute(call, capacity)
        return self.compute(self.opaque_call(self._call, hidden_states, top_k_weights, dispatched), capacity)

    @property
    def is_fused(self) -> bool:
        """Return whether the experts, in the present mode, are MLPs that run fused."""
        modules = list(self.expert.modules())
        drops = self.training and any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
        return self.mlp is not None and not drops and not any(map(is_tampered, modules))

    def _mlp_parameters(self) -> ExpertParameters:
        assert self.mlp is not None
        of_path = {path: getattr(self, name) for name, paths in self.paths.items() for path in paths}

        def joined(names: tuple[str, ...], which: str) -> Tensor | None:
            parts = [of_path[path] for name in names if (path := f"{name}.{which}") in of_path]
            if not parts:
                return None
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

        up, down = joined(self.mlp.up, "weight"), joined((self.mlp.down,), "weight")
        assert up is not None
        assert down is not None
        return ExpertParameters(up, down, joined(self.mlp.up, "bias"), joined((self.mlp.down,), "bias"))

    def _call(self, hidden: Tensor, weights: Tensor, dispatched: Dispatch) -> Tensor:
        slices = {name: getattr(self, name).unbind(0) for name in self.paths}

        def call(number: int, rows: Tensor) -> Any:
            own = {path: slices[name][number] for name, paths in self.paths.items() for path in paths}
            return torch.func.functional_call(self.expert, own, (rows,))

        calls = [partial(call, number) for number in range(self.num_local_experts)]
        return call_one_by_one(calls, hidden, weights, dispatched)

    def extra_repr(self) -> str:
        how = "called one by one" if self.mlp is None else f"fused, activation={self.mlp.activation}"
        return f"{self.num_local_experts} of {self.num_experts}, {how}"


def _without_dropout(expert: nn.Module) -> nn.Module:
    """Return a copy without dropouts, to see what the expert computes without them."""
    trial = copy.deepcopy(expert)
    for module in list(trial.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Identity())
    return trial
