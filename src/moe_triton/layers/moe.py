"""The mixture-of-experts layer: router -> dispatch -> experts, with shared and residual experts beside them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_triton import losses
from moe_triton.autograd.linear import apply_linear, sigmoid, softmax
from moe_triton.checks import FLOATS, INTEGERS, MASKS, check_choice, check_int, check_number, check_tensor
from moe_triton.dispatch import dispatch, expert_capacity, renormalize
from moe_triton.distributed.exchange.channel import report_failure
from moe_triton.distributed.exchange.expert_parallel import ExpertParallel, unless_alone
from moe_triton.distributed.exchange.overlap import Deferred
from moe_triton.layers.experts import Experts, FeedForward, Uncast, casts_inputs
from moe_triton.layers.router import Router
from moe_triton.records import PRIORITIES, Dispatch, Routing, SequenceSums
from moe_triton.runtime import BACKENDS, batch_invariant
from moe_triton.torch_internals import never_compiled, runs_as_it_is, submodule_of


class MoEOutput(NamedTuple):
    """What `MoE.forward` returns.

    output         the input's shape and dtype
    aux_loss       scalar in the router's dtype, already weighted: add it to the loss. Under expert parallelism this
                   rank's share of the global loss (see `ExpertParallel(loss_reduction=...)`)
    expert_counts  [E] int64, assignments that this rank's tokens wanted per expert, before dropping
    """

    output: Tensor
    aux_loss: Tensor
    expert_counts: Tensor


class GlobalLoad(Protocol):
    """What an MoE layer asks for the load of more tokens than its own; see `moe_triton.BalanceAccumulator`."""

    def global_load(self, layer: nn.Module, counts: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return counts [E] and a number of tokens [], whose quotient is the load, and the number divides the sums."""


class MoE(nn.Module):
    """A mixture-of-experts layer.

    Args:
        hidden_size: d, of input and output.
        intermediate_size: n, of each expert.
        num_experts: E.
        top_k: K experts per token, 1 to E.
        activation: "swiglu", "geglu" (erf), "geglu_tanh", "reglu", "gpt_oss" (gated); "silu", "gelu" (erf),
            "gelu_tanh", "relu", "relu2" (ungated). Of the experts, the shared and the residual one.
        activation_limit, activation_alpha: of "swiglu" and "gpt_oss"; see `moe_triton.moe_mlp`. None: its own.
        bias: give the experts biases.
        router: a module that maps (hidden_states [T, d], token_mask) to a `Routing`; None makes
            `Router(hidden_size, num_experts, top_k)`: softmax, weights normalised over the K choices when K > 1.
        capacity_factor: in training each expert keeps max(min_capacity, ceil(capacity_factor * K * T / E)) assignments
            of each group and the others are dropped; None or infinity drops nothing (dropless).
        eval_capacity_factor: the same in eval; None takes `capacity_factor`.
        min_capacity: floor of the capacity.
        capacity_groups: G equal runs of tokens with a capacity each; reproduces a G-rank run. Must divide T.
        drop_policy: who survives: "position", "choice", "probability" or "random"; see `moe_triton.dispatch`.
        renormalize: divide a token's weights by their sum over its surviving choices (GShard, DeepSpeed's top-2).
        latent_size: l, when the experts work on vectors of this size: a projection d -> l comes before them and one
            l -> d after their sum (Nemotron-3's LatentMoE). The router and the shared experts see d. Under expert
            parallelism it is the l numbers of a token that travel. None: the experts work on the hidden states.
        shared_intermediate_size: size of a shared expert that sees every token; 0 for none.
        shared_gate: multiply the shared expert's output by sigmoid(Linear(d, 1)) (Qwen2-MoE).
        residual: add a dense MLP of size n and mix the two with a learned softmax coefficient (PR-MoE, DeepSpeed).
        aux_loss_weight, z_loss_weight: this layer's factors of the load-balance and z losses (`moe_triton.losses`); the
            attributes may change between steps. The batch that is balanced is this call's, over all ranks with expert
            parallelism; `moe_triton.BalanceAccumulator` makes it the whole global batch.
        sequence_loss_weight: factor of the load-balance loss of each sequence by itself, which are the last but one
            dimension of the input (DeepSeek-V3).
        fp8: compute the experts' products in fp8, in training and in eval; see `moe_triton.moe_mlp`. The router, the
            shared and the residual expert are as without.
        recompute: keep only the hidden states of the experts for backward, and compute their first product again there.
        batch_invariant: compute every forward of this layer inside `moe_triton.batch_invariant`.
        expert_parallel: spread the experts over ranks (`moe_triton.distributed.ExpertParallel`); None keeps all here.
            Each rank's tokens are one capacity group.
        backend: "auto" (Triton on a supported GPU, torch elsewhere), "triton", "torch" or "reference".
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind, by name.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "swiglu",
        activation_limit: float | None = None,
        activation_alpha: float | None = None,
        bias: bool = False,
        router: nn.Module | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 4,
        capacity_groups: int = 1,
        drop_policy: str = "position",
        renormalize: bool = False,
        latent_size: int | None = None,
        shared_intermediate_size: int = 0,
        shared_gate: bool = False,
        residual: bool = False,
        aux_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        sequence_loss_weight: float = 0.0,
        fp8: bool | str = False,
        recompute: bool = False,
        batch_invariant: bool = False,
        expert_parallel: ExpertParallel | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, low=1)
        check_int("num_experts", num_experts, low=1)
        check_int("top_k", top_k, low=1, high=num_experts)
        check_int("min_capacity", min_capacity, low=0)
        check_int("capacity_groups", capacity_groups, low=1)
        check_int("shared_intermediate_size", shared_intermediate_size, low=0)
        if latent_size is not None:
            check_int("latent_size", latent_size, low=1)
        check_choice("drop_policy", drop_policy, PRIORITIES)
        check_choice("backend", backend, BACKENDS)
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None and factor != math.inf:
                check_number(name, factor, above=0)
        check_number("aux_loss_weight", aux_loss_weight, low=0)
        check_number("z_loss_weight", z_loss_weight, low=0)
        check_number("sequence_loss_weight", sequence_loss_weight, low=0)
        if expert_parallel is not None and not isinstance(expert_parallel, ExpertParallel):
            raise TypeError(f"expert_parallel: got {type(expert_parallel).__name__}, wanted an ExpertParallel or None")
        if expert_parallel is not None and expert_parallel.mode == "capacity" and capacity_factor in (None, math.inf):
            raise ValueError(
                f"capacity_factor: got {capacity_factor} with expert_parallel mode 'capacity', wanted a number > 0"
            )
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if batch_invariant and factor not in (None, math.inf):
                raise ValueError(
                    f"{name}: got {factor} with batch_invariant=True, wanted None: a capacity mixes tokens"
                )
        if shared_gate and not shared_intermediate_size:
            raise ValueError("shared_gate: got True, wanted a shared_intermediate_size > 0 beside it")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.capacity_groups = capacity_groups
        self.drop_policy = drop_policy
        self.renormalize = renormalize
        self.aux_loss_weight = aux_loss_weight
        self.z_loss_weight = z_loss_weight
        self.sequence_loss_weight = sequence_loss_weight
        self.balance: GlobalLoad | None = None
        self.backend = backend
        self.batch_invariant = batch_invariant

        if router is None:
            router = Router(hidden_size, num_experts, top_k, backend=backend, device=device, dtype=dtype)
        elif not isinstance(router, nn.Module):
            raise TypeError(f"router: got {type(router).__name__}, wanted a Module that returns a Routing, or None")
        elif isinstance(router, Router):
            got = {name: getattr(router, name) for name in ("hidden_size", "num_experts", "top_k")}
            wanted = {"hidden_size": hidden_size, "num_experts": num_experts, "top_k": top_k}
            if got != wanted:
                got_text, wanted_text = (", ".join(f"{k}={v}" for k, v in sizes.items()) for sizes in (got, wanted))
                raise ValueError(f"router: got one for {got_text}, wanted {wanted_text}")
        self.router = router
        self.identity_experts = router.identity_experts if isinstance(router, Router) else 0
        if self.identity_experts and renormalize:
            raise ValueError("renormalize: got True with null experts that return the token, wanted False")
        self.experts = Experts(
            hidden_size if latent_size is None else latent_size,
            intermediate_size,
            num_experts,
            activation=activation,
            activation_limit=activation_limit,
            activation_alpha=activation_alpha,
            bias=bias,
            fp8=fp8,
            recompute=recompute,
            expert_parallel=expert_parallel,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.latent_down_proj = self.latent_up_proj = None
        if latent_size is not None:
            self.latent_down_proj = nn.Linear(hidden_size, latent_size, bias=bias, device=device, dtype=dtype)
            self.latent_up_proj = nn.Linear(latent_size, hidden_size, bias=bias, device=device, dtype=dtype)
        # what forward needs to know of the experts: it must not look inside what may wrap them (PEFT, FSDP)
        self.parallel = expert_parallel
        self.layer_name = "" if expert_parallel is None else self.experts.layer_name

        def dense(size: int) -> FeedForward:
            return FeedForward(
                hidden_size,
                size,
                activation=activation,
                activation_limit=activation_limit,
                activation_alpha=activation_alpha,
                bias=bias,
                device=device,
                dtype=dtype,
            )

        self.shared_expert = dense(shared_intermediate_size) if shared_intermediate_size else None
        self.shared_expert_gate = (
            nn.Linear(hidden_size, 1, bias=False, device=device, dtype=dtype) if shared_gate else None
        )
        self.residual_mlp = dense(intermediate_size) if residual else None
        self.residual_coefficient = nn.Linear(hidden_size, 2, device=device, dtype=dtype) if residual else None

    def capacity(self, num_tokens: int) -> int | None:
        """Return the assignments that one expert keeps out of `num_tokens` tokens in the present mode; None for all."""
        factor = self.capacity_factor
        if not self.training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        if factor is None or factor == math.inf:
            return None
        return expert_capacity(num_tokens, self.num_experts, self.top_k, factor, self.min_capacity)

    def most_kept(self, num_tokens: int) -> int | None:
        """Return the most that one expert keeps out of `num_tokens` tokens, over all their capacity groups."""
        in_a_group = self.capacity(-(-num_tokens // self.capacity_groups))
        return None if in_a_group is None else self.capacity_groups * in_a_group

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor | None = None, *, token_ids: Tensor | None = None
    ) -> MoEOutput:
        """hidden_states [..., d], token_mask [...] bool or integer, or None for all tokens -> MoEOutput.

        A token whose mask is 0 gets no expert, shared and residual ones included: its output is 0, and it counts
        nowhere, in no gradient either, even if it is NaN. token_ids [...], int32 or int64, are for a router with a
        `hash_table`.
        """
        is_alone = self.parallel is None or self.parallel.is_alone
        forward = self._forward if is_alone else self._forward_over_ranks
        if not self.batch_invariant:
            return forward(hidden_states, token_mask, token_ids)
        with batch_invariant():
            return forward(hidden_states, token_mask, token_ids)

    @never_compiled  # the order of collectives is Python's
    def _forward_over_ranks(
        self, hidden_states: Tensor, token_mask: Tensor | None, token_ids: Tensor | None
    ) -> MoEOutput:
        with report_failure(self.layer_name):
            return self._forward(hidden_states, token_mask, token_ids)

    def _forward(self, hidden_states: Tensor, token_mask: Tensor | None, token_ids: Tensor | None) -> MoEOutput:
        check_tensor("hidden_states", hidden_states, dtypes=FLOATS)
        dim = hidden_states.dim()
        if dim < 1 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states: got shape {list(hidden_states.shape)}, wanted [..., {self.hidden_size}]")
        x = hidden_states if dim == 2 else hidden_states.reshape(-1, self.hidden_size)
        if token_mask is not None:
            shape, device = hidden_states.shape[:-1], hidden_states.device
            check_tensor("token_mask", token_mask, shape=shape, dtypes=MASKS, device=device)
            token_mask = token_mask.reshape(-1)
            masked = token_mask.logical_not()[:, None]
            x = x.masked_fill(masked, 0)  # 0 * NaN would be NaN, in a gradient of a weight too
        num_tokens = x.shape[0]
        is_dropless = self.capacity(num_tokens) is None
        groups = 1 if is_dropless else self.capacity_groups
        if num_tokens % groups:
            raise ValueError(
                f"capacity_groups: got {self.capacity_groups}, wanted a divisor of the {num_tokens} tokens"
            )

        more: dict[str, Any] = {} if token_ids is None else {"token_ids": self._flat(token_ids, hidden_states)}
        if self.sequence_loss_weight:
            more["sequences"] = max(1, math.prod(hidden_states.shape[:-2])) if num_tokens else 1
        router, experts = submodule_of(self, "router"), submodule_of(self, "experts")
        routing = router(x, token_mask, **more)
        if not isinstance(routing, Routing):
            raise TypeError(f"router: returned {type(routing).__name__}, wanted a Routing")
        if routing.hidden is not None and runs_as_it_is(router, Router):
            x = routing.hidden  # the gate adds its gradient to that of all that follows
        dispatched: Dispatch | None = routing.dispatched_to(self.num_experts) if is_dropless else None
        if dispatched is None:
            dispatched = dispatch(
                routing.experts,
                self.num_experts,
                capacity=None if is_dropless else self.capacity(num_tokens // groups),
                capacity_groups=groups,
                priority=self.drop_policy,
                weights=routing.weights,
                backend=self.backend,
            )
        weights = renormalize(routing.weights, dispatched) if self.renormalize else routing.weights
        shared = None
        if self.shared_expert is not None and unless_alone(self.parallel) is not None:
            shared = Deferred(partial(self._shared, x), x.device)
        out = experts(
            x if self.latent_down_proj is None else apply_linear(self.latent_down_proj, x, self.backend),
            Uncast(weights) if casts_inputs(experts) else weights,
            dispatched,
            capacity=self.most_kept,
            overlap_with=shared,
        )
        if self.latent_up_proj is not None:
            out = apply_linear(self.latent_up_proj, out, self.backend)
        if self.identity_experts:
            own = routing.weights.masked_fill(routing.experts < self.num_experts, 0.0).sum(-1, keepdim=True)
            out = out + (x * own).to(out.dtype)
        if self.shared_expert is not None:
            out = out + (self._shared(x) if shared is None else shared.result())
        if self.residual_mlp is not None and self.residual_coefficient is not None:
            mix = softmax(apply_linear(self.residual_coefficient, x, self.backend))
            out = out * mix[:, 0:1] + self.residual_mlp(x) * mix[:, 1:]
        if token_mask is not None:
            out = out.masked_fill(masked, 0)
        if out.dtype != hidden_states.dtype:
            out = out.to(hidden_states.dtype)
        return MoEOutput(
            output=out if dim == 2 else out.reshape(hidden_states.shape),
            aux_loss=self.aux_loss(routing),
            expert_counts=dispatched.counts.long(),
        )

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared_expert is not None
        shared = self.shared_expert(x)
        if self.shared_expert_gate is not None:
            shared = shared * sigmoid(apply_linear(self.shared_expert_gate, x, self.backend))
        return shared

    @staticmethod
    def _flat(token_ids: Tensor, hidden_states: Tensor) -> Tensor:
        shape, device = hidden_states.shape[:-1], hidden_states.device
        return check_tensor("token_ids", token_ids, shape=shape, dtypes=INTEGERS, device=device).reshape(-1)

    def aux_loss(self, routing: Routing) -> Tensor:
        """Compute the weighted sum of load-balance and z losses, a scalar; under expert parallelism this rank's share.

        With the counts and the number of tokens of all ranks, and this one's sums, the losses are sums of shares.
        """
        loss = routing.weights.new_zeros(())
        if not self.aux_loss_weight and not self.z_loss_weight and not self.sequence_loss_weight:
            return loss
        counts, num_tokens, parallel = routing.counts, routing.num_tokens, self.parallel
        if parallel is not None:
            counts, num_tokens = parallel.global_counts(counts, num_tokens, self.layer_name)
        if self.balance is not None:
            counts, num_tokens = self.balance.global_load(self, counts, num_tokens)
        if self.aux_loss_weight:
            balance = losses.load_balance_loss(counts, routing.score_sums, num_tokens, self.top_k)
            loss = loss + self.aux_loss_weight * balance
        if self.z_loss_weight:
            loss = loss + self.z_loss_weight * losses.z_loss(routing.z_sum, num_tokens)
        if self.sequence_loss_weight:
            loss = loss + self.sequence_loss_weight * self._sequence_loss(routing)
        return loss if parallel is None else loss * parallel.loss_scale

    def _sequence_loss(self, routing: Routing) -> Tensor:
        """The mean over sequences; under expert parallelism this rank's share of the mean over those of all ranks."""
        sums = routing.sequences
        if sums is None:  # one sequence
            sums = SequenceSums(routing.counts[None], routing.score_sums[None], routing.num_tokens[None])
        loss = losses.load_balance_loss(*sums, self.top_k, per_sequence=True)
        if self.parallel is None:
            return loss
        number = (sums.num_tokens > 0).sum().to(loss.dtype)
        _, total = self.parallel.global_counts(routing.counts, number, self.layer_name)
        return loss * number / total.clamp_min(1)
