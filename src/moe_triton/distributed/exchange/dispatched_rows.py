"""What an innermost stage makes of rows before its experts compute: the Dispatch of those that are for them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moe_triton.dispatch import dispatch, sorted_dispatch
from moe_triton.distributed.exchange.stages import Saved
from moe_triton.records import Dispatch


class DispatchedRows:
    """The two entries of an `InnerStage`, for a class that defines `compute`.

    num_experts  of this rank
    backend      makes the Dispatch
    """

    num_experts: int
    backend: str

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        """See `stages.Stage`."""
        dispatched = dispatch(ids, self.num_experts, backend=self.backend)
        return self.compute(x, weights, shortened(dispatched, assignments), saved)

    def forward_sorted(self, x: Tensor, weights: Tensor, counts: Tensor, starts: Tensor | None, saved: Saved) -> Tensor:
        """See `stages.InnerStage`."""
        here = slice(self.num_experts)  # the last rank may have fewer experts than the others
        starts = None if starts is None else starts[here]
        return self.compute(x, weights, sorted_dispatch(counts[here], x.shape[0], starts), saved)

    def compute(self, x: Tensor, weights: Tensor, dispatched: Dispatch, saved: Saved) -> Tensor:
        """Compute [R, d] of rows x [R, d], weights [R, J] and their Dispatch."""
        raise NotImplementedError


def shortened(dispatched: Dispatch, num_rows: int) -> Dispatch:
    """Return the same Dispatch with room for `num_rows` rows, which the kept ones must not exceed."""
    if num_rows >= dispatched.source.shape[0]:
        return dispatched
    return replace(dispatched, source=dispatched.source[:num_rows])
