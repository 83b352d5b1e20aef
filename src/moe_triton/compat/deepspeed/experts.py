"""DeepSpeed's container of experts: any module, one per local expert, with DeepSpeed's state-dict keys.

Experts that are MLPs (`mlps`) run fused, from their own parameters; any other module is called on its rows.
Shapes: R rows of tokens, K choices, d hidden size, n expert intermediate size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.checks import check_int
from moe_triton.compat.deepspeed import groups
from moe_triton.compat.mlps import MLP, is_tampered, recognise
from moe_triton.compat.opaque import call_one_by_one, compute_experts
from moe_triton.distributed import ExpertParallel
from moe_triton.distributed.exchange.opaque_experts import OpaqueCall
from moe_triton.distributed.exchange.stages import ExchangedLayer
from moe_triton.records import Dispatch, ExpertCall, ExpertParameters, ExpertSpec


class Experts(nn.Module):
    """`num_local_experts` copies of `expert`, equal at the start.

    Every parameter carries what DeepSpeed and the optimizer's grouping look for: `allreduce` = False, `group_name` (the
    key of its process group), `layer_name` and `expert_number` (the expert's place among this rank's experts).

    Args:
        expert: any Module that maps [..., d] to [..., d], or to a tuple whose element 0 is that.
        num_local_experts: experts of this rank.
        expert_group_name: key of the process group, "ep_size_N".
        layer_name: the layer's name among the optimizer's groups.
        backend: "auto", "triton", "torch" or "reference", for the fused path.
    """

    def __init__(
        self,
        expert: nn.Module,
        num_local_experts: int = 1,
        expert_group_name: str | None = None,
        layer_name: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(expert, nn.Module):
            raise TypeError(f"expert: got {type(expert).__name__}, wanted a torch.nn.Module")
        check_int("num_local_experts", num_local_experts, low=1)
        self.expert_group_name = expert_group_name
        self.layer_name = layer_name
        self.message_name = "MoE layer"  # in the exchange's messages; numbered when the layer is bound to its groups
        self.backend = backend
        self.adopt(nn.ModuleList([copy.deepcopy(expert) for _ in range(num_local_experts)]), recognise(expert))
        self.register_load_state_dict_pre_hook(_take_own_experts)
        self.register_load_state_dict_post_hook(_prepare_after_loading)

    def adopt(self, experts: nn.ModuleList, mlp: MLP | None) -> None:
        """Take these modules, parameters and all, as the local experts; `mlp` is what they all compute, if known."""
        self.deepspeed_experts = experts
        self.num_local_experts = len(experts)
        self.mlp = mlp
        self.kinds = _kinds(experts[0])
        self.prepare()

    def forward(
        self,
        hidden_states: Tensor,
        weights: Tensor,
        dispatched: Dispatch,
        *,
        expert_parallel: ExpertParallel | None = None,
        capacity: Callable[[int], int | None] = lambda num_tokens: None,
    ) -> Tensor:
        """hidden_states [S, d], weights [S, K] and a Dispatch to all experts -> weighted sums [S, d].

        `capacity` (tokens -> places of an expert) is for an `expert_parallel`, over whose ranks the experts are spread.
        """
        num_experts = self.num_local_experts * (1 if expert_parallel is None else expert_parallel.ep.size)
        layer = ExchangedLayer(
            name=self.message_name,
            num_experts=num_experts,
            backend=self.backend,
            capacity=capacity,
            held=self.parameters,
        )
        return compute_experts(self._call(hidden_states, weights, dispatched), expert_parallel, layer)

    def _call(self, hidden_states: Tensor, weights: Tensor, dispatched: Dispatch) -> ExpertCall | OpaqueCall:
        linears = self._linears()
        if linears is None or self.mlp is None:
            experts = list(self.deepspeed_experts)
            return OpaqueCall(
                hidden=hidden_states,
                weights=weights,
                dispatched=dispatched,
                name=type(experts[0]).__name__,
                compute=partial(call_one_by_one, experts),
                parameters=list(self.parameters()),
                num_experts=self.num_local_experts,
            )
        gate_up_biases = down_biases = None
        if linears[0][0].bias is not None:
            gate_up_biases = [_joined([up.bias for up in ups]) for *ups, _ in linears]
        if linears[0][-1].bias is not None:
            down_biases = [down.bias for *_, down in linears]
        gate_ups = [_joined([up.weight for up in ups]) for *ups, _ in linears]
        downs = [down.weight for *_, down in linears]
        return ExpertCall(
            hidden=hidden_states,
            weights=weights,
            dispatched=dispatched,
            parameters=ExpertParameters(gate_ups, downs, gate_up_biases, down_biases),
            spec=ExpertSpec(activation=self.mlp.activation),
        )

    def _linears(self) -> list[list[Any]] | None:
        """Return every expert's Linears; None when the experts are no MLPs, or have been changed."""
        if self.mlp is None:
            return None
        found = []
        for expert in self.deepspeed_experts:
            if _kinds(expert) != self.kinds or is_tampered(expert):
                return None
            linears = [_submodule(expert, name) for name in self.mlp.linears]
            if any(type(linear) is not nn.Linear or is_tampered(linear) for linear in linears):
                return None
            found.append(linears)
        return found

    @torch.no_grad()
    def prepare(self) -> None:
        """Mark the parameters, and put gate beside up in memory, so that one product reads both without a copy.

        Repeat it after what may make new parameters: `.to`, copying, unpickling, loading with assign=True.
        """
        for number, expert in enumerate(self.deepspeed_experts):
            for parameter in expert.parameters():
                marks = {
                    "allreduce": False,
                    "group_name": self.expert_group_name,
                    "layer_name": self.layer_name,
                    "expert_number": number,
                }
                for name, value in marks.items():
                    setattr(parameter, name, value)
        for linears in self._linears() or []:
            ups = linears[:-1]
            for parameters in ([up.weight for up in ups], [up.bias for up in ups]):
                # parameters in a shared storage (an optimizer's flat buffer) stay where they are
                if parameters[0] is not None and _adjacent(parameters) is None and all(map(_owns_storage, parameters)):
                    whole = torch.cat([parameter.data for parameter in parameters])
                    for parameter, half in zip(parameters, whole.chunk(2), strict=True):
                        parameter.data = half

    def _apply(self, fn: Any, recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()  # a copied or unpickled Parameter has lost its attributes

    def extra_repr(self) -> str:
        return f"{self.num_local_experts} local experts, " + (
            "called one by one" if self.mlp is None else f"fused, activation={self.mlp.activation}"
        )


def _take_own_experts(experts: Experts, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Keep only this rank's experts, by local numbers, of a state dict with all of the group's experts.

    DeepSpeed would give the first experts to every rank (DeepSpeed #6589).
    """
    start = f"{prefix}deepspeed_experts."
    keys = {key: key[len(start) :].split(".", 1) for key in state_dict if key.startswith(start)}
    num_local = experts.num_local_experts
    num_given = len({number for number, _ in keys.values()})
    if num_given <= num_local or experts.expert_group_name is None:
        return
    if num_given != num_local * groups.get_expert_parallel_world_size(experts.expert_group_name):
        return  # torch's error names the unexpected keys
    first = num_local * groups.get_expert_parallel_rank(experts.expert_group_name)
    own = {}
    for key, (number, rest) in keys.items():
        value = state_dict.pop(key)
        if first <= int(number) < first + num_local:
            own[f"{start}{int(number) - first}.{rest}"] = value
    state_dict.update(own)


def _prepare_after_loading(experts: Experts, _incompatible_keys: object) -> None:
    experts.prepare()


def _kinds(expert: nn.Module) -> tuple[type, ...]:
    """Return the classes of an expert and of its parts."""
    return (type(expert), *map(type, expert._modules.values()))


def _submodule(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _joined(parts: list[Tensor]) -> Tensor:
    """Return all rows of one or two tensors; a view, when `prepare` or an optimizer placed them side by side."""
    if len(parts) == 1:
        return parts[0]
    if torch.compiler.is_compiling() or _adjacent(parts) is None:
        return torch.cat(parts)
    return _SideBySide.apply(*parts)


def _owns_storage(parameter: Tensor) -> bool:
    return parameter.device.type != "meta" and parameter.untyped_storage().nbytes() == parameter.nbytes


def _adjacent(parts: list[Tensor]) -> Tensor | None:
    """Return the view of both tensors when the second begins where the first ends; a single tensor needs none."""
    first, *rest = (part.detach() for part in parts)
    if not rest:
        return first
    (second,) = rest
    if (
        first.device.type == "meta"
        or not (first.is_contiguous() and second.is_contiguous())
        or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
        or first.storage_offset() + first.numel() != second.storage_offset()
        or first.dtype != second.dtype
    ):
        return None
    return first.as_strided((2 * first.shape[0], *first.shape[1:]), first.stride())


class _SideBySide(torch.autograd.Function):
    """cat of two tensors that lie side by side, as a view; so are the gradients."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        whole = _adjacent([first, second])
        assert whole is not None
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0].chunk(2)
