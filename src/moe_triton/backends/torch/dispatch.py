"""Dispatch in plain torch: a stable sort of the assignments by expert, and the ranks that capacity needs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def build_dispatch(
    experts: Tensor, num_experts: int, capacity: int | None, capacity_groups: int, by_choice: bool, keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choices [T, K] -> counts [E], offsets [E+1], source [S], position [T, K], all int32, with no host sync.

    The definition is `moe_triton.reference.dispatch`, the fields are those of `moe_triton.records.Dispatch`.
    """
    num_tokens, top_k = experts.shape
    num_slots = num_tokens * top_k
    slot_S = torch.arange(num_slots, device=experts.device, dtype=torch.int32)
    expert_S = experts.reshape(-1)
    valid_S = (expert_S >= 0) & (expert_S < num_experts)
    bucket_S = torch.where(valid_S, expert_S.int(), num_experts)  # bucket E holds what no expert gets
    edges = torch.arange(num_experts + 1, device=experts.device, dtype=torch.int32)
    sorted_bucket_S, row_to_slot_S = _stable_sort(bucket_S, num_experts + 1)
    offsets = torch.searchsorted(sorted_bucket_S, edges, out_int32=True)
    counts = offsets.diff()

    if capacity is not None and num_slots > 0:
        kept_S = _within_capacity(bucket_S, num_tokens, top_k, num_experts, capacity, capacity_groups, by_choice, keys)
        bucket_S = torch.where(kept_S, bucket_S, num_experts)
        sorted_bucket_S, row_to_slot_S = _stable_sort(bucket_S, num_experts + 1)
        offsets = torch.searchsorted(sorted_bucket_S, edges, out_int32=True)

    is_kept_S = sorted_bucket_S < num_experts
    source = torch.where(is_kept_S, row_to_slot_S, -1).int()
    position = torch.empty_like(slot_S)
    position[row_to_slot_S] = torch.where(is_kept_S, slot_S, -1)
    return counts, offsets, source, position.view(num_tokens, top_k)


def _within_capacity(
    bucket_S: Tensor,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    capacity: int,
    capacity_groups: int,
    by_choice: bool,
    keys: Tensor | None,
) -> Tensor:
    """True [S] for the assignments that are among the `capacity` most important of their (group, expert) queue."""
    num_slots = num_tokens * top_k
    slot_S = torch.arange(num_slots, device=bucket_S.device)
    order_S = slot_S  # the most important assignment first
    if keys is not None:
        order_S = keys.reshape(-1).sort(descending=True, stable=True).indices
    elif by_choice:
        order_S = slot_S.view(num_tokens, top_k).T.reshape(-1)
    group_S = slot_S // (num_slots // capacity_groups)
    queue_S = (group_S * (num_experts + 1) + bucket_S)[order_S]
    sorted_queue_S, by_queue_S = _stable_sort(queue_S, capacity_groups * (num_experts + 1))
    rank_S = slot_S - torch.searchsorted(sorted_queue_S, sorted_queue_S)
    kept_S = torch.empty(num_slots, dtype=torch.bool, device=bucket_S.device)
    kept_S[order_S[by_queue_S]] = rank_S < capacity
    return kept_S


def _stable_sort(ids: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    """Ids in [0, num_ids), sorted, and the index that each had: Tensor.sort(stable=True)."""
    if ids.device.type != "cpu" or num_ids > 2**16:
        return ids.sort(stable=True)
    # numpy sorts 16-bit integers by radix, about twenty times as fast.
    index = torch.from_numpy(np.argsort(ids.numpy().astype(np.uint16), kind="stable"))
    return ids[index], index


def build_small_dispatch(experts: Tensor, num_experts: int) -> None:
    """Return None: there are no launches to save."""
