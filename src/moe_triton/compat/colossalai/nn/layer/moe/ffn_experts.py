"""Colossal-AI's feed-forward experts: whole ones on some ranks each, or a slice of every one on each rank."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton import layers
from moe_triton.checks import check_int, check_number
from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT, MoeParallelInfo
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.compat.colossalai.context.random import expert_seeds, generators_seeded, seed
from moe_triton.compat.colossalai.nn.layer.moe.base import Capacity, MoeExperts
from moe_triton.compat.opaque import call_one_by_one
from moe_triton.distributed.exchange.overlap import Deferred
from moe_triton.integrations.transformers import pointwise_name
from moe_triton.layers.experts import Uncast, uncast
from moe_triton.records import Dispatch


class FFNExperts(layers.Experts, MoeExperts):
    """E MLPs with biases as stacked parameters: `moe_triton.Experts` with Colossal-AI's start and dropout.

    w1 [local, d, f], b1 [local, 1, f], w2 [local, f, d] and b2 [local, 1, d] are views of the parameters gate_up_proj
    [local, f, d], gate_up_proj_bias, down_proj [local, d, f] and down_proj_bias. They start as a normal distribution,
    cut off at 2, with std sqrt(0.1 / d) for w1 and b1 and sqrt(0.1 / f) for w2 and b2.

    Args:
        num_experts: E.
        d_model, d_ff: d and f.
        activation: a Module; None is nn.GELU(). One that our products do not know makes the experts run one by one.
        drop_rate: dropout after the activation and after w2; while it is active the experts run one by one.
        backend, device, dtype: as of `moe_triton.Experts`.
    """

    gate_up_proj_bias: nn.Parameter
    down_proj_bias: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        activation: Any = None,
        drop_rate: float = 0,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_number("drop_rate", drop_rate, low=0)
        num_local, info = self.place(num_experts)
        known = "gelu" if activation is None else pointwise_name(activation)
        # where the activation itself is called, any ungated name gives the right shapes
        super().__init__(
            d_model, d_ff, num_experts, activation=known or "relu", bias=True, expert_parallel=info.parallel,
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.num_local_experts = num_local
        self.act = nn.GELU() if activation is None else activation
        self.drop_rate = float(drop_rate)
        self.is_known = known is not None
        self.bind(info)

    @staticmethod
    def place(num_experts: int) -> tuple[int, MoeParallelInfo]:
        """Return (number of experts here, where they are)."""
        return MOE_CONTEXT.get_info(num_experts)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the local experts, each by its global id."""
        d, f = self.down_proj.shape[1], self.intermediate_size
        slices, rank = self.parallel_slices
        seeds = expert_seeds()
        std_1, std_2 = math.sqrt(0.1 / d), math.sqrt(0.1 / f)
        wanted = (  # parameter, shape, std, and the dimension that slices split
            (self.gate_up_proj, (f, d), std_1, 0),
            (self.gate_up_proj_bias, (f,), std_1, 0),
            (self.down_proj, (d, f), std_2, 1),
            (self.down_proj_bias, (d,), std_2, None),
        )
        for place, number in enumerate(self.local_experts):
            with generators_seeded(seeds(number)):
                for parameter, shape, std, dim in wanted:
                    whole = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
                    nn.init.trunc_normal_(whole, std=std)
                    parameter[place] = whole if dim is None else whole.chunk(slices, dim=dim)[rank]
        self.reset_lora()

    def add_lora(self, *args: Any, **options: Any) -> None:
        """Add adapters as `Experts.add_lora` does. Raises ValueError for experts that run one by one."""
        if self.drop_rate > 0 or not self.is_known:
            raise ValueError(
                f"add_lora: got drop_rate={self.drop_rate} and activation {type(self.act).__name__}, wanted experts "
                "that run fused: no dropout, and an activation that moe_mlp knows"
            )
        super().add_lora(*args, **options)
        self.mark()

    @property
    def parallel_slices(self) -> tuple[int, int]:
        """Return (slices of each expert, which of them is here)."""
        parallel = self.expert_parallel
        return (1, 0) if parallel is None else (parallel.etp.size, parallel.etp.rank)

    @property
    def w1(self) -> Tensor:
        return self.gate_up_proj.mT

    @property
    def b1(self) -> Tensor:
        return self.gate_up_proj_bias[:, None]

    @property
    def w2(self) -> Tensor:
        return self.down_proj.mT

    @property
    def b2(self) -> Tensor:
        return self.down_proj_bias[:, None]

    @property
    def is_fused(self) -> bool:
        """Return whether the experts, in the present mode, run fused."""
        return self.is_known and not (self.training and self.drop_rate > 0)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_weights: Tensor | Uncast,
        dispatched: Dispatch,
        *,
        capacity: Capacity = lambda num_tokens: None,
        overlap_with: Deferred | None = None,
    ) -> Tensor:
        """Do as `Experts.forward`."""
        if self.is_fused:
            return super().forward(
                hidden_states, top_k_weights, dispatched, capacity=capacity, overlap_with=overlap_with
            )
        call = self.opaque_call(self._call, hidden_states, uncast(top_k_weights), dispatched)
        return self.compute(call, capacity)

    def _call(self, hidden: Tensor, weights: Tensor, dispatched: Dispatch) -> Tensor:
        size, rank = self.parallel_slices
        parameters = self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias
        slices = [parameter.unbind(0) for parameter in parameters]
        # the slices of an expert's output are summed, so they have to drop the same elements
        last = ParallelMode.TENSOR if size == 1 else ParallelMode.GLOBAL

        def call(number: int, rows: Tensor) -> Tensor:
            w1, b1, w2, b2 = (parts[number] for parts in slices)
            hidden = self.act(F.linear(rows, w1, b1))
            with seed(ParallelMode.TENSOR):
                hidden = F.dropout(hidden, self.drop_rate, self.training)
            # only one of several slices adds the bias, but all of them have its gradient
            out = F.linear(hidden, w2) + (b2 if rank == 0 else b2 - b2.detach())
            with seed(last):
                return F.dropout(out, self.drop_rate, self.training)

        return call_one_by_one([partial(call, i) for i in range(len(slices[0]))], hidden, weights, dispatched)


class TPExperts(FFNExperts):
    """`FFNExperts` for an E that the ranks cannot share: each rank has 1 / max_ep_size of every expert's d_ff.

    Tokens are gathered, and the partial outputs are summed where they come from; b2, whole on every rank, counts once.

    Raises:
        ValueError: d_ff is not a multiple of max_ep_size.
    """

    comm_name = "all_gather"

    @staticmethod
    def place(num_experts: int) -> tuple[int, MoeParallelInfo]:
        """Return (number of experts here, which is all, and who has the other slices)."""
        check_int("num_experts", num_experts, low=1)
        return num_experts, MOE_CONTEXT.get_slices()
