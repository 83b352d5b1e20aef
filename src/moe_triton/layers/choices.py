"""Rules that choose the experts in another way than by the top-k alone; a `Router` has one of them at most.

A *score* turns logits into weights; a *rule* decides which experts. Everything after the rule, which is the weights of
the chosen experts, the sums and the gradients, is `route` with given experts. Definitions: `reference.choices`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_triton import reference
from moe_triton.checks import INTEGERS, check_int, check_number, check_tensor
from moe_triton.dispatch import expert_capacity
from moe_triton.records import EMPTY, RouterSpec
from moe_triton.reference import choices as definitions


@dataclass(frozen=True, kw_only=True)
class ChoiceBatch:
    """What a rule may look at; nothing here has a gradient.

    logits      [T, E] fp32 or fp64
    spec        the router's options
    token_mask  [T] bool, or None: tokens that count
    token_ids   [T] or None
    hash_table  [V, K], the router's, or None
    top         (k, offsets [T, E] or None) -> ids [T, k]: the router's own top-k, with its bias, noise and groups
    """

    logits: Tensor
    spec: RouterSpec
    token_mask: Tensor | None
    token_ids: Tensor | None
    hash_table: Tensor | None
    top: Callable[[int, Tensor | None], Tensor]

    def grouped(self, values: Tensor, groups: int) -> Tensor:
        """[T, ...] -> [G, T / G, ...] for the rules that look at a whole batch."""
        if values.shape[0] % groups:
            raise ValueError(f"choice_groups: got {groups}, wanted a divisor of the {values.shape[0]} tokens")
        return values.view(groups, values.shape[0] // groups, *values.shape[1:])

    def present(self, values: Tensor) -> Tensor:
        """-inf [T, E] for the tokens that do not count, and for NaN."""
        values = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        return values if self.token_mask is None else values.masked_fill(~self.token_mask[:, None], -math.inf)


class ChoiceRule(Protocol):
    """A way to choose.

    by_top_k       whether it starts from the router's own top-k, with choice bias, noise and groups
    training_only  whether eval mode chooses by the top-k alone
    """

    by_top_k: bool
    training_only: bool

    def width(self, top_k: int) -> int:
        """Return the number of places that the rule needs for each token."""

    def choose(self, batch: ChoiceBatch) -> Tensor:
        """Return ids [T, width] int32, distinct in a row; `EMPTY` where a place has no expert."""


@dataclass(frozen=True)
class HashRouting:
    """Choose by a table from token ids to experts (Hash Layers, arXiv 2106.04426; DeepSeek-V4's first layers).

    A token id outside the table gets no expert.
    """

    by_top_k = False
    training_only = False

    def width(self, top_k: int) -> int:
        return top_k

    def choose(self, batch: ChoiceBatch) -> Tensor:
        assert batch.hash_table is not None
        num_tokens, num_experts = batch.logits.shape
        if batch.token_ids is None:
            raise ValueError(f"token_ids: got None, wanted [{num_tokens}] for a router with a hash_table")
        check_tensor("token_ids", batch.token_ids, shape=(num_tokens,), dtypes=INTEGERS, device=batch.logits.device)
        last = batch.hash_table.shape[0] - 1
        ids = batch.hash_table[batch.token_ids.clamp(0, last)]
        ids = ids.masked_fill(((batch.token_ids < 0) | (batch.token_ids > last))[:, None], EMPTY)
        ids = reference.given_choices(ids, num_experts)
        return ids.masked_fill(ids < 0, EMPTY)


@dataclass(frozen=True)
class ExpertChoice:
    """Let each expert take its best tokens: `reference.choices.expert_choice`, with capacity ceil(per_token * T / E).

    A token's experts depend on the tokens after it, so that a causal model sees the future in training and cannot
    repeat the choice when it generates.
    """

    per_token: float
    groups: int

    by_top_k = False
    training_only = False

    def width(self, top_k: int) -> int:
        return top_k

    def choose(self, batch: ChoiceBatch) -> Tensor:
        num_experts = batch.logits.shape[1]
        scores = batch.grouped(batch.present(reference.router_scores(batch.logits, batch.spec.score)), self.groups)
        capacity = expert_capacity(scores.shape[1], num_experts, 1, self.per_token)
        return definitions.expert_choice(scores, capacity, batch.spec.top_k).flatten(0, 1)


@dataclass(frozen=True)
class Sinkhorn:
    """Choose by logits that Sinkhorn's algorithm has balanced over the batch: `reference.choices.sinkhorn_offsets`."""

    iterations: int
    groups: int

    by_top_k = True
    training_only = True

    def width(self, top_k: int) -> int:
        return top_k

    def choose(self, batch: ChoiceBatch) -> Tensor:
        logits = batch.grouped(batch.present(batch.logits), self.groups)
        offsets = definitions.sinkhorn_offsets(logits, self.iterations).expand_as(logits).flatten(0, 1)
        return batch.top(batch.spec.top_k, offsets)


@dataclass(frozen=True)
class TopP:
    """Give each token as many experts as reach a mass of the normalised scores: `reference.choices.top_p_choices`."""

    top_p: float

    by_top_k = True
    training_only = False

    def width(self, top_k: int) -> int:
        return top_k

    def choose(self, batch: ChoiceBatch) -> Tensor:
        ids = batch.top(batch.spec.top_k, None)
        return definitions.top_p_choices(normalised_scores_of(batch, ids), ids, self.top_p)


@dataclass(frozen=True)
class TokenRounding:
    """Round every expert's count to a multiple of a tile of rows: `reference.choices.token_rounding`.

    A token may be added to `extra` more experts, out of as many as it has, or `extra` where that is more.
    """

    tile: int
    extra: int
    groups: int

    by_top_k = True
    training_only = True

    def width(self, top_k: int) -> int:
        return top_k + self.extra

    def choose(self, batch: ChoiceBatch) -> Tensor:
        num_experts, top_k = batch.logits.shape[1], batch.spec.top_k
        ids = batch.top(min(num_experts, top_k + max(top_k, self.extra)), None)
        scores = batch.grouped(normalised_scores_of(batch, ids), self.groups)
        ids = batch.grouped(ids, self.groups)
        return definitions.token_rounding(scores, ids, num_experts, top_k, self.tile, self.extra).flatten(0, 1)


@dataclass(frozen=True)
class ForcedBalance:
    """Deal out the experts in turn, whatever the logits: even load for benchmarks, never for a model."""

    by_top_k = False
    training_only = False

    def width(self, top_k: int) -> int:
        return top_k

    def choose(self, batch: ChoiceBatch) -> Tensor:
        (num_tokens, num_experts), top_k = batch.logits.shape, batch.spec.top_k
        turns = torch.arange(num_tokens * top_k, device=batch.logits.device, dtype=torch.int32)
        return turns.remainder(num_experts).view(num_tokens, top_k)


def normalised_scores_of(batch: ChoiceBatch, ids: Tensor) -> Tensor:
    """Return the scores of the chosen ids [T, J] as shares of their token's sum over all experts, 0 at id < 0."""
    scores = reference.router_scores(batch.logits, batch.spec.score)
    chosen = scores.gather(1, ids.long().clamp_min(0)) / (scores.sum(-1, keepdim=True) + reference.EPS)
    return chosen.masked_fill(ids < 0, 0.0).nan_to_num(nan=0.0)


def choice_rule(
    num_experts: int,
    top_k: int,
    *,
    expert_choice: float | None,
    hash_table: Tensor | None,
    sinkhorn: int | None,
    top_p: float | None,
    token_rounding: int | None,
    rounding_extra: int,
    forced_balance: bool,
    choice_groups: int,
) -> ChoiceRule | None:
    """Return the checked rule of a router's options, None for the top-k alone; see `Router` for their meaning."""
    check_int("choice_groups", choice_groups, low=1)
    check_int("rounding_extra", rounding_extra, low=1)
    rules: dict[str, ChoiceRule] = {}
    if expert_choice is not None:
        check_number("expert_choice", expert_choice, above=0)
        rules["expert_choice"] = ExpertChoice(expert_choice, choice_groups)
    if hash_table is not None:
        check_tensor("hash_table", hash_table, shape=("V", top_k), dtypes=INTEGERS)
        check_int("rows of hash_table", hash_table.shape[0], low=1)
        rules["hash_table"] = HashRouting()
    if sinkhorn is not None:
        check_int("sinkhorn", sinkhorn, low=1)
        rules["sinkhorn"] = Sinkhorn(sinkhorn, choice_groups)
    if top_p is not None:
        check_number("top_p", top_p, above=0)
        rules["top_p"] = TopP(top_p)
    if token_rounding is not None:
        check_int("token_rounding", token_rounding, low=1)
        if top_k + rounding_extra > num_experts:
            raise ValueError(f"rounding_extra: got {rounding_extra}, wanted at most {num_experts - top_k}, E - K")
        rules["token_rounding"] = TokenRounding(token_rounding, rounding_extra, choice_groups)
    if forced_balance:
        rules["forced_balance"] = ForcedBalance()
    if len(rules) > 1:
        raise ValueError(f"{', '.join(rules)}: got {len(rules)} rules of choice, wanted at most one")
    rule = next(iter(rules.values()), None)
    if choice_groups > 1 and not isinstance(rule, (ExpertChoice, Sinkhorn, TokenRounding)):
        raise ValueError(
            f"choice_groups: got {choice_groups} without a rule that looks at a batch, wanted 1, or expert_choice, "
            "sinkhorn or token_rounding beside it"
        )
    return rule
