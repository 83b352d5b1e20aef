"""Dispatch by the Triton kernels; the definition is `reference.dispatch`."""

from __future__ import annotations

from torch import Tensor

from moe_triton.records import TiledDispatch
from moe_triton_kernels.permutation import permute
from moe_triton_kernels.small_dispatch import MAX_SLOTS, small_dispatch


def build_dispatch(
    experts: Tensor, num_experts: int, capacity: int | None, capacity_groups: int, by_choice: bool, keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts [T, K] -> counts [E], offsets [E+1], source [S], position [T, K], all int32."""
    return permute(
        experts, num_experts, capacity=capacity, capacity_groups=capacity_groups, by_choice=by_choice, keys=keys
    )


def build_small_dispatch(experts: Tensor, num_experts: int) -> TiledDispatch | None:
    """Return a Dispatch without a capacity, with its tile tables, from one launch; None unless 1 <= S <= MAX_SLOTS."""
    if not 0 < experts.numel() <= MAX_SLOTS:
        return None
    counts, offsets, source, position, tiles = small_dispatch(experts, num_experts)
    return TiledDispatch(counts=counts, offsets=offsets, source=source, position=position, tiles=tiles)
