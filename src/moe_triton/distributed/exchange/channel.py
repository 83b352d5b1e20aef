"""The collectives of one group for one layer, each with a name, so that a failure says where it happened and why."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from moe_triton.distributed.errors import ConfigurationMismatch, ExpertParallelError
from moe_triton.distributed.exchange.failure_board import FailureBoard, failure_board, identity, logger
from moe_triton.distributed.groups import Group, all_gather_single, device_type, has_cpu_backend
from moe_triton.torch_internals import ends_recomputation

Listener = Callable[[str], None]

ISSUE, WAIT = "moe_triton: ", "moe_triton, wait: "  # names of ranges in torch.profiler, and then the phase's
MOST_AGREED = 4096  # fingerprints of a group that are kept
POLL_INTERVAL_S = 0.2  # how long to wait for a collective before checking whether it can still complete


class Work(Protocol):
    """What torch's asynchronous collectives return."""

    def wait(self, timeout: timedelta = ...) -> object: ...

    def is_completed(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A group of at least two ranks, the layer that uses it, and an optional listener.

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
        """Send rows [sum sent, ...] by destination into `out` [sum received, ...] by source. Return the wait for it."""
        return self._issue(
            phase,
            out,
            lambda: dist.all_to_all_single(
                out, rows, list(received), list(sent), group=self.group.handle, async_op=True
            ),
        )

    def all_gather(self, out: Tensor, rows: Tensor, phase: str) -> Callable[[], None]:
        """Gather the rows [M, ...] of every rank into `out` [P*M, ...]. Return the wait for it."""
        return self._issue(phase, out, lambda: all_gather_single(out, rows, group=self.group.handle, async_op=True))

    def all_reduce(self, tensor: Tensor, phase: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduce over the ranks, in place, and wait for it; a sum by default."""
        self._issue(phase, tensor, lambda: dist.all_reduce(tensor, op, group=self.group.handle, async_op=True))()

    def broadcast(self, tensor: Tensor, phase: str, source: int = 0) -> None:
        """Send the tensor of a rank of the group, by default of the first, to all, in place, and wait for it."""
        source, handle = self.group.ranks[source], self.group.handle
        self._issue(phase, tensor, lambda: dist.broadcast(tensor, source, group=handle, async_op=True))()

    def gather_objects(self, value: object, phase: str) -> list[object]:
        """Return every rank's small Python value, in rank order."""
        device = self.object_device
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
        lengths = torch.empty(self.group.size, dtype=torch.int64, device=device)
        self.all_gather(lengths, torch.tensor([mine.numel()], device=device), phase)()
        sizes = lengths.tolist()
        padded = torch.empty(self.group.size, max(sizes), dtype=torch.uint8, device=device)
        self.all_gather(padded.view(-1), F.pad(mine, (0, max(sizes) - mine.numel())), phase)()
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(padded.cpu(), sizes, strict=True)]

    def broadcast_object(self, value: object, phase: str, source: int) -> object:
        """Return the Python value that a rank of the group, by its number there, has; those of others are not read."""
        device, is_source = self.object_device, self.group.rank == source
        mine = bytearray(pickle.dumps(value)) if is_source else bytearray(1)
        size = torch.tensor([len(mine)], device=device)
        self.broadcast(size, phase, source)
        data = torch.frombuffer(mine, dtype=torch.uint8).to(device)
        data = data if is_source else torch.empty(int(size.item()), dtype=torch.uint8, device=device)
        self.broadcast(data, phase, source)
        return value if is_source else pickle.loads(data.cpu().numpy().tobytes())

    @property
    def object_device(self) -> torch.device:
        """Where Python values travel: on CPUs, unless the group has collectives of other devices only."""
        return torch.device("cpu" if has_cpu_backend(self.group.handle) else device_type())

    def agree(self, what: Mapping[str, object], phase: str, device: torch.device) -> int:
        """Return a fingerprint of `what` the ranks are about to do, once it is known to be the same on all of them.

        On a CPU it is compared every time, in one small message: gloo answers messages of unequal sizes with stale rows
        or with an abort. Elsewhere it would cost a host sync, and is compared when it is new.

        Raises:
            ConfigurationMismatch: on every rank, with what differs.
        """
        fingerprint = zlib.crc32(repr(sorted(what.items())).encode()) & 0x7FFFFFFF
        name = self.group.name
        agreed = failure_board().agreed[name]
        if device.type != "cpu" and fingerprint in agreed:
            return fingerprint
        everybody = torch.empty(self.group.size, dtype=torch.int64, device=device)
        self.all_gather(everybody, torch.tensor([fingerprint], device=device), phase)()
        if any(other != fingerprint for other in everybody.tolist()):
            raise ConfigurationMismatch(f"{self.where(phase)}: {self._differences(what)}")
        if len(agreed) == MOST_AGREED and fingerprint not in agreed:
            agreed.clear()  # on all ranks of the group at once: they have agreed on the same things
        agreed.add(fingerprint)
        return fingerprint

    def _differences(self, mine: Mapping[str, object]) -> str:
        theirs = self.gather_objects(dict(mine), "comparison of what differs")
        differences = [
            f"{name}: {mine.get(name)!r} here, {other.get(name)!r} on rank {rank}"
            for rank, other in zip(self.group.ranks, theirs, strict=True)
            if isinstance(other, dict)
            for name in dict.fromkeys((*mine, *other))
            if other.get(name) != mine.get(name)
        ]
        return f"the ranks of the group differ in {'; '.join(differences) or 'nothing here, but between others'}"

    def _issue(self, phase: str, tensor: Tensor, start: Callable[[], Work | None]) -> Callable[[], None]:
        name, board = self.group.name, failure_board()
        if name not in board.identified:
            self._exchange_identities(board, tensor.device)
        self.note(f"issue {phase}")
        board.issued[name] += 1
        number = board.issued[name]
        with self._error_context(phase, board, number), record_function(f"{ISSUE}{phase}"):
            work = start()

        def wait() -> None:
            with self._error_context(phase, board, number), record_function(f"{WAIT}{phase}"):
                if work is not None and tensor.device.type != "cpu":
                    work.wait()  # this only queues
                    return
                if work is not None:
                    self._wait_polling(work, board, number)
            board.handled[name] = max(board.handled.get(name, 0), number)

        return wait

    def _wait_polling(self, work: Work, board: FailureBoard, number: int) -> None:
        while True:
            try:
                work.wait(timedelta(seconds=POLL_INTERVAL_S))
                return
            except RuntimeError:  # what it waited for, or this wait's own time-out
                if work.is_completed():
                    work.wait()
                    return
            if board.cannot_complete(self.group, number):
                raise RuntimeError("another rank has failed")

    def _exchange_identities(self, board: FailureBoard, device: torch.device) -> None:
        """Exchange who the group's processes are before its first collective: later the store may be gone."""
        board.identified.add(self.group.name)
        everybody = torch.empty(self.group.size, 3, dtype=torch.int64, device=device)
        self.all_gather(everybody, torch.tensor([identity()], device=device), "exchange of process identities")()
        for rank, (space, pid, started) in zip(self.group.ranks, everybody.tolist(), strict=True):
            board.identities[rank] = (space, pid, started)

    def where(self, phase: str) -> str:
        """Name this rank, the layer and the phase, for a message."""
        return f"rank {self.group.ranks[self.group.rank]}, {self.layer}, {phase}"

    def error_context(self, phase: str) -> AbstractContextManager[None]:
        """`with channel.error_context(phase):` name the error of other code's collective."""
        board = failure_board()
        return self._error_context(phase, board, board.issued[self.group.name])

    @contextmanager
    def _error_context(self, phase: str, board: FailureBoard, number: int) -> Iterator[None]:
        """Turn a collective's RuntimeError into one that names rank, layer, phase and the ranks that are missing."""
        try:
            yield
        except ExpertParallelError:
            raise
        except RuntimeError as error:
            place = f"{self.layer}, {phase}"
            board.report(place)
            cause = board.find_cause(self.group, number)
            board.report(place, cause)
            reason = cause or board.describe_places(self.group, place)
            board.mark_handled()
            message = f"{self.where(phase)}: {reason} ({_first_line(error) or type(error).__name__})"
            logger.error(message)  # at once: a launcher may end this process before its traceback is printed
            failure = ExpertParallelError(message)
            failure.was_reported = True  # type: ignore[attr-defined]
            raise failure from error


class report_failure:
    """`with report_failure(layer):` publish this rank's exception, so that the other ranks stop waiting."""

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or hasattr(error, "was_reported") or ends_recomputation(error):
            return
        error.was_reported = True  # type: ignore[attr-defined]
        if not dist.is_initialized():
            return
        board = failure_board()
        board.report(self.layer, f"rank {dist.get_rank()} failed with {type(error).__name__}: {_first_line(error)}")
        board.mark_handled()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def to_host(*tensors: Tensor) -> Callable[[], list[list[int]]]:
    """Start copying integer tensors to the host; what it returns waits for that copy alone and gives their elements.

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


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
