"""Colossal-AI's MoE layers: a gate, a router and experts, the last two of which layers may share.

Shapes: S tokens of this rank, d hidden size, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton import losses
from moe_triton.checks import FLOATS, check_choice, check_int, check_number, check_tensor
from moe_triton.compat.colossalai.context.moe_context import GENERATIONS, MOE_CONTEXT
from moe_triton.compat.colossalai.nn.layer.moe.experts import Experts, MoeExperts
from moe_triton.compat.colossalai.nn.layer.moe.routers import MoeRouter, Top1Router, Top2Router
from moe_triton.compat.colossalai.nn.layer.moe.utils import NormalNoiseGenerator, UniformNoiseGenerator
from moe_triton.records import Routing
from moe_triton.reference import wide
from moe_triton.torch_internals import recomputing

NOISY_POLICIES = (None, "Jitter", "Gaussian")


class FP32LinearGate(nn.Linear):
    """v0.1.6's gate: a Linear without bias whose weight stays float32 when the model is cast to a narrower dtype.

    The weight starts from a normal distribution with std sqrt(scale / d), cut off at 2 (`trunc_normal_`).
    """

    def __init__(self, d_model: int, num_experts: int, scale: float = 0.1) -> None:
        check_number("scale", scale, above=0)
        super().__init__(d_model, num_experts, bias=False)
        nn.init.trunc_normal_(self.weight, std=math.sqrt(scale / d_model))

    def _apply(self, fn: Any, recurse: bool = True) -> FP32LinearGate:
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(moved.device)

        super()._apply(kept, recurse)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """[S, d] -> [S, E] in fp32 (fp64 for fp64 weights), also under autocast."""
        return wide_linear(self, input)


def wide_linear(gate: nn.Linear, x: Tensor) -> Tensor:
    """Compute a Linear in fp32 (fp64 for fp64 weights), also under autocast."""
    dtype = wide(gate.weight.dtype)
    bias = None if gate.bias is None else gate.bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), gate.weight.to(dtype), bias)


class MoeLayer(nn.Module):
    """gate -> router -> experts. Returns the output; the auxiliary loss is in the MoE context, for `MoeLoss`.

    The gate is the layer's own and computes in fp32 (fp64 for fp64 weights): an nn.Linear with bias in v0.0.2, an
    `FP32LinearGate` in v0.1.6.

    The loss of a forward is E / K * sum_e (share of the assignments wanted of e) * (mean probability of e), before
    anything is dropped, over the tokens of all ranks: the shares of the ranks average to it.

    Args:
        dim_model: d.
        num_experts: E.
        router: `Top1Router` or `Top2Router`.
        experts: `Experts`, `FFNExperts` or `TPExperts`.
        generation: whose gate; None is the router's.

    Raises:
        ValueError, TypeError: the parts do not fit, by name.
    """

    def __init__(
        self,
        dim_model: int,
        num_experts: int,
        router: MoeRouter,
        experts: MoeExperts,
        *,
        generation: str | None = None,
    ) -> None:
        super().__init__()
        check_int("dim_model", dim_model, low=1)
        check_int("num_experts", num_experts, low=1)
        if not isinstance(router, MoeRouter):
            raise TypeError(f"router: got {type(router).__name__}, wanted a Top1Router or a Top2Router")
        if not isinstance(experts, MoeExperts):
            raise TypeError(f"experts: got {type(experts).__name__}, wanted Experts, FFNExperts or TPExperts")
        if experts.num_experts != num_experts:
            raise ValueError(f"experts: got {experts.num_experts} of them, wanted num_experts={num_experts}")
        if router.top_k > num_experts:
            raise ValueError(f"num_experts: got {num_experts}, wanted at least the router's {router.top_k} choices")
        generation = router.generation if generation is None else generation
        check_choice("generation", generation, GENERATIONS)
        self.d_model = dim_model
        self.num_experts = num_experts
        is_first = generation == "v0.0.2"
        self.gate = nn.Linear(dim_model, num_experts) if is_first else FP32LinearGate(dim_model, num_experts)
        self.router = router
        self.experts = experts

    def logits(self, x: Tensor) -> Tensor:
        """[S, d] -> [S, E] in fp32 (fp64 for fp64 weights), also under autocast."""
        return wide_linear(self.gate, x)

    @property
    def num_local_experts(self) -> int:
        """Return the number of experts of this rank."""
        return self.experts.num_local_experts

    @property
    def ep_size(self) -> int:
        """Return ranks that share the experts."""
        return self.experts.dist_info.ep_size

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        """Return the process group of these ranks; None without torch.distributed."""
        return self.experts.dist_info.ep_group

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., d] -> [..., d]; zeros for a token that every one of its experts dropped."""
        check_tensor("inputs", inputs, dtypes=FLOATS)
        if inputs.dim() < 1 or inputs.shape[-1] != self.d_model:
            raise ValueError(f"inputs: got shape {list(inputs.shape)}, wanted [..., {self.d_model}]")
        x = inputs.reshape(-1, self.d_model)
        routed = self.router(self.logits(x))
        aux_loss = self.aux_loss(routed.routing)
        if not recomputing():  # activation checkpointing runs the forward again, but it has one loss
            MOE_CONTEXT.add_loss(aux_loss, self)
        out = self.experts(
            x,
            routed.routing.weights,
            routed.dispatched,
            capacity=lambda num_tokens: self.router.get_capacity((num_tokens, self.num_experts)),
        )
        return out.reshape(inputs.shape)

    def aux_loss(self, routing: Routing) -> Tensor:
        """Return this rank's share of the load-balance loss [], not weighted; the shares average to the global loss."""
        parallel = self.experts.parallel
        counts, num_tokens = parallel.global_counts(routing.counts, routing.num_tokens, "MoeLayer")
        loss = losses.load_balance_loss(counts, routing.score_sums, num_tokens, self.router.top_k)
        return loss * parallel.loss_scale


class MoeModule(nn.Module):
    """v0.1.6's MoE block: a `MoeLayer` with its router and experts, and with `use_residual` a dense expert beside it.

    Args:
        dim_model: d.
        num_experts: E.
        top_k: 1 or 2.
        capacity_factor_train, capacity_factor_eval, min_capacity, drop_tks: of the router.
        noisy_policy: None, "Jitter" (`UniformNoiseGenerator`) or "Gaussian" (`NormalNoiseGenerator`).
        use_residual: also run a dense expert, and mix the two by a learned softmax (PR-MoE, arXiv 2201.05596).
        residual_instance: that expert; None makes one of `expert_cls`.
        expert_instance: the experts; None makes `Experts(expert_cls, num_experts, **expert_args)`.
        expert_cls, expert_args: the class of an expert, and its arguments.

    Raises:
        ValueError, TypeError: an argument out of range or missing, by name.
    """

    def __init__(
        self,
        dim_model: int,
        num_experts: int,
        top_k: int = 1,
        capacity_factor_train: float = 1.25,
        capacity_factor_eval: float = 2.0,
        min_capacity: int = 4,
        noisy_policy: str | None = None,
        drop_tks: bool = True,
        use_residual: bool = False,
        residual_instance: nn.Module | None = None,
        expert_instance: MoeExperts | None = None,
        expert_cls: Any = None,
        **expert_args: Any,
    ) -> None:
        super().__init__()
        check_int("top_k", top_k, low=1, high=2)
        if noisy_policy not in NOISY_POLICIES:
            raise ValueError(f"noisy_policy: got {noisy_policy!r}, wanted one of None, 'Jitter', 'Gaussian'")
        if expert_cls is None and (expert_instance is None or (use_residual and residual_instance is None)):
            raise ValueError("expert_cls: got None, wanted a class of Modules where no instance is given")
        noisy_func: Any = None
        if noisy_policy is not None:
            noisy_func = UniformNoiseGenerator() if noisy_policy == "Jitter" else NormalNoiseGenerator(num_experts)
        router = (Top1Router if top_k == 1 else Top2Router)(
            capacity_factor_train=capacity_factor_train,
            capacity_factor_eval=capacity_factor_eval,
            min_capacity=min_capacity,
            noisy_func=noisy_func,
            drop_tks=drop_tks,
        )
        experts = Experts(expert_cls, num_experts, **expert_args) if expert_instance is None else expert_instance
        self.moe_layer = MoeLayer(dim_model, num_experts, router, experts)
        self.use_residual = use_residual
        if use_residual:
            self.residual_module = expert_cls(**expert_args) if residual_instance is None else residual_instance
            self.residual_combine = nn.Linear(dim_model, 2)

    @property
    def moe_router(self) -> MoeRouter:
        """Return the router of `moe_layer`."""
        return self.moe_layer.router

    @property
    def experts(self) -> MoeExperts:
        """Return the experts of `moe_layer`."""
        return self.moe_layer.experts

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        output = self.moe_layer(inputs)
        if self.use_residual:
            mix = F.softmax(self.residual_combine(inputs), dim=-1)
            output = output * mix[..., 0:1] + self.residual_module(inputs) * mix[..., 1:]
        return output
