"""torch's symmetric memory as an exchange: `torch.ops.symm_mem.all_to_all_vdev_2d` and its reverse, over NVSHMEM.

The sizes of what travels stay on the device, so that there is no host sync, and rows arrive in the order of the
receiver's experts, a row per choice. A row is one message of bytes: the hidden state, as codes and scales where it is
sent in fp8, and its router weight.

Every rank reads from the others' memory, behind a barrier that is part of each operation. Dispatches and combines
alternate, each with buffers of its own: when a rank writes to a buffer again, all have met in a later operation, so
nobody reads any more what was in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton import runtime
from moe_triton.dispatch import dispatch
from moe_triton.distributed.exchange.fp8_rows import pack_rows, unpack_rows
from moe_triton.distributed.exchange.stages import ExchangeSpec, InnerStage, Saved
from moe_triton.distributed.exchange.tails import as_bytes
from moe_triton.distributed.groups import Group
from moe_triton.records import Dispatch
from moe_triton.torch_internals import symmetric_empty, symmetric_memory_problem

ALIGNMENT = 16  # bytes: of a message, so that rows are copied in words


class SymmetricMemory:
    """Moves rows through torch's symmetric memory, without a host sync.

        ExpertParallel(groups, exchange=SymmetricMemory(max_rows=16384), max_tokens_per_rank=4096)

    Needs CUDA GPUs, NVSHMEM, and `TORCH_SYMMMEM=NVSHMEM` in the environment (or torch's `set_backend`). torch limits
    the ranks of a group and the experts of a rank (16 each in the source that was read), and says so itself. The shared
    expert is computed after the exchange.

    Args:
        max_rows: the most rows that a rank has room for, with a row per choice of a token; the same on all ranks. None:
            as many as all ranks together can send to it, which is ranks * max_tokens_per_rank * min(K, E / ranks).
            The choices of a rank that would get more are left out; every rank raises, on a GPU in its next call.

    Raises:
        RuntimeError: where symmetric memory cannot be used, at the first call.
    """

    def __init__(self, *, max_rows: int | None = None) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows: got {max_rows}, wanted at least 1")
        self.max_rows = max_rows
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def __repr__(self) -> str:
        return f"SymmetricMemory(max_rows={self.max_rows})"

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_buffers": {}}

    def __call__(self, inner: InnerStage, spec: ExchangeSpec) -> SymmetricStage:
        """Return the stage of one call."""
        if spec.max_tokens is None:
            raise ValueError(
                "max_tokens_per_rank: got None with SymmetricMemory, wanted the most tokens that a rank passes"
            )
        return SymmetricStage(inner=inner, spec=spec, buffer=self.buffer, max_rows=self.max_rows)

    def buffer(
        self, use: str, group: Group, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return symmetric memory for one use, the same memory for equal arguments."""
        key = (use, group.name, shape, dtype, device)
        if key not in self._buffers:
            if (problem := symmetric_memory_problem(device)) is not None:
                raise RuntimeError(f"exchange: got SymmetricMemory, which {problem}")
            self._buffers[key] = symmetric_empty(shape, dtype, device, group.handle)
        return self._buffers[key]


@dataclass(kw_only=True)
class SymmetricCall:
    """One forward: the Dispatch of its choices to all experts; sizes and places of what arrived, [2, L * P] int64."""

    dispatched: Dispatch
    arrived: Tensor


@dataclass(kw_only=True)
class SymmetricStage:
    """See `stages.Stage`. P ranks of L experts each; C: the rows that a rank has room for."""

    inner: InnerStage
    spec: ExchangeSpec
    buffer: Callable[..., Tensor]
    max_rows: int | None
    calls: list[SymmetricCall] = field(default_factory=list)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        dispatched = self._dispatched(ids)
        as_fp8 = self.spec.dispatch_dtype is not None
        rows_Tb = pack_rows(x) if as_fp8 else as_bytes(x)
        messages, arrived = self._send(rows_Tb, weights, dispatched)
        rows_Cb, weights_C1 = split_messages(messages, rows_Tb.shape[1], weights.dtype)
        rows_Cd = unpack_rows(rows_Cb, x.shape[1], x.dtype) if as_fp8 else rows_Cb.view(x.dtype)
        size, place = arrived.view(2, -1, self.spec.group.size)
        y_Cd = self.inner.forward_sorted(rows_Cd, weights_C1, size.sum(1), place[:, 0], saved)
        self.calls.append(SymmetricCall(dispatched=dispatched, arrived=arrived))
        home, _ = self._send_back(y_Cd, weights_C1, arrived, dispatched)
        return home

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        here = self.calls[call]
        no_weights = torch.zeros(here.dispatched.position.shape, device=grad.device)
        messages, _ = self._send(as_bytes(grad), no_weights, here.dispatched)
        rows_Cb, _ = split_messages(messages, grad.shape[1] * grad.element_size(), no_weights.dtype)
        grad_x, grad_weights = self.inner.start_backward(call, rows_Cb.view(grad.dtype), saved)()
        found = self._send_back(grad_x, grad_weights, here.arrived, here.dispatched)
        return lambda: found

    def _dispatched(self, ids: Tensor) -> Dispatch:
        """The choices in the order of all experts, without those of ranks that would get more rows than fit."""
        group, shape, channel = self.spec.group, self.spec.shape, self.spec.channel
        slots = group.size * shape.per_rank
        dispatched = dispatch(ids, slots, backend=shape.backend)
        if self.max_rows is None:
            return dispatched
        counts = torch.empty(group.size * slots, dtype=torch.int32, device=ids.device)
        channel.all_gather(counts, dispatched.counts, "exchange of counts")()
        is_full_P = counts.view(group.size, group.size, -1).sum((0, 2)) > self.max_rows
        self.spec.watch(channel, is_full_P[group.rank].int(), f"more than max_rows={self.max_rows} rows to receive")
        is_left_out = is_full_P[(ids // shape.per_rank).clamp_min(0).long()]
        return dispatch(torch.where(is_left_out, -1, ids), slots, backend=shape.backend)

    def _rooms(self, dispatched: Dispatch) -> tuple[int, int]:
        """Rows that a rank may send, and that it has room for: the same on all ranks, as symmetric memory has to be."""
        shape, top_k = self.spec.shape, dispatched.top_k
        assert self.spec.max_tokens is not None
        most = self.spec.group.size * self.spec.max_tokens * min(top_k, shape.per_rank)
        received = most if self.max_rows is None else min(most, self.max_rows)
        # an expert without rows takes the place of one
        return max(self.spec.max_tokens * top_k, 1), received + shape.per_rank

    def _send(self, rows_Tb: Tensor, weights_TK: Tensor, dispatched: Dispatch) -> tuple[Tensor, Tensor]:
        """Send a message per choice to its expert; the messages that arrive [C, .], and their sizes and places."""
        slot = dispatched.source.clamp_min(0).long()
        messages = join_messages(rows_Tb[slot // dispatched.top_k], weights_TK.reshape(-1)[slot])
        room_sent, room_received = self._rooms(dispatched)
        sent = self._memory("sent", (room_sent, messages.shape[1]), messages)
        received = self._memory("received", (room_received, messages.shape[1]), messages)
        sizes = self._memory("sizes", dispatched.counts.shape, dispatched.counts.long())
        places = self._memory("places", (2, *sizes.shape), sizes)
        sent[: messages.shape[0]] = messages
        sizes.copy_(dispatched.counts)
        with self.spec.channel.error_context("all_to_all_vdev_2d"):
            torch.ops.symm_mem.all_to_all_vdev_2d(sent, received, sizes, places, self.spec.group.name)
        return received, places.clone()

    def _send_back(
        self, rows_Cd: Tensor, weights_C1: Tensor, arrived: Tensor, dispatched: Dispatch
    ) -> tuple[Tensor, Tensor]:
        """Send rows and weights back; the sums of each token's rows [T, d], and the weights by choice [T, K]."""
        messages = join_messages(as_bytes(rows_Cd), weights_C1)
        room_sent, room_received = self._rooms(dispatched)
        back = self._memory("back", (room_received, messages.shape[1]), messages)
        home = self._memory("home", (room_sent, messages.shape[1]), messages)
        places = self._memory("places of back", arrived.shape, arrived)
        home_places = self._memory("places of home", arrived.shape, arrived)
        back.copy_(messages)
        places.copy_(arrived)
        with self.spec.channel.error_context("all_to_all_vdev_2d_offset"):
            torch.ops.symm_mem.all_to_all_vdev_2d_offset(back, home, places, home_places, self.spec.group.name)
        rows, weights_S1 = split_messages(home, rows_Cd.shape[1] * rows_Cd.element_size(), weights_C1.dtype)
        combined = runtime.experts_backend(self.spec.shape.backend, rows.device).combine_rows(
            rows.view(rows_Cd.dtype), dispatched.position
        )
        weights = weights_S1[dispatched.position.clamp_min(0).long(), 0]
        return combined, torch.where(dispatched.position >= 0, weights, 0)

    def _memory(self, use: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self.buffer(use, self.spec.group, tuple(shape), like.dtype, like.device)


def join_messages(rows: Tensor, weights: Tensor) -> Tensor:
    """Return rows [R, b] uint8, and a weight each, as messages of whole words."""
    messages = torch.cat([rows, as_bytes(weights.reshape(-1, 1))], 1)
    return F.pad(messages, (0, -messages.shape[1] % ALIGNMENT))


def split_messages(messages: Tensor, num_bytes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return copies of the rows [R, num_bytes] uint8 and the weights [R, 1] of messages."""
    weights = messages[:, num_bytes : num_bytes + dtype.itemsize]
    rows, weights = (part.clone(memory_format=torch.contiguous_format) for part in (messages[:, :num_bytes], weights))
    return rows, weights.view(dtype)
