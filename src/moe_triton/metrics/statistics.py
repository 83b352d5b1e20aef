"""The statistics of one layer's load, and their arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from moe_triton.checks import INTEGERS, check_int, check_tensor


class ExchangeStatistics(NamedTuple):
    """What one layer's exchange did under expert parallelism, by rank: of the group that was read over, or this one.

    rows       that came to the rank's experts; a token of another rank comes once for all of its choices there
    seconds    of forward and backward in which the rank computes neither experts nor the shared expert: what the
               exchange costs, waiting for later ranks included
    imbalance  rows of the busiest rank over the mean of the ranks; None for one rank, whose share is not known
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    imbalance: float | None


def exchange_statistics(rows: Sequence[float], seconds: Sequence[float]) -> ExchangeStatistics:
    """Return the statistics of the ranks' rows and seconds. No rows at all count as even."""
    total = sum(rows)
    imbalance = None if len(rows) == 1 else max(rows) * len(rows) / total if total > 0 else 1.0
    return ExchangeStatistics(tuple(int(row) for row in rows), tuple(seconds), imbalance)


class LoadStatistics(NamedTuple):
    """The load of one layer's experts over some number of tokens. Loads are multiples of the mean load, so 1 is even.

    assignments    choices that were made (tokens times K), before dropping
    max_load       of the busiest expert; max_violation = max_load - 1 is MaxVio of arXiv 2408.15664
    min_load       of the idlest expert
    entropy        of the experts' shares, over log(E): 1 when even, 0 when one expert gets everything
    idle           experts that got nothing
    dropped        share of the assignments beyond the capacity; None where it is not known
    balance        `load_balance_loss` of this layer alone, 1 when load and scores are even; None where it is not known
    z              `z_loss`, the mean of logsumexp(logits)**2; None where it is not known
    loads          of every expert
    exchange       where the experts are spread over ranks; else None
    """

    assignments: int
    max_load: float
    min_load: float
    max_violation: float
    entropy: float
    idle: int
    dropped: float | None
    balance: float | None = None
    z: float | None = None
    loads: tuple[float, ...] = ()
    exchange: ExchangeStatistics | None = None

    @property
    def dead_experts(self) -> list[int]:
        """The experts that got nothing."""
        return [expert for expert, load in enumerate(self.loads) if load == 0]

    def __str__(self) -> str:
        dropped = "" if self.dropped is None else f", dropped {self.dropped:.2%}"
        balance = "" if self.balance is None else f", balance {self.balance:.3f}"
        exchange = ""
        if self.exchange is not None:
            exchange = f", exchange {max(self.exchange.seconds) * 1e3:.3g} ms"
            if self.exchange.imbalance is not None:
                exchange += f", busiest rank {self.exchange.imbalance:.2f} of the mean rows"
        return (
            f"load {self.min_load:.2f} to {self.max_load:.2f} of the mean, entropy {self.entropy:.3f}, "
            f"{self.idle} idle{dropped}{balance}{exchange}"
        )


def load_statistics(
    counts: Tensor, dropped: int | None = None, balance: float | None = None, z: float | None = None
) -> LoadStatistics:
    """Compute statistics of counts [E] (int32 or int64, assignments wanted per expert); this waits for the device.

    dropped: how many of the assignments were dropped; None where that is not known. balance, z: taken as they are. No
    assignments at all count as even. ValueError or TypeError on another shape or dtype, and on a negative `dropped`.
    """
    check_tensor("counts", counts, shape=("E",), dtypes=INTEGERS)
    if dropped is not None:
        check_int("dropped", dropped, low=0)
    values = [int(value) for value in counts.tolist()]
    total, size = sum(values), len(values)
    if total == 0:
        dropped_share = None if dropped is None else 0.0
        return LoadStatistics(0, 1.0, 1.0, 0.0, 1.0, size, dropped_share, balance, z, (0.0,) * size)
    mean = total / size
    shares = [value / total for value in values if value > 0]
    entropy = -sum(share * math.log(share) for share in shares) / math.log(size) if size > 1 else 1.0
    return LoadStatistics(
        assignments=total,
        max_load=max(values) / mean,
        min_load=min(values) / mean,
        max_violation=max(values) / mean - 1,
        entropy=entropy,
        idle=sum(value == 0 for value in values),
        dropped=None if dropped is None else dropped / total,
        balance=balance,
        z=z,
        loads=tuple(value / mean for value in values),
    )
