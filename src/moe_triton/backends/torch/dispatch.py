"""Dispatch in plain torch: a stable sort of the assignments by expert, and the ranks that capacity needs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_triton.backends.torch.fused import data, loops_problem
from moe_triton.records import Dispatch


def build_dispatch(
    experts: Tensor, num_experts: int, capacity: int | None, capacity_groups: int, by_choice: bool, keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choices [T, K] -> counts [E], offsets [E+1], source [S], position [T, K], all int32, with no host sync.

    The definition is `moe_triton.reference.dispatch`, the fields are those of `moe_triton.records.Dispatch`.
    """
    num_tokens, top_k = experts.shape
    bucket_S = _buckets(experts.reshape(-1), num_experts)
    counts, offsets, source, position = _in_expert_order(bucket_S, num_experts)
    if capacity is not None and bucket_S.numel() > 0:
        kept_S = _within_capacity(bucket_S, num_tokens, top_k, num_experts, capacity, capacity_groups, by_choice, keys)
        bucket_S = torch.where(kept_S, bucket_S, num_experts)
        _, offsets, source, position = _in_expert_order(bucket_S, num_experts)
    return counts, offsets, source, position.view(num_tokens, top_k)


def _buckets(expert_S: Tensor, num_experts: int) -> Tensor:
    """The experts, with E for what no expert gets."""
    if expert_S.device.type == "cpu":
        ids = expert_S.numpy()
        unsigned = ids.view(np.uint32 if ids.itemsize == 4 else np.uint64)  # a negative id is a large one
        return torch.from_numpy(np.minimum(unsigned, num_experts).view(ids.dtype))
    valid_S = (expert_S >= 0) & (expert_S < num_experts)
    return torch.where(valid_S, expert_S.int(), num_experts)


def _in_expert_order(bucket_S: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts [E], offsets [E+1], source [S] and position [S] of rows in the order of their buckets; E has no rows."""
    if bucket_S.device.type == "cpu":
        return _in_expert_order_by_numpy(bucket_S.numpy(), num_experts)
    slot_S = torch.arange(bucket_S.numel(), device=bucket_S.device, dtype=torch.int32)
    edges = torch.arange(num_experts + 1, device=bucket_S.device, dtype=torch.int32)
    sorted_bucket_S, row_to_slot_S = bucket_S.sort(stable=True)
    offsets = torch.searchsorted(sorted_bucket_S, edges, out_int32=True)
    is_kept_S = sorted_bucket_S < num_experts
    source = torch.where(is_kept_S, row_to_slot_S, -1).int()
    position = torch.empty_like(slot_S)
    position[row_to_slot_S] = torch.where(is_kept_S, slot_S, -1)
    return offsets.diff(), offsets, source, position


def _in_expert_order_by_numpy(bucket_S: np.ndarray, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_in_expert_order` on a CPU, where a small operation takes half as long in numpy, and a sort a twentieth."""
    num_slots = bucket_S.shape[0]
    order_S = _stable_argsort(bucket_S, num_experts + 1)
    counts = np.bincount(bucket_S, minlength=num_experts + 1)[:num_experts].astype(np.int32)
    offsets = np.zeros(num_experts + 1, dtype=np.int32)
    counts.cumsum(out=offsets[1:])
    source, position = order_S.astype(np.int32), np.empty(num_slots, dtype=np.int32)
    position[order_S] = np.arange(num_slots, dtype=np.int32)
    num_rows = offsets[-1]
    if num_rows < num_slots:
        source[num_rows:] = -1
        position[order_S[num_rows:]] = -1
    return torch.from_numpy(counts), torch.from_numpy(offsets), torch.from_numpy(source), torch.from_numpy(position)


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
    if ids.device.type != "cpu":
        return ids.sort(stable=True)
    index = torch.from_numpy(_stable_argsort(ids.numpy(), num_ids))
    return ids[index], index


def _stable_argsort(ids: np.ndarray, num_ids: int) -> np.ndarray:
    """Numpy sorts 16-bit integers by radix, about twenty times as fast as others."""
    return np.argsort(ids.astype(np.uint16) if num_ids <= 2**16 else ids, kind="stable")


def build_small_dispatch(experts: Tensor, num_experts: int) -> Dispatch | None:
    """`build_dispatch` without a capacity, in one loop; None where there is none."""
    if experts.device.type != "cpu" or loops_problem() is not None:
        return None
    from moe_triton.backends.torch.routing_loops import dispatch_loop

    shape, size = tuple(experts.shape), experts.numel()
    counts, offsets = np.empty(num_experts, np.int32), np.empty(num_experts + 1, np.int32)
    source, position = np.empty(size, np.int32), np.empty(shape, np.int32)
    dispatch_loop()(data(experts).reshape(size), counts, offsets, source, position.reshape(size))
    return Dispatch(
        counts=torch.from_numpy(counts),
        offsets=torch.from_numpy(offsets),
        source=torch.from_numpy(source),
        position=torch.from_numpy(position),
    )
