"""One small routed block of every family whose experts have transformers' interface."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.experts_classes import MODELS, TinyConfig, classes_by_decorator, experts_class
from tests.helpers.experts_modules import D, E, K, N

EXPERTS = classes_by_decorator()[0]
SIZES = {
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "top_k_experts"], K),
    "n_group": 3,
    "topk_group": 2,
    "shared_expert_intermediate_size": N,
}


def router_and_block(name: str) -> tuple[list[str], str]:
    """The classes of the routers beside the experts class "family.Class", and of the block that holds both."""
    family, _, experts = name.partition(".")
    text = (MODELS / family / f"modeling_{family}.py").read_text()
    for source in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
        if f"= {experts}(" in source:
            assigned = re.search(r"self\.(?:gate|router) = ([^\n]*)", source)
            assert assigned, f"{name}: no router beside it"
            return re.findall(r"(\w+)\(", assigned[1]), re.split(r"\W", source, maxsplit=1)[0]
    raise AssertionError(f"{name}: no block")


class Pair(nn.Module):
    """A router and experts, for a family whose block is a whole decoder layer."""

    def __init__(self, router: nn.Module, experts: nn.Module):
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, 1)
        _, weights, ids = self.router(x)
        return self.experts(x, ids, weights).view_as(hidden_states)


def call_with_known(cls: Callable[..., nn.Module], config: TinyConfig) -> nn.Module:
    names = list(inspect.signature(cls.__init__).parameters)[1:]
    known = {"config": config, "layer_idx": 0, "intermediate_size": None}
    return cls(*(known[name] for name in names if name in known))


def tiny_block(name: str, **changes: Any) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """The block around an experts class, hidden states [2, 5, D], and what else its forward takes."""
    family = name.partition(".")[0]
    config = TinyConfig(family)
    for key, value in (SIZES | changes).items():
        setattr(config, key, value)
    routers, block_name = router_and_block(name)
    if block_name.endswith("Layer"):
        (router,) = (call_with_known(experts_class(f"{family}.{cls}"), config) for cls in routers)
        block: nn.Module = Pair(router, experts_class(name)(config))
    else:
        block = call_with_known(experts_class(f"{family}.{block_name}"), config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
        for buffer in block.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(-0.2, 0.2)
            else:
                buffer.copy_(torch.rand(len(buffer), E).argsort(-1)[:, : buffer.shape[1]])  # a table of experts
    takes_ids = "input_ids" in inspect.signature(block.forward).parameters
    extra = {"input_ids": torch.randint(0, 8, (2, 5))} if takes_ids else {}
    return block.float(), torch.randn(2, 5, D), extra
