"""The package's own exchange, over the collectives of torch.distributed: what `ExpertParallel` uses by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moe_triton.distributed.exchange import transport as transports
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.exchange.overlap import Deferred
from moe_triton.distributed.exchange.rows import Exchange
from moe_triton.distributed.exchange.stages import ExchangeSpec, InnerStage
from moe_triton.distributed.exchange.transport import Shape, Transport


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """Makes `Exchange` stages in one of the modes of `ExpertParallel`."""

    mode: str
    max_rows_per_pair: int | None = None

    def __call__(self, inner: InnerStage, spec: ExchangeSpec) -> Exchange:
        def planner(ids: Tensor, weights: Tensor, _assignments: int) -> Callable[[], Transport]:
            return self._plan(ids, weights, spec)

        return Exchange(
            planner=planner, inner=inner, channel=spec.channel, backend=spec.shape.backend,
            dispatch_dtype=spec.dispatch_dtype, overlap_with=spec.overlap_with,
        )  # fmt: skip

    def _plan(self, ids: Tensor, weights: Tensor, spec: ExchangeSpec) -> Callable[[], Transport]:
        channel, shape, max_tokens = spec.channel, spec.shape, spec.max_tokens
        if self.mode == "dropless" or (self.mode == "capacity" and spec.places is None):
            return transports.plan_dropless(channel, ids, weights, shape)
        assert max_tokens is not None
        if spec.places is not None:
            transport = transports.plan_capacity(channel, ids, weights, shape, capacity=spec.places)
        elif self.mode == "bounded":
            transport, overflow = transports.plan_bounded(
                channel, ids, weights, shape, max_tokens=max_tokens, max_rows=self.max_rows_per_pair
            )
            if self.max_rows_per_pair is not None:
                limit = f"max_rows_per_pair={self.max_rows_per_pair}"
                spec.watch(channel, overflow, f"more rows for another rank than {limit}")
        else:
            transport = transports.plan_allgather(channel, ids, weights, shape, max_tokens=max_tokens)
        return lambda: transport


def exchange_over_slices(inner: InnerStage, shape: Shape, channel: Channel, overlap_with: Deferred | None) -> Exchange:
    """Return the exchange between slices of the same experts: each sees all rows, partial sums are added at home."""
    whole = replace(shape, chunks=1, per_rank=shape.num_experts)

    def planner(ids: Tensor, weights: Tensor, assignments: int) -> Callable[[], Transport]:
        sizes = torch.tensor([ids.shape[0], assignments], device=ids.device)
        channel.all_reduce(sizes, "exchange of the row counts", dist.ReduceOp.MAX)
        rows, most = sizes.tolist()
        transport = transports.plan_allgather(channel, ids, weights, whole, max_tokens=rows, assignments=most)
        return lambda: transport

    return Exchange(planner=planner, inner=inner, channel=channel, backend=shape.backend, overlap_with=overlap_with)
