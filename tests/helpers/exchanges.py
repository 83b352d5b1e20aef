"""Imitations over gloo of what other exchanges are built on: DeepEP's buffer, and torch's symmetric memory.

Their signatures are those of the originals. What arrives is NaN until the event that stands for it is waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_triton.distributed.exchange import symmetric_memory

# DeepEP 2.1.0, deep_ep/buffers/elastic.py ---------------------------------------------------------------------------


class EventOverlap:
    """values: what is in the tensors once this is waited for; at once where nothing is asynchronous."""

    def __init__(self, *values: Tensor, is_async: bool) -> None:
        self.values = values
        self.tensors = [torch.full(v.shape, torch.nan).to(v.dtype) for v in values]
        if not is_async:
            self.current_stream_wait()

    def current_stream_wait(self, release_handle: bool = False) -> None:
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.copy_(value)


@dataclass
class EPHandle:
    topk_idx: Tensor
    num_recv_tokens_per_expert_list: list[int]
    sent: list[Tensor]  # by rank: the tokens
    received: list[int]


def sent_rows(x: Tensor, sent: list[Tensor], received: list[int], group: Any) -> Tensor:
    """The rows of x that every rank wants of every other."""
    rows = x[torch.cat(sent)].contiguous()
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(
        out.view(torch.uint8), rows.view(torch.uint8), received, [len(tokens) for tokens in sent], group=group
    )
    return out


class ElasticBuffer:
    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(
        self, group: dist.ProcessGroup, num_bytes: int | None = None, num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0, hidden: int = 0, num_topk: int = 0, use_fp8_dispatch: bool = False,
        deterministic: bool = False, allow_hybrid_mode: bool = True, allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True, sl_idx: int = 3, num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300, num_gpu_timeout_secs: int = 100, explicitly_destroy: bool = False,
    ) -> None:  # fmt: skip
        self.group, self.num_topk, self.hidden = group, num_topk, hidden
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        ElasticBuffer.made.append({"hidden": hidden, "num_topk": num_topk, "deterministic": deterministic})

    def dispatch(
        self, x: Any, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None, num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None, expert_alignment: int | None = None, num_sms: int = 0,
        num_qps: int = 0, previous_event: Any = None, previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None, do_handle_copy: bool = True, do_cpu_sync: bool | None = None,
        do_expand: bool = False, do_zero_padding: bool = False, use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, EPHandle, EventOverlap]:  # fmt: skip
        parts = x if isinstance(x, tuple) else (x,)
        assert all(part.is_contiguous() for part in parts)
        assert parts[0].shape[1] == self.hidden
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            assert not do_cpu_sync
            event = EventOverlap(
                *(sent_rows(part, handle.sent, handle.received, self.group) for part in parts),
                is_async=async_with_compute_stream,
            )
            return tuple(event.tensors) if isinstance(x, tuple) else event.tensors[0], None, None, handle, event
        assert topk_idx is not None
        assert topk_idx.dtype == torch.int64
        assert topk_idx.shape == (len(parts[0]), self.num_topk)
        assert len(topk_idx) <= self.num_max_tokens_per_rank
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        assert num_experts is not None
        per_rank = num_experts // ranks
        sent = [
            ((topk_idx >= r * per_rank) & (topk_idx < (r + 1) * per_rank)).any(1).nonzero()[:, 0] for r in range(ranks)
        ]
        counts = torch.tensor([len(tokens) for tokens in sent])
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        handle = EPHandle(topk_idx.clone(), [], sent, received.tolist())
        recv_idx = sent_rows(topk_idx, sent, handle.received, self.group) - rank * per_rank
        recv_idx = torch.where((recv_idx >= 0) & (recv_idx < per_rank), recv_idx, -1)
        handle.num_recv_tokens_per_expert_list = [int((recv_idx == expert).sum()) for expert in range(per_rank)]
        event = EventOverlap(
            *(sent_rows(part, sent, handle.received, self.group) for part in (*parts, topk_weights)),
            is_async=async_with_compute_stream,
        )
        *recv_x, recv_weights = event.tensors
        return tuple(recv_x) if isinstance(x, tuple) else recv_x[0], recv_idx, recv_weights, handle, event

    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None, bias: Any = None, num_sms: int = 0,
        num_qps: int = 0, previous_event: Any = None, previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:  # fmt: skip
        event = EventOverlap(
            *(self._sum(rows, handle) for rows in (x, topk_weights) if rows is not None),
            is_async=async_with_compute_stream,
        )
        return event.tensors[0], event.tensors[1] if topk_weights is not None else None, event

    def _sum(self, rows: Tensor, handle: EPHandle) -> Tensor:
        tokens = torch.cat(handle.sent)
        home = rows.new_empty(len(tokens), rows.shape[1])
        sizes = [len(part) for part in handle.sent]
        dist.all_to_all_single(home, rows.contiguous(), sizes, handle.received, group=self.group)
        return rows.new_zeros(len(handle.topk_idx), rows.shape[1]).index_add_(0, tokens, home)


@contextmanager
def imitated_deep_ep() -> Iterator[None]:
    module = ModuleType("deep_ep")
    module.__spec__ = ModuleSpec("deep_ep", None)
    module.ElasticBuffer, module.topk_idx_t = ElasticBuffer, torch.int64  # type: ignore[attr-defined]
    ElasticBuffer.made.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_ep", module)
        yield


# torch.ops.symm_mem -------------------------------------------------------------------------------------------------


def exchanged(input: Tensor, pieces: list[tuple[int, int]], group: Any) -> tuple[list[list[Tensor]], Tensor]:
    """pieces: (first row, rows) of what goes to each rank, equally many for each, in rank order. By source: pieces."""
    ranks = dist.get_world_size(group)
    each = len(pieces) // ranks
    sizes = torch.tensor([rows for _, rows in pieces]).view(ranks, each)
    arriving = torch.empty_like(sizes)
    dist.all_to_all_single(arriving, sizes, group=group)
    rows = torch.cat([input[first : first + rows] for first, rows in pieces])
    out = input.new_empty(int(arriving.sum()), *input.shape[1:])
    dist.all_to_all_single(out, rows, arriving.sum(1).tolist(), sizes.sum(1).tolist(), group=group)
    by_source = out.split(arriving.sum(1).tolist())
    return [list(part.split(row.tolist())) for part, row in zip(by_source, arriving, strict=True)], arriving


def write(out: Tensor, places: Tensor, pieces: list[Tensor], starts: list[int]) -> None:
    for i, (piece, start) in enumerate(zip(pieces, starts, strict=True)):
        assert start + len(piece) <= len(out), "the original writes past the end"
        out[start : start + len(piece)] = piece
        places[0, i], places[1, i] = len(piece), start


def resolve(group_name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(group_name)


def all_to_all_vdev_2d(
    input: Tensor, out: Tensor, in_splits: Tensor, out_splits_offsets: Tensor, group_name: str,
    major_align: int | None = None,
) -> None:  # fmt: skip
    group = resolve(group_name)
    ranks = dist.get_world_size(group)
    check_original(input, out, in_splits, out_splits_offsets)
    assert out_splits_offsets.shape == (2, len(in_splits))
    sizes = in_splits.tolist()
    firsts = (in_splits.cumsum(0) - in_splits).tolist()
    by_source, _ = exchanged(input, list(zip(firsts, sizes, strict=True)), group)
    align, pieces, starts, first = major_align or 1, [], [], 0
    for expert in range(len(sizes) // ranks):
        at = first
        for source in range(ranks):
            pieces.append(by_source[source][expert])
            starts.append(at)
            at += len(pieces[-1])
        first += max(-(-(at - first) // align) * align, align)  # an expert without rows gets a place
    write(out, out_splits_offsets, pieces, starts)


def all_to_all_vdev_2d_offset(
    input: Tensor, out: Tensor, in_splits_offsets: Tensor, out_splits_offsets: Tensor, group_name: str
) -> None:
    group = resolve(group_name)
    check_original(input, out, in_splits_offsets, out_splits_offsets)
    ranks = dist.get_world_size(group)
    experts = in_splits_offsets.shape[1] // ranks
    sizes, firsts = in_splits_offsets.tolist()
    order = [expert * ranks + rank for rank in range(ranks) for expert in range(experts)]
    by_source, _ = exchanged(input, [(firsts[i], sizes[i]) for i in order], group)
    pieces = [piece for part in by_source for piece in part]
    lengths = torch.tensor([len(piece) for piece in pieces])
    write(out, out_splits_offsets, pieces, (lengths.cumsum(0) - lengths).tolist())


SYMMETRIC: set[int] = set()


def check_original(input: Tensor, out: Tensor, *splits: Tensor) -> None:
    """What the original checks."""
    assert all(tensor.data_ptr() in SYMMETRIC and tensor.is_contiguous() for tensor in (input, out, *splits))
    assert input.dtype == out.dtype
    assert input.stride(0) == out.stride(0)
    assert all(tensor.dtype == torch.int64 for tensor in splits)


@contextmanager
def imitated_symmetric_memory() -> Iterator[None]:
    def empty(shape: Any, dtype: torch.dtype, device: torch.device, group: Any) -> Tensor:
        shapes: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(shapes, (tuple(shape), dtype), group=group)
        assert len(set(shapes)) == 1, f"symmetric memory is equal on all ranks, got {shapes}"
        memory = torch.full(tuple(shape), 255 if dtype == torch.uint8 else -7, dtype=dtype)  # 255: NaN
        SYMMETRIC.add(memory.data_ptr())
        return memory

    library = torch.library.Library("symm_mem", "IMPL", "CPU")  # by the schema of torch's own operation
    library.impl("all_to_all_vdev_2d", all_to_all_vdev_2d)
    library.impl("all_to_all_vdev_2d_offset", all_to_all_vdev_2d_offset)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(symmetric_memory, "symmetric_empty", empty)
            patch.setattr(symmetric_memory, "symmetric_memory_problem", lambda device: None)
            yield
    finally:
        library._destroy()
        SYMMETRIC.clear()
