"""Experts, and DeepSpeed's layer beside ours with the same weights, for the tests of moe_triton.compat.deepspeed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import deepspeed.moe.layer as upstream_layer
import torch
import torch.nn.functional as F
from deepspeed.utils import logger
from torch import Tensor, nn

from moe_triton.compat.deepspeed import layer as our_layer

logger.setLevel(logging.ERROR)  # a line for every layer that is made

D, N = 16, 24


class Mlp(nn.Module):
    """Linear, gelu, Linear by functions: fused."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, N), nn.Linear(N, D)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.gelu(self.up(x)))


class Gated(nn.Module):
    """transformers' gated MLP, without biases: fused."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, N, bias=bias), nn.Linear(D, N, bias=bias)
        self.down_proj = nn.Linear(N, D, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Tanh(Mlp):
    """An activation that we have not, and a tuple: called one by one."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down(torch.tanh(self.up(x))), None


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, N), nn.ReLU(), nn.Linear(N, D))


def linear() -> nn.Linear:
    """One matrix: called one by one."""
    return nn.Linear(D, D)


EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "Mlp": Mlp,
    "Gated": Gated,
    "Tanh": Tanh,
    "sequential": sequential,
    "linear": linear,
}


def pair(expert: Callable[[], nn.Module] = Mlp, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    """[DeepSpeed's layer, ours], built from one seed, then given the same weights, in which all experts differ."""
    layers = []
    for module in (upstream_layer, our_layer):
        torch.manual_seed(11)
        layer = module.MoE(D, expert(), **options)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        layers.append(layer.to(dtype))
    return layers


def run(layer: nn.Module, x: Tensor, used_token: Tensor | None = None) -> dict[str, Tensor]:
    """A seeded forward and backward: outputs and gradients by name."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(13)
    output, l_aux, exp_counts = layer(x, used_token)
    layer.zero_grad()
    target = torch.linspace(-1, 1, output.numel()).view_as(output)
    ((output.float() * target).sum() + l_aux).backward()
    found = {"output": output, "l_aux": l_aux, "exp_counts": exp_counts, "next draw": torch.rand(4), "d x": x.grad}
    return found | {f"d {name}": parameter.grad for name, parameter in layer.named_parameters()}
