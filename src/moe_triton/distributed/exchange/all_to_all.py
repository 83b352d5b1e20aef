"""The package's own exchange, over the collectives of torch.distributed: what `ExpertParallel` uses by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_triton.distributed.exchange import transport as transports
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.exchange.counts import NodeCounts, SliceSizes
from moe_triton.distributed.exchange.overlap import Deferred
from moe_triton.distributed.exchange.rows import Exchange
from moe_triton.distributed.exchange.stages import ExchangeSpec, InnerStage
from moe_triton.distributed.exchange.transport import Routed, Shape


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """Makes `Exchange` stages in one of the modes of `ExpertParallel`."""

    mode: str
    max_rows_per_pair: int | None = None

    def __call__(self, inner: InnerStage, spec: ExchangeSpec) -> Exchange:
        return Exchange(partial(self._plan, spec), inner, spec.shape.backend, spec.dispatch_dtype, spec.overlap_with)

    def has_fixed_sizes(self, places: int | None) -> bool:
        """Return whether every rank receives equally many rows, of which some may be padding."""
        return self.mode in ("bounded", "allgather") or (self.mode == "capacity" and places is not None)

    def _plan(
        self, spec: ExchangeSpec, ids: Tensor, weights: Tensor, _assignments: int
    ) -> Callable[[Callable[[], None]], Routed]:
        channel, shape, max_tokens = spec.channel, spec.shape, spec.max_tokens
        if not self.has_fixed_sizes(spec.places):
            return transports.plan_dropless(channel, ids, weights, shape, spec.schedule, spec.slices, spec.node)
        assert max_tokens is not None
        if spec.places is not None:
            routed = transports.plan_capacity(channel, ids, weights, shape, capacity=spec.places)
        elif self.mode == "bounded":
            routed, overflow = transports.plan_bounded(
                channel, ids, weights, shape, max_tokens=max_tokens, max_rows=self.max_rows_per_pair
            )
            if overflow is not None:
                limit = f"max_rows_per_pair={self.max_rows_per_pair}"
                spec.watch(channel, overflow, f"more rows for another rank than {limit}")
        else:
            first = channel.group.rank * shape.per_rank
            routed = transports.plan_allgather(channel, ids, weights, shape, max_tokens=max_tokens, first_expert=first)
        return lambda meanwhile: routed


def exchange_in_node(
    inner: InnerStage, shape: Shape, counts: NodeCounts, dispatch_dtype: torch.dtype | None
) -> Exchange:
    """Return the exchange inside a node, whose counts the exchange between the nodes learns."""
    shape, channel = shape.runs_of(shape.per_rank, chunks=1), counts.channel

    def planner(ids: Tensor, weights: Tensor, _assignments: int) -> Callable[[Callable[[], None]], Routed]:
        routed = transports.plan_counted(channel, ids, weights, shape, counts.next())
        return lambda meanwhile: routed

    return Exchange(planner, inner, shape.backend, dispatch_dtype)


def exchange_over_slices(
    inner: InnerStage, shape: Shape, channel: Channel, sizes: SliceSizes | None, overlap_with: Deferred | None
) -> Exchange:
    """Return the exchange between slices of the same experts: each sees all rows, partial sums are added at home.

    sizes: None where all of these ranks have room for equally many rows and assignments.
    """
    whole = shape.runs_of(shape.num_experts, chunks=1)

    def planner(ids: Tensor, weights: Tensor, assignments: int) -> Callable[[Callable[[], None]], Routed]:
        rows, most = ids.shape[0], assignments
        if sizes is not None:
            rows, most = sizes.next(rows, most, ids.device)
        routed = transports.plan_allgather(channel, ids, weights, whole, max_tokens=rows, assignments=most)
        return lambda meanwhile: routed

    return Exchange(planner, inner, shape.backend, overlap_with=overlap_with)
