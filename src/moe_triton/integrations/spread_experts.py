"""A transformers model's experts over ranks: every rank keeps its own, and passes its own batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.dispatch import chosen_experts
from moe_triton.distributed.exchange.expert_parallel import ExpertParallel
from moe_triton.distributed.exchange.opaque_experts import OpaqueCall, exchange_opaque
from moe_triton.distributed.exchange.stages import ExchangedLayer
from moe_triton.distributed.holders import StackedExperts
from moe_triton.integrations.experts_interface import KEY, implementation
from moe_triton.layers.experts import ScaleGradient
from moe_triton.records import ExpertCall, Lora, Projection

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
UP = ("gate_up_proj", "up_proj")


class SpreadExperts(StackedExperts):
    """What `spread` mixes into the class of an experts module.

    `num_experts` is that of all ranks, as before; the projections are those of `local_experts`.
    """

    casts_inputs = True
    layer_name: str
    expert_names: tuple[str, ...]  # of the parameters that have an expert in each row
    is_transposed: bool
    is_concatenated: bool
    has_gate: bool

    def held_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for name in self.expert_names if (parameter := self._parameters.get(name)) is not None)

    def is_sliced(self, parameter: nn.Parameter) -> bool:
        return any(parameter is self._parameters.get(name) for name in self.sliced_dimensions)

    @property
    def sliced_dimensions(self) -> Mapping[str, tuple[int, int]]:
        return sliced_dimensions(self, self.expert_names)

    @property
    def exchanged_layer(self) -> ExchangedLayer:
        return ExchangedLayer(
            name=self.layer_name,
            num_experts=self.num_experts,
            backend=getattr(self, "moe_triton_backend", "auto"),
            held=self.held_parameters,
        )


def sliced_dimensions(module: Any, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return what expert tensor parallelism slices of an experts module: parameter -> (dimension, parts)."""
    # gate and up that alternate are cut as one: every piece has some of both
    parts = 2 if module.has_gate and module.is_concatenated else 1
    up, down = (2, 1) if module.is_transposed else (1, 2)
    found = {"down_proj": (down, 1)}
    for name in UP:
        found |= {name: (up, parts), f"{name}_bias": (1, parts)}
    return {name: how for name, how in found.items() if name in names}


@torch.no_grad()
def spread(module: Any, parallel: ExpertParallel, names: Sequence[str]) -> None:
    """Keep this rank's experts of a module, in place; the memory of the others is free after.

    Args:
        module: an experts module of transformers' interface with all experts, in memory or on the meta device.
        parallel: over which ranks.
        names: of the parameters [E, ...].

    Raises:
        ValueError: a rank would have no expert; sizes that the expert slices do not divide. Nothing is changed then.
    """
    num_experts = module._parameters[names[0]].shape[0]
    mine, etp, sliced = parallel.experts_of(num_experts), parallel.etp, sliced_dimensions(module, names)
    made = {}
    for name in names:
        whole = module._parameters[name]
        part = whole.detach()[mine.start : mine.stop]
        if etp.size > 1 and name in sliced:
            dim, parts = sliced[name]
            size = part.shape[dim] // (2 if module.has_gate and name != "down_proj" else 1)
            if size % etp.size:
                raise ValueError(f"{name}: got experts of {size} columns, wanted a multiple of the {etp.size} slices")
            part = torch.cat([piece.chunk(etp.size, dim)[etp.rank] for piece in part.chunk(parts, dim)], dim)
        made[name] = nn.Parameter(part.clone(), requires_grad=whole.requires_grad)
    module._parameters.update(made)
    module.num_experts, module.expert_names, module.expert_parallel = num_experts, tuple(names), parallel
    module.layer_name, module.gradient_scale = parallel.new_layer(), 1.0
    cls: Any = type(module)
    module.__class__ = _spread_class(cls)


@lru_cache(maxsize=256)
def _spread_class(cls: Any) -> type[nn.Module]:
    """The class of the same name whose experts are spread, and which runs on ours only."""

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (found := implementation(self)) != KEY:
            raise ValueError(
                f"experts_implementation: got {found!r} with experts over ranks, wanted {KEY!r}; no other knows where "
                "they are"
            )
        return cls.forward(self, *args, **kwargs)

    members = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (SpreadExperts, cls), members)


def scaled(module: nn.Module, tensor: Projection | None) -> Any:
    """Return a parameter whose gradient is multiplied by the module's `gradient_scale`, which `apply_fsdp2` sets."""
    scale = getattr(module, "gradient_scale", None) or 1.0
    return ScaleGradient.apply(tensor, scale) if scale != 1.0 and isinstance(tensor, Tensor) else tensor


def compute_over_ranks(
    module: Any, call: ExpertCall, parallel: ExpertParallel, compute: Compute, adapters: Sequence[Lora]
) -> Tensor:
    """Return the experts' outputs [T, d] for this rank's tokens by a function of rows.

    compute: (rows [R, d], ids [R, J] of local experts or -1, weights [R, J]) -> [R, d], of the call's parameters, of
    the adapters, and of what else the module holds.
    """
    projections = [tensor for tensor in call.parameters if isinstance(tensor, Tensor)]
    held = set(module.exchanged_layer.held())
    others = [parameter for parameter in module.parameters() if parameter not in held]
    opaque = OpaqueCall(
        hidden=call.hidden,
        weights=call.weights,
        dispatched=call.dispatched,
        name=f"{type(module).__module__}.{type(module).__qualname__}",
        compute=lambda rows, weights, dispatched: compute(rows, chosen_experts(dispatched), weights),
        parameters=[*projections, *(factor for lora in adapters for factor in (lora.a, lora.b)), *others],
        num_experts=len(call.parameters.gate_up),
    )
    return exchange_opaque(opaque, parallel, module.exchanged_layer)
