"""The experts of DeepSpeed's AutoEP on our kernels: `GroupedExperts`, which gets its rows in the order of the experts.

AutoEP (deepspeed 0.19) turns the MoE blocks of a transformers model into layers that exchange tokens over ranks; their
experts are whole stacked weights w1 [E, n, d] (gate), w3 [E, n, d] (up) and w2 [E, d, n] (down).
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.experts import moe_mlp

# DeepSpeed's names -> ours, and which of its scalars they read
ACTIVATIONS = {
    "swiglu": ("swiglu", ()),
    "geglu_tanh": ("geglu_tanh", ()),
    "swiglu_clamped": ("swiglu", ("activation_limit",)),
    "swiglu_oai": ("gpt_oss", ("activation_limit", "activation_alpha")),
}


def obstacle(module: Any) -> str | None:
    """Return why a GroupedExperts cannot run on ours, or None."""
    upstream = sys.modules["deepspeed.moe.ep_experts"].GroupedExperts
    if type(module) is not upstream and not isinstance(module, _OnOurs):
        return f"got {type(module).__name__}, wanted DeepSpeed's GroupedExperts itself"
    if "forward" in vars(module):
        return "has a forward of its own, which ours would not run"
    if module.activation not in ACTIVATIONS:
        return f"activation: got {module.activation!r}, wanted one of {', '.join(ACTIVATIONS)}"
    return None


def use_ours(module: Any, backend: str) -> None:
    """Let a GroupedExperts compute on ours, in place: parameters, hooks and names stay."""
    if not isinstance(module, _OnOurs):
        cls: Any = type(module)
        module.__class__ = _class_of_ours(cls)
    module.moe_triton_backend = backend


class _OnOurs(nn.Module):
    """What is mixed into DeepSpeed's class."""

    moe_triton_backend: str

    def forward(self: Any, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """Compute each row by its expert: x [R, d] in the order of the experts, counts [E] -> [R, d].

        Rows past the sum of the counts, which pad x, give zeros. No host sync.
        """
        name, scalars = ACTIVATIONS[self.activation]
        ends = num_tokens_per_expert.cumsum(0)
        rows = torch.arange(x.shape[0], device=x.device)
        ids = torch.searchsorted(ends, rows, right=True)  # E for the rows past the end: skipped
        gate, up, down = (weight.to(x.dtype) for weight in (self.w1, self.w3, self.w2))
        return moe_mlp(
            x,
            ids[:, None],
            torch.ones(x.shape[0], 1, dtype=x.dtype, device=x.device),
            torch.cat([gate, up], 1),
            down,
            activation=name,
            **{scalar: getattr(self, scalar) for scalar in scalars},
            backend=self.moe_triton_backend,
        )


@cache
def _class_of_ours(cls: Any) -> type[nn.Module]:
    return type(cls.__name__, (_OnOurs, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
