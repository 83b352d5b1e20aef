"""The containers of expert weights, and the dense MLP with the same activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_triton.checks import check_choice, check_int
from moe_triton.experts import run_experts
from moe_triton.records import ACTIVATIONS, GATED, Dispatch, ExpertSpec
from moe_triton.reference import activate


class Experts(nn.Module):
    """E expert MLPs as plain stacked parameters in the transformers layout.

    gate_up_proj [E, 2n, d] ([E, n, d] for an ungated activation), down_proj [E, d, n], and with `bias`
    gate_up_proj_bias [E, 2n] and down_proj_bias [E, d]. Each expert starts like an `nn.Linear` pair.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        recompute: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, low=1)
        check_int("intermediate_size", intermediate_size, low=1)
        check_int("num_experts", num_experts, low=1)
        check_choice("activation", activation, ACTIVATIONS)
        self.spec = ExpertSpec(activation=activation)
        self.recompute = recompute
        self.backend = backend
        rows = 2 * intermediate_size if activation in GATED else intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(num_experts, rows, hidden_size)
        self.down_proj = parameter(num_experts, hidden_size, intermediate_size)
        self.gate_up_proj_bias = parameter(num_experts, rows) if bias else None
        self.down_proj_bias = parameter(num_experts, hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight, bias in ((self.gate_up_proj, self.gate_up_proj_bias), (self.down_proj, self.down_proj_bias)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, hidden_states: Tensor, top_k_weights: Tensor, plan: Dispatch) -> Tensor:
        """hidden_states [T, d], top_k_weights [T, K], a Dispatch -> [T, d]."""
        return run_experts(
            hidden_states,
            top_k_weights,
            plan,
            self.gate_up_proj,
            self.down_proj,
            self.gate_up_proj_bias,
            self.down_proj_bias,
            self.spec,
            recompute=self.recompute,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        num_experts, hidden_size, intermediate_size = self.down_proj.shape
        return f"{num_experts} x ({hidden_size}, {intermediate_size}), activation={self.spec.activation}"


class FeedForward(nn.Module):
    """One dense MLP with an expert's layout: gate_up_proj Linear(d, 2n or n), activation, down_proj Linear(n, d)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("intermediate_size", intermediate_size, low=1)
        check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        rows = 2 * intermediate_size if activation in GATED else intermediate_size
        self.gate_up_proj = nn.Linear(hidden_size, rows, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        hidden = self.gate_up_proj(hidden_states)
        return self.down_proj(activate(hidden, self.activation))
