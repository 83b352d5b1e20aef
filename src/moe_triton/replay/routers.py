"""The routers of a model whose choices can be recorded: ours, and those of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from moe_triton.integrations.experts_interface import registry
from moe_triton.integrations.transformers_routers import RoutedLayer, routed_layers
from moe_triton.layers import MoE, Router


@dataclass(frozen=True, kw_only=True, eq=False)
class ChoosingLayer:
    """A router that chooses `top_k` of `num_classes`; `foreign` where it is transformers'."""

    name: str
    index: int
    chooser: nn.Module
    num_classes: int
    top_k: int
    foreign: RoutedLayer | None


def layer_index(name: str) -> int:
    """Return the first number in a module's dotted name: of "model.layers.3.mlp.gate" 3. 0 where there is none."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[0]) if numbers else 0


def choosing_layers(model: nn.Module, index_of: Callable[[str], int | None]) -> list[ChoosingLayer]:
    """The routers that have an index, in the order of their layers."""
    routers: list[tuple[str, nn.Module, int, int, RoutedLayer | None]] = [
        (name, module, module.num_experts, module.top_k, None)
        for name, module in model.named_modules()
        if isinstance(module, Router)
    ]
    others = routed_layers(model)
    routers += [(x.chooser_name, x.chooser, x.num_classes, x.top_k, x) for x in others]
    with_router = {layer.experts for layer in others}
    for name, module in model.named_modules():
        is_own = isinstance(module, MoE) and not isinstance(module.router, Router)
        is_foreign = registry(module) is not None and module not in with_router
        if (is_own or is_foreign) and index_of(name) is not None:
            raise ValueError(
                f"{name or 'model'}: got a layer whose router is not known, wanted a moe_triton.Router or "
                f"a gate or router beside the experts; or leave it out by layers="
            )
    found: dict[int, ChoosingLayer] = {}
    for name, chooser, num_classes, top_k, foreign in routers:
        index = index_of(name)
        if index is None:
            continue
        if index in found:
            raise ValueError(
                f"layers: got index {index} for {found[index].name} and for {name}, wanted one of its own for each"
            )
        found[index] = ChoosingLayer(
            name=name, index=index, chooser=chooser, num_classes=num_classes, top_k=top_k, foreign=foreign
        )
    if not found:
        raise ValueError(
            "model: got one without a router that can be recorded, wanted a moe_triton.Router or a transformers model "
            "whose experts have its interface"
        )
    return [found[index] for index in sorted(found)]
