"""The router: a linear gate and `moe_triton.route`, with noise, rules of choice and the loss-free balancing bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_triton.autograd.gate import run_gate
from moe_triton.autograd.linear import linear
from moe_triton.checks import FLOATS, MASKS, check_choice, check_int, check_number, check_tensor
from moe_triton.layers.choices import ChoiceBatch, ChoiceRule, choice_rule
from moe_triton.layers.load import CountsLoad
from moe_triton.layers.quantiles import QUANTILE_BINS, bias_of_histogram, check_quantile_update, required_biases
from moe_triton.records import RouterSpec, Routing
from moe_triton.reference import router_scores, wide
from moe_triton.routing import gumbel_noise, route_by_spec, router_spec
from moe_triton.runtime import is_batch_invariant, without_autocast
from moe_triton.torch_internals import buffer_of, is_plain, parameter_of

NULL_OUTPUTS = ("identity", "zero")
BIAS_UPDATES = ("sign", "quantile")


class Router(CountsLoad):
    """Scores every expert for every token and chooses K of them.

    Args:
        hidden_size: d.
        num_experts: E.
        top_k: K, 1 to E.
        score, normalize, scale, num_groups, top_groups, group_score: see `moe_triton.route`.
        bias: give the gate a bias.
        choice_bias: balance the load without a loss: a buffer [E], added to the scores for the choice only and moved by
            `update_choice_bias` once per optimizer step. It stays fp32 whatever casts the module: its small steps would
            be lost in bf16.
        bias_update: "sign", by a fixed step (arXiv 2408.15664), or "quantile", to the bias that would have balanced the
            tokens since the last update (Kimi K3; for score "softmax" or "sigmoid" without groups).
        null_experts: Z more choices that compute nothing, after the E experts in the gate, the choice bias and the sums
            of the Routing; so the number of a token's real experts varies (LongCat-Flash, arXiv 2509.01322).
        null_output: "identity", a null choice returns the token, times its weight (LongCat-Flash); or "zero", it adds
            nothing and has no part in `normalize` (AdaMoE, arXiv 2406.13233).
        jitter: in training, multiply the gate's input by U(1 - jitter, 1 + jitter) (Switch Transformer).
        gumbel: in training, choose by logits + Gumbel noise (DeepSpeed's RSample); the weights stay noise-free.
        expert_choice: each expert takes its best ceil(expert_choice * T / E) tokens, so that the load is even and a
            token has `expert_choice` experts on average, `top_k` at most (arXiv 2202.09368). Not causal: a token's
            experts depend on later tokens, in training and in eval, and on the batch it comes in.
        hash_table: [V, K] ids of experts by token id, a buffer; `forward` then wants `token_ids` (arXiv 2106.04426;
            DeepSeek-V4's first layers). The gate only weights them.
        sinkhorn: in training, choose by the logits after so many rounds of Sinkhorn's algorithm over the batch, which
            evens out the load (Megatron-Core; a fixed number of rounds, since a tolerance would wait for the device).
        top_p: a token gets no more experts than reach this share of its scores, `top_k` at most (arXiv 2403.07652).
        token_rounding: in training, round each expert's number of assignments to the nearest multiple of this number of
            rows, the tile of a kernel, and drop or add the least certain ones (SonicMoE, arXiv 2512.14080).
        rounding_extra: to so many more experts a token may be added by `token_rounding`; the Routing has K + this many
            columns. E - K is the paper's rule, at the cost of memory.
        forced_balance: deal out the experts in turn, for benchmarks.
        choice_groups: G equal runs of tokens, each a batch of its own to `expert_choice`, `sinkhorn` and
            `token_rounding`, such as the sequences of the batch; reproduces a G-rank run. At most one of these six
            rules can be given; `expert_choice`, `hash_table` and `forced_balance` exclude bias, noise and groups.
        backend: "auto", "triton", "torch" or "reference".
        device, dtype: of the parameters.

    The gate computes in fp32 whatever the parameters' dtype (fp64 for fp64 parameters), also under autocast; on a GPU
    from 16-bit hidden states on the matrix unit, whose sums are fp32, with nothing rounded before. It keeps the hidden
    states for backward as they came; with jitter, an fp32 copy.
    """

    choice_bias: Tensor | None
    hash_table: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        score: str = "softmax",
        normalize: bool | None = None,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int | None = None,
        group_score: str = "max",
        bias: bool = False,
        choice_bias: bool = False,
        bias_update: str = "sign",
        null_experts: int = 0,
        null_output: str = "identity",
        jitter: float = 0.0,
        gumbel: bool = False,
        expert_choice: float | None = None,
        hash_table: Tensor | None = None,
        sinkhorn: int | None = None,
        top_p: float | None = None,
        token_rounding: int | None = None,
        rounding_extra: int = 1,
        forced_balance: bool = False,
        choice_groups: int = 1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, low=1)
        check_int("num_experts", num_experts, low=1)
        check_number("jitter", jitter, low=0)
        check_int("null_experts", null_experts, low=0)
        check_choice("null_output", null_output, NULL_OUTPUTS)
        check_choice("bias_update", bias_update, BIAS_UPDATES)
        num_choices = num_experts + null_experts
        self.spec = router_spec(
            num_choices,
            top_k,
            score=score,
            normalize=normalize,
            scale=scale,
            num_groups=num_groups,
            top_groups=top_groups,
            group_score=group_score,
            weightless=null_experts if null_output == "zero" else 0,
        )
        self.rule = choice_rule(
            num_choices,
            top_k,
            expert_choice=expert_choice,
            hash_table=hash_table,
            sinkhorn=sinkhorn,
            top_p=top_p,
            token_rounding=token_rounding,
            rounding_extra=rounding_extra,
            forced_balance=forced_balance,
            choice_groups=choice_groups,
        )
        if self.rule is not None and not self.rule.by_top_k:
            for name, got, wanted in (
                ("choice_bias", choice_bias, False), ("gumbel", gumbel, False), ("num_groups", num_groups, 1)
            ):  # fmt: skip
                if got != wanted:
                    raise ValueError(f"{name}: got {got} with {self.rule}, wanted {wanted}: it changes the top-k only")
        if bias_update == "quantile":
            check_quantile_update(self.spec, num_choices, choice_bias)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.null_experts = null_experts
        self.identity_experts = null_experts if null_output == "identity" else 0
        self.bias_update = bias_update
        self.jitter = jitter
        self.gumbel = gumbel
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_choices, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_choices, device=device, dtype=dtype)) if bias else None
        bias_buffer = torch.zeros(num_choices, device=device, dtype=torch.float32) if choice_bias else None
        self.register_buffer("choice_bias", bias_buffer)
        counted = (num_choices, QUANTILE_BINS) if bias_update == "quantile" else (num_choices,)
        self.load = torch.zeros(counted, device=device, dtype=torch.int64) if choice_bias else None
        table = None if hash_table is None else hash_table.detach().to(device=device, dtype=torch.int32).clone()
        self.register_buffer("hash_table", table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from torch's generator; the biases and the load become zeros."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.choice_bias is not None and self.load is not None:
            self._keep_choice_bias_wide(self.choice_bias)
            nn.init.zeros_(self.choice_bias)
            self.load_on(self.choice_bias.device).zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.choice_bias
        super()._apply(fn, recurse)
        self._keep_choice_bias_wide(exact)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_choice_bias_wide(self.choice_bias)  # assign=True takes the tensor as it is

    def _keep_choice_bias_wide(self, exact: Tensor | None) -> None:
        """Undo a cast of the choice bias, with the values `exact` that it had before."""
        if exact is not None and self.choice_bias is not None and self.choice_bias.dtype != torch.float32:
            self.choice_bias = exact.to(device=self.choice_bias.device, dtype=torch.float32)

    @property
    def top_k(self) -> int:
        return self.spec.top_k

    def gate(self, hidden_states: Tensor) -> Tensor:
        """[T, d] -> logits [T, E] in fp32 (fp64 for fp64 parameters)."""
        return self._gate(hidden_states, is_plain(hidden_states))[0]

    def _gate(self, hidden_states: Tensor, is_plain: bool) -> tuple[Tensor, Tensor]:
        """The logits, and the hidden states for whoever takes them next (see `autograd.gate`)."""
        jitters = self.training and self.jitter > 0
        if not (jitters or is_batch_invariant()):
            return run_gate(hidden_states, parameter_of(self, "weight"), self.bias, self.backend, is_plain)
        dtype = wide(self.weight.dtype)
        with without_autocast(hidden_states.device):
            x = hidden_states.to(dtype)
            if jitters:
                x = x * (1 + self.jitter * (2 * torch.rand_like(x) - 1))
            if is_batch_invariant():
                bias = None if self.bias is None else self.bias.to(dtype)
                return linear(x, self.weight.to(dtype), bias, self.backend), hidden_states
        return run_gate(x, self.weight, self.bias, self.backend)[0], hidden_states

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None = None,
        experts: Tensor | None = None,
        *,
        token_ids: Tensor | None = None,
        sequences: int = 1,
    ) -> Routing:
        """hidden_states [T, d], token_mask [T] or None, given experts [T, K] or None -> Routing; see `route`.

        token_ids: [T] int32 or int64, for a `hash_table`. The Routing has E + Z columns with Z null experts, and K +
        `rounding_extra` choices with `token_rounding` in training.
        """
        check_tensor("hidden_states", hidden_states, shape=("T", self.hidden_size), dtypes=FLOATS)
        if token_mask is not None:
            shape, device = hidden_states.shape[:-1], hidden_states.device
            check_tensor("token_mask", token_mask, shape=shape, dtypes=MASKS, device=device)
            token_mask = token_mask.bool()
            hidden_states = hidden_states.masked_fill(token_mask.logical_not()[:, None], 0)  # 0 * NaN would be NaN
        plain = is_plain(hidden_states)  # and then so are the logits
        logits, hidden_states = self._gate(hidden_states, plain)
        noise = gumbel_noise(logits) if self.gumbel and self.training else None
        given = None
        if experts is None and self.rule is not None and (self.training or not self.rule.training_only):
            given = self._by_rule(self.rule, logits, noise, token_mask, token_ids)
        routing = route_by_spec(
            logits,
            self.spec if self.rule is None else self._spec_for(self.rule, experts if given is None else given),
            choice_bias=buffer_of(self, "choice_bias"),
            noise=noise,
            token_mask=token_mask,
            experts=experts,
            given=given,
            sequences=sequences,
            hidden=hidden_states,
            backend=self.backend,
            is_plain=plain,
        )
        if self.bias_update == "quantile" and self.training:
            self.count_load(self._required_biases(logits, noise, token_mask))
        elif self.load is not None:
            self.count_load(routing.counts)
        return routing

    @torch.no_grad()
    def _by_rule(
        self, rule: ChoiceRule, logits: Tensor, noise: Tensor | None, token_mask: Tensor | None, ids: Tensor | None
    ) -> Tensor:
        def top(k: int, offsets: Tensor | None) -> Tensor:
            moved = noise if offsets is None else offsets if noise is None else noise + offsets
            return route_by_spec(
                logits,
                replace(self.spec, top_k=k),
                choice_bias=self.choice_bias,
                noise=moved,
                token_mask=token_mask,
                backend=self.backend,
            ).experts

        batch = ChoiceBatch(
            logits=logits.detach(),
            spec=self.spec,
            token_mask=token_mask,
            token_ids=ids,
            hash_table=self.hash_table,
            top=top,
        )
        return rule.choose(batch)

    def _spec_for(self, rule: ChoiceRule, experts: Tensor | None) -> RouterSpec:
        """The options for choices of the rule's width; any other width is refused later, as one that is not K."""
        if experts is None or experts.shape[1:] != (rule.width(self.top_k),):
            return self.spec
        return replace(self.spec, top_k=experts.shape[1])

    @torch.no_grad()
    def _required_biases(self, logits: Tensor, noise: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """The histogram [E, bins] of the biases that each token would have needed to choose each expert."""
        assert self.choice_bias is not None
        scores = router_scores(logits if noise is None else logits + noise, self.spec.score)
        return required_biases(scores, self.choice_bias, self.top_k, token_mask)

    @torch.no_grad()
    def update_choice_bias(self, rate: float = 1e-3, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Move the choice bias towards an even load, by the tokens since the last call, and start counting anew.

        bias_update "sign": bias += rate * sign(mean(load) - load). "quantile": the bias of
        `reference.choices.quantile_bias` from a histogram, to within (2 + range of the bias) / 1000; `rate` has no
        part in it. Both sum over `group` (None: torch.distributed's default group, when there is one). Call it once per
        optimizer step on every rank.
        """
        if self.choice_bias is None or self.load is None:
            raise ValueError("update_choice_bias: this router was made with choice_bias=False")
        self._keep_choice_bias_wide(self.choice_bias)  # code that casts buffers by hand
        load = self.load_on(self.choice_bias.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load, group=group)
        if self.bias_update == "quantile":
            self.choice_bias.copy_(bias_of_histogram(load, self.choice_bias, self.top_k))
        else:
            wide_load = load.float()
            self.choice_bias += rate * torch.sign(wide_load.mean() - wide_load)
        load.zero_()

    def extra_repr(self) -> str:
        rule = "" if self.rule is None else f", {self.rule}"
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, {self.spec}{rule}"


def update_choice_biases(
    model: nn.Module, rate: float = 1e-3, group: torch.distributed.ProcessGroup | None = None
) -> None:
    """Call `Router.update_choice_bias` for every router of the model that has a choice bias.

    group: the ranks that hold the same layers; with pipeline parallelism these are not all (None).
    """
    for module in model.modules():
        if isinstance(module, Router) and module.choice_bias is not None:
            module.update_choice_bias(rate, group)
