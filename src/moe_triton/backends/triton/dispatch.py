"""Dispatch by the Triton kernels; the definition is `reference.dispatch`."""

from __future__ import annotations

from torch import Tensor

from moe_triton_kernels.permutation import permute


def build_dispatch(
    experts: Tensor, num_experts: int, capacity: int | None, capacity_groups: int, by_choice: bool, keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts [T, K] -> counts [E], offsets [E+1], source [S], position [T, K], all int32."""
    return permute(
        experts, num_experts, capacity=capacity, capacity_groups=capacity_groups, by_choice=by_choice, keys=keys
    )
