"""DeepSpeed's MoE layer over our gating and experts: the mirror of `deepspeed.moe.layer`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton.checks import check_choice, check_int, check_tensor
from moe_triton.compat.deepspeed import groups, upstream
from moe_triton.compat.deepspeed.experts import Experts
from moe_triton.compat.deepspeed.gating import TopKGate
from moe_triton.distributed import ExpertParallel
from moe_triton.distributed.holders import ExpertHolder
from moe_triton.runtime import BACKENDS

_layer_numbers = itertools.count()


class MOELayer(ExpertHolder):
    """gate -> exchange -> experts -> exchange, with the loss and the counts of the last forward as attributes."""

    TRANSIENT = ("l_aux", "exp_counts", "expert_parallel")
    l_aux: Tensor | None = None
    exp_counts: Tensor | None = None

    def __init__(self, gate: TopKGate, experts: Experts) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [..., d], used_token [S] or [...] -> as `MoE.forward`."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        gating = self.gate(x, None if used_token is None else used_token.reshape(-1))
        self.l_aux, self.exp_counts = gating.l_aux, gating.exp_counts
        output = self.experts(
            x,
            gating.weights,
            gating.dispatched,
            expert_parallel=self.expert_parallel,
            capacity=self.gate.capacity,
        )
        return output.reshape(hidden_states.shape), gating.l_aux, gating.exp_counts

    def held_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the container, which differ between the ranks of `expert_parallel`."""
        return self.experts.parameters()

    def __getstate__(self) -> dict[str, Any]:
        # tensors that carry a graph, and process groups, can be neither copied nor pickled
        return {name: value for name, value in super().__getstate__().items() if name not in self.TRANSIENT}


class MoE(upstream.MoE):
    """DeepSpeed's mixture-of-experts layer, with the argument order of today's `deepspeed.moe.layer.MoE`.

    Args:
        hidden_size: d, of input and output.
        expert: the module that defines an expert; each local expert starts as a copy of it. MLPs (Linear, activation,
            Linear, and gated ones) run fused; any other module is called on its own rows, [1, 1, rows, d].
        num_experts: E, over all ranks of an expert-parallel group.
        ep_size: ranks that share the experts; divides E.
        k: experts per token, 1 to E.
        capacity_factor, eval_capacity_factor: an expert keeps max(min_capacity, ceil(k * factor * S / E)) of S tokens.
        min_capacity: floor of that.
        use_residual: also run `expert` itself as a dense MLP and mix the two by a learned softmax (PR-MoE,
            arXiv 2201.05596).
        noisy_gate_policy: None, "None", "Jitter" or "RSample", in training.
        drop_tokens: False drops nothing.
        use_rts: for k = 1, sample the surviving tokens at random; else keep the earliest.
        use_tutel: accepted, without effect: this package has its own kernels.
        enable_expert_tensor_parallelism: the experts themselves are split over the model-parallel ranks.
        top2_2nd_expert_sampling: for k = 2, sample the second expert in training.
        expert_group_name: the layer's name among the optimizer's groups (issue #5064); default "moe_N", counted in the
            order of construction. The process group's key stays "ep_size_{ep_size}", in the attribute that DeepSpeed's
            engine reads, `expert_group_name`; the given name is in `layer_name`, here and on each expert parameter.
        drop_policy: for k > 2, "probs" or "position"; see `gating.top_k_gating`.
        exchange: options of `moe_triton.distributed.ExpertParallel` (mode, chunks, deduplicate, ...) for ep_size > 1.
        backend: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind, by name.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        expert_group_name: str | None = None,
        drop_policy: str = "probs",
        exchange: dict[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        nn.Module.__init__(self)  # not upstream's, which would build its own layer
        check_int("hidden_size", hidden_size, low=1)
        check_int("num_experts", num_experts, low=1)
        check_int("ep_size", ep_size, low=1)
        check_choice("backend", backend, BACKENDS)
        if num_experts % ep_size:
            raise ValueError(f"num_experts: got {num_experts}, wanted a multiple of ep_size={ep_size}")
        if expert_group_name is not None and not isinstance(expert_group_name, str):
            raise TypeError(f"expert_group_name: got {expert_group_name!r}, wanted a str or None")
        self.exchange = dict(exchange or {})
        self.hidden_size = hidden_size
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.ep_size = ep_size
        self.expert_group_name = groups.group_name(ep_size)
        self.is_named = expert_group_name is not None
        self.layer_name = f"moe_{next(_layer_numbers)}" if expert_group_name is None else expert_group_name
        self.num_experts = num_experts
        self.num_local_experts = num_experts // ep_size
        # the order in which DeepSpeed draws its weights: the same seed makes the same layer
        experts = Experts(expert, self.num_local_experts, self.expert_group_name, self.layer_name, backend)
        gate = TopKGate(
            hidden_size,
            num_experts,
            k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            noisy_gate_policy,
            drop_tokens,
            use_rts,
            top2_2nd_expert_sampling=top2_2nd_expert_sampling,
            drop_policy=drop_policy,
            backend=backend,
        )
        self.deepspeed_moe = MOELayer(gate, experts)
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        if not self.is_named:  # a copy is a layer of its own
            self.layer_name = f"moe_{next(_layer_numbers)}"
            self.deepspeed_moe.experts.layer_name = self.layer_name
            self.deepspeed_moe.experts.prepare()

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Make the layer's process groups if there are none, and bind them. DeepSpeed's engine calls it on every rank.

        Without the engine the first forward does. Raises RuntimeError where ep_size > 1 and torch.distributed is not
        initialised.
        """
        groups.create_expert_groups(
            self.ep_size,
            within_lanes=self.enable_expert_tensor_parallelism and groups.get_mpu() is not None,
            data_before_expert=use_data_before_expert_parallel_,
        )
        parallel = groups.parallel_groups(self.ep_size)
        if parallel is None:
            if self.ep_size > 1:
                raise RuntimeError(f"ep_size: got {self.ep_size}, but torch.distributed is not initialised")
            return
        expert_parallel = ExpertParallel(parallel, **self.exchange)
        # here, because all ranks bind a layer together, but one rank may construct it alone
        self.deepspeed_moe.experts.message_name = expert_parallel.new_layer()
        self.deepspeed_moe.expert_parallel = None if expert_parallel.is_alone else expert_parallel

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Args:
            hidden_states: [..., d], in the experts' dtype.
            used_token: [S] or [...], a 0/1 mask of any dtype; a token gets experts where it is above 0.

        Returns:
            (output, l_aux, exp_counts): the input's shape and dtype; the load-balance loss, a scalar to be added to the
            loss; int64 [E], assignments wanted per expert before dropping.
        """
        check_tensor("hidden_states", hidden_states)
        if hidden_states.dim() < 1 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states: got shape {list(hidden_states.shape)}, wanted [..., {self.hidden_size}]")
        if self.ep_size > 1 and self.deepspeed_moe.expert_parallel is None:
            self.set_deepspeed_parallelism()
        output, l_aux, exp_counts = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            dense = self.mlp(hidden_states)
            dense = dense[0] if isinstance(dense, tuple) else dense
            mix = F.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * mix[..., 0:1] + dense * mix[..., 1:]
        return output, l_aux, exp_counts
