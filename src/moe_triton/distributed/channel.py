"""The collectives of one group on behalf of one layer: named, so that a failure says where and whose it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from moe_triton.distributed.errors import ExpertParallelError, missing_ranks
from moe_triton.distributed.groups import Group

Listener = Callable[[str], None]


class Work(Protocol):
    """What torch's asynchronous collectives return."""

    def wait(self) -> object: ...


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A group of at least two ranks, the layer that talks over it, and who wants to hear of it.

    layer      as error messages call it
    listener   called with "issue X" when collective X is issued, and with what `note` is given
    """

    group: Group
    layer: str
    listener: Listener | None = None

    def note(self, event: str) -> None:
        if self.listener is not None:
            self.listener(event)

    def all_to_all(
        self, out: Tensor, rows: Tensor, received: Sequence[int], sent: Sequence[int], phase: str
    ) -> Callable[[], None]:
        """Rows [sum sent, ...] by destination to `out` [sum received, ...] by source. Returns the wait for it."""
        return self._issue(
            phase,
            lambda: dist.all_to_all_single(
                out, rows, list(received), list(sent), group=self.group.handle, async_op=True
            ),
        )

    def all_gather(self, out: Tensor, rows: Tensor, phase: str) -> Callable[[], None]:
        """Rows [M, ...] of every rank to `out` [P*M, ...]. Returns the wait for it."""
        return self._issue(
            phase, lambda: dist.all_gather_into_tensor(out, rows, group=self.group.handle, async_op=True)
        )

    def all_reduce(self, tensor: Tensor, phase: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """In place, waited for."""
        self._issue(phase, lambda: dist.all_reduce(tensor, op, group=self.group.handle, async_op=True))()

    def gather_objects(self, value: object, phase: str) -> list[object]:
        """Every rank's small Python value, in rank order."""
        found: list[object] = [None] * self.group.size
        with self._blame(phase):
            dist.all_gather_object(found, value, group=self.group.handle)
        return found

    def _issue(self, phase: str, start: Callable[[], Work | None]) -> Callable[[], None]:
        self.note(f"issue {phase}")
        with self._blame(phase), record_function(f"moe_triton: {phase}"):
            work = start()

        def wait() -> None:
            with self._blame(phase):
                if work is not None:
                    work.wait()

        return wait

    def _blame(self, phase: str) -> _Blame:
        return _Blame(self, phase)


class _Blame:
    """Turns a collective's RuntimeError into one that names rank, layer, phase and the ranks that are missing."""

    def __init__(self, channel: Channel, phase: str) -> None:
        self.channel, self.phase = channel, phase

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, ExpertParallelError):
            where = f"rank {dist.get_rank()}, {self.channel.layer}, {self.phase}"
            missing = missing_ranks(self.channel.group.ranks, where)
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ExpertParallelError(f"{where}: {missing} ({cause})") from error


def to_host(*tensors: Tensor) -> Callable[[], list[list[int]]]:
    """Starts copying integer tensors to the host; what it returns waits for that copy alone and gives their elements.

    On a GPU the copy is one, into pinned memory, on a stream of its own behind what is queued now.
    """
    sizes = [tensor.numel() for tensor in tensors]
    packed = torch.cat([tensor.reshape(-1).to(torch.int64) for tensor in tensors])
    if packed.device.type != "cuda":
        host, done = packed, None
    else:
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        side = _copy_stream(packed.device)
        side.wait_stream(torch.cuda.current_stream(packed.device))
        with torch.cuda.stream(side):
            host.copy_(packed, non_blocking=True)
            done = side.record_event()
        packed.record_stream(side)

    def read() -> list[list[int]]:
        if done is not None:
            done.synchronize()
        return [part.tolist() for part in host.split(sizes)]

    return read


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
