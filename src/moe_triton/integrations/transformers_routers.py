"""The routed layers of transformers' models: which module chooses the experts, of how many, and what it returns.

A layer is found by its experts module, whose class has transformers' experts interface. Whether `moe_triton.swap` has
been there does not matter, since the router is transformers' own either way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.integrations.experts_interface import registry

ROUTERS = ("gate", "router")  # what a block calls the module that chooses
NUM_EXPERTS = ("num_experts",)
NUM_CLASSES = ("num_router_classes", *NUM_EXPERTS)  # Zaya's router has one more class than there are experts: none
TOP_K = ("top_k", "top_k_experts")
PROBABILITIES = ("Gemma4TextRouter", "DiffusionGemmaTextRouter")  # return the softmax where the others return logits


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedLayer:
    """A routed layer of a transformers model.

    name, experts     the experts module, and its dotted name as without PEFT's wrappers
    router            the module that computes the logits
    chooser_name, chooser
                      the module in whose forward the experts are chosen: the router, or the block around it where the
                      router is only a linear map
    num_experts       E, over all ranks
    num_classes       what the router scores: E, or one more where the last class stands for no expert
    top_k             K
    """

    name: str
    experts: nn.Module
    router: nn.Module
    chooser_name: str
    chooser: nn.Module
    num_experts: int
    num_classes: int
    top_k: int


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """Find the layers of a transformers model whose experts have its interface, in the order of its modules.

    An experts module alone, without the block around it, has no router and is left out.

    Raises ValueError for a router that does not say how many experts it chooses, and of how many.
    """
    modules = dict(model.named_modules())
    found = []
    for inner_name, experts in modules.items():
        if registry(experts) is None:
            continue
        name = name_without_wrappers(inner_name)
        block_name = name.rpartition(".")[0]
        block = modules[block_name]
        router_name = next((key for key in ROUTERS if isinstance(getattr(block, key, None), nn.Module)), None)
        if router_name is None or name == "":
            continue
        wrapped = getattr(block, router_name)
        router = without_wrappers(wrapped)
        is_linear = type(router).forward is nn.Linear.forward
        full_name = f"{block_name}.{router_name}".lstrip(".")
        where = (block if is_linear else router, getattr(router, "config", None), getattr(experts, "config", None))
        found.append(
            RoutedLayer(
                name=name,
                experts=experts,
                router=wrapped,
                chooser_name=block_name if is_linear else full_name,
                chooser=block if is_linear else wrapped,
                num_experts=_first_int(NUM_EXPERTS, where, full_name),
                num_classes=_first_int(NUM_CLASSES, where, full_name),
                top_k=_first_int(TOP_K, where, full_name),
            )
        )
    return found


def router_scores(layer: RoutedLayer, output: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return (probabilities [T, E], logits [T, E] or None) in fp32 from what a router returned, or None.

    Most return (logits, weights, ids), GraniteMoE's of older releases (ids, weights, logits), Gemma's probabilities in
    place of the logits. The probabilities are the softmax, whatever a router makes its scores of.
    """
    values = output if isinstance(output, (tuple, list)) else (output,)
    scores = [x for x in values if isinstance(x, Tensor) and x.is_floating_point() and _is_over(x, layer.num_classes)]
    if not scores:
        return None
    ids_first = isinstance(values[0], Tensor) and not values[0].is_floating_point()
    first = scores[-1] if ids_first else scores[0]
    flat = first.detach().reshape(-1, layer.num_classes).float()
    if any(cls.__name__ in PROBABILITIES for cls in type(without_wrappers(layer.router)).__mro__):
        return flat, None
    return flat.softmax(-1), flat


def num_local_experts(experts: Any) -> int:
    """Return how many experts a module holds: under transformers' expert parallelism those of this rank."""
    return int(experts.num_experts if hasattr(experts, "num_experts") else experts.down_proj.shape[0])


def num_counted_experts(experts: Any, num_experts: int | None) -> int:
    """Return over how many experts the ids go that a module is called with; `num_experts`: of all ranks, if known.

    transformers gives a module that takes the tokens to other ranks the ids of all ranks (`ep_dispatch_experts`), and
    one that is called with a share of them those of its own experts.
    """
    dispatches = getattr(vars(experts).get("forward"), "__qualname__", "").startswith("EpDispatchExpertsParallel.")
    return num_experts if dispatches and num_experts is not None else num_local_experts(experts)


def name_without_wrappers(name: str) -> str:
    """Return the dotted name that a module had before PEFT wrapped it."""
    return re.sub(r"(\.base_layer)+$", "", name)


def num_tokens_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, torch.device]:
    """Return (T, device) of a call of a router or block, whose first tensor is the hidden states [..., d]."""
    hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    return hidden.shape[:-1].numel(), hidden.device


def _is_over(scores: Tensor, num_classes: int) -> bool:
    return scores.dim() > 1 and scores.shape[-1] == num_classes


def without_wrappers(module: Any) -> nn.Module:
    """Return the module that PEFT has wrapped in this one, or the module itself."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module


def _first_int(names: tuple[str, ...], objects: tuple[Any, ...], router: str) -> int:
    for thing in objects:
        for name in names:
            value = getattr(thing, name, None)
            if isinstance(value, int):
                return value
    raise ValueError(f"{router}: got a router without {' or '.join(names)}, wanted one that says it")
