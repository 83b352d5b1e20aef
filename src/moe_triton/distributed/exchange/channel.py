"""The collectives of one group for one layer, each with a name, so that a failure says where it happened and why."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from moe_triton.distributed.errors import ConfigurationMismatch, ExpertParallelError
from moe_triton.distributed.exchange.failure_board import FailureBoard, failure_board, knows_ranks, logger
from moe_triton.distributed.exchange.processes import identity
from moe_triton.distributed.exchange.schedule import DescribedCall, Schedule
from moe_triton.distributed.groups import Group, all_gather_single, device_type, group_from_handle, has_cpu_backend
from moe_triton.torch_internals import ends_recomputation, is_profiling

Listener = Callable[[str], None]
Error = TypeVar("Error", bound=BaseException)
Result = TypeVar("Result")

ISSUE, WAIT = "moe_triton: ", "moe_triton, wait: "  # names of ranges in torch.profiler, and then the phase's
POLL_INTERVAL_S = 0.2  # how long to wait for a collective before checking whether it can still complete
SPIN_S = 0.001  # how long to ask a device without a pause
COMPARE_ALWAYS = "MOE_TRITON_COMPARE_ALWAYS"  # set to 1, ranks on GPUs compare every call, over a gloo group


class Work(Protocol):
    """What torch's asynchronous collectives return."""

    def wait(self, timeout: timedelta = ...) -> object: ...

    def is_completed(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A group of at least two ranks, the layer that uses it, and an optional listener.

    layer      as error messages call it
    listener   called with "issue X" when collective X is issued
    """

    group: Group
    layer: str
    listener: Listener | None = None

    def all_to_all(
        self, out: Tensor, rows: Tensor, received: list[int], sent: list[int], phase: str
    ) -> Callable[[], None]:
        """Send rows [sum sent, ...] by destination into `out` [sum received, ...] by source. Return the wait for it."""
        return self._issue(
            phase,
            out,
            lambda: dist.all_to_all_single(out, rows, received, sent, group=self.group.handle, async_op=True),
        )

    def all_gather(self, out: Tensor, rows: Tensor, phase: str) -> Callable[[], None]:
        """Gather the rows [M, ...] of every rank into `out` [P*M, ...]. Return the wait for it."""
        return self._issue(phase, out, lambda: all_gather_single(out, rows, group=self.group.handle, async_op=True))

    def all_reduce(self, tensor: Tensor, phase: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduce over the ranks, in place, and wait for it; a sum by default."""
        self.start_all_reduce(tensor, phase, op)()

    def start_all_reduce(
        self, tensor: Tensor, phase: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Callable[[], None]:
        """Start to reduce over the ranks, in place; a sum by default. Return the wait for it."""
        return self._issue(phase, tensor, lambda: dist.all_reduce(tensor, op, group=self.group.handle, async_op=True))

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

    def agree(self, call: DescribedCall, phase: str, device: torch.device) -> int:
        """Return the hash of all that this rank has done on the group, with the call that it is about to make.

        On a CPU the call is compared at once, in one small message: gloo answers messages of unequal sizes with stale
        rows or with an abort. Elsewhere that would be a host sync: the hash travels with the counts of mode "dropless",
        and is compared once a step (`end_step`), or at once where MOE_TRITON_COMPARE_ALWAYS is 1.

        Raises:
            ConfigurationMismatch: on every rank, with what differs.
        """
        board, name = self._board(phase), self.group.name
        board.doing = call.what
        if (schedule := board.schedules.get(name)) is None:
            compares = os.environ.get(COMPARE_ALWAYS) == "1"
            schedule = board.schedules[name] = Schedule(self.group, compares_always=compares)
        rolling = schedule.add(call)
        if not only_queues(device):
            self._compare(call.fingerprint, phase, device)
        elif schedule.compares_always:
            replace(self, group=self._side_group(board))._compare(call.fingerprint, phase, torch.device("cpu"))
        return rolling

    def _compare(self, fingerprint: int, phase: str, device: torch.device) -> None:
        everybody = torch.empty(self.group.size, dtype=torch.int64, device=device)
        self.all_gather(everybody, torch.tensor([fingerprint], device=device), phase)()
        if any(other != fingerprint for other in everybody.tolist()):
            raise self.mismatch(phase)

    def calls(self) -> list[Mapping[str, object]]:
        """Return what this rank has done on the group in this step, before what it is doing."""
        schedule = failure_board().schedules.get(self.group.name)
        return [] if schedule is None else list(schedule.calls)[:-1]

    def mismatch(self, phase: str, calls: Sequence[Mapping[str, object]] = ()) -> ConfigurationMismatch:
        """Return the error of ranks that have found that they differ: now, or in one of the `calls` before."""
        board = failure_board()
        before = {f"call {i}, {name}": value for i, what in enumerate(calls) for name, value in what.items()}
        board.doing = {**board.doing, **before}
        found = board.find_differences(self.group, f"{self.layer}, {phase}")
        board.mark_handled()
        return _reported(ConfigurationMismatch(f"{self.where(phase)}: {found}"))

    def to_host(self, phase: str, tensor: Tensor) -> Callable[[], list[int]]:
        """Start copying an integer tensor to the host; what it returns waits for that copy alone: the elements, flat.

        On a GPU the copy is into pinned memory, on a stream of its own behind what is queued now.
        """
        return partial(self._read, phase, *copy_to_host(tensor))

    def _read(self, phase: str, arrived: Callable[[], bool], elements: Callable[[], list[int]]) -> list[int]:
        board = self._board(phase)
        try:
            if not arrived():
                _poll(arrived, board)
        except RuntimeError as error:
            raise self._explained(error, phase, board) from error
        return elements()

    def _compare_late(
        self, mine: int, calls: Sequence[Mapping[str, object]], device: torch.device
    ) -> Callable[[], None]:
        """Gather every rank's hash of what it has done; what is returned compares them."""
        phase, board = f"comparison of the calls of step {failure_board().step - 1}", failure_board()
        everybody = torch.empty(self.group.size, dtype=torch.int64, device=device)
        self.all_gather(everybody, torch.tensor([mine], device=device), phase)()
        read = self.to_host(phase, everybody)

        def compare() -> None:
            if any(other != mine for other in read()):
                board.doing = {}
                raise self.mismatch(phase, calls)

        return compare

    def _side_group(self, board: FailureBoard) -> Group:
        if self.group.name not in board.side_groups:
            made = dist.new_group(list(self.group.ranks), backend="gloo", use_local_synchronization=True)
            board.side_groups[self.group.name] = group_from_handle(made)
        return board.side_groups[self.group.name]

    def _board(self, phase: str) -> FailureBoard:
        """The failure board, unless it says that the job has ended."""
        board = failure_board()
        if board.ended:
            raise self.failure(phase, board, board.ended, "the process groups are aborted")
        return board

    def _issue(self, phase: str, tensor: Tensor, start: Callable[[], Work | None]) -> Callable[[], None]:
        board = self._board(phase)
        if self.group.name not in board.identified:
            self._exchange_identities(board, tensor.device)
        if self.listener is not None:
            self.listener(f"issue {phase}")
        work = self._named(ISSUE, phase, board, start)
        return partial(self._named, WAIT, phase, board, self._complete, work, phase, board, tensor)

    def _named(
        self, kind: str, phase: str, board: FailureBoard, function: Callable[..., Result], *args: object
    ) -> Result:
        """Call a function, in a range of torch.profiler where one runs; a RuntimeError becomes one that names ranks."""
        try:
            if not is_profiling():  # a range costs microseconds also where none runs
                return function(*args)
            with record_function(kind + phase):
                return function(*args)
        except ExpertParallelError:
            raise
        except RuntimeError as error:
            raise self._explained(error, phase, board) from error

    def _complete(self, work: Work | None, phase: str, board: FailureBoard, tensor: Tensor) -> None:
        """Wait for a collective."""
        if work is not None:
            if only_queues(tensor.device):
                work.wait()
                board.queue(self.group, (self.layer, phase), tensor)
            else:
                self._wait_polling(work, board, f"{self.layer}, {phase}")
        if board.ended:
            self._board(phase)

    def _wait_polling(self, work: Work, board: FailureBoard, place: str) -> None:
        while True:
            try:
                work.wait(timedelta(seconds=POLL_INTERVAL_S))
                return
            except RuntimeError:  # what it waited for, or this wait's own time-out
                if work.is_completed():
                    work.wait()
                    return
            if board.cannot_complete(self.group, place):
                raise RuntimeError("another rank has failed")

    def _exchange_identities(self, board: FailureBoard, device: torch.device) -> None:
        """Exchange who the group's processes are before its first collective: later the store may be gone."""
        board.identified.add(self.group.name)
        everybody = torch.empty(self.group.size, 3, dtype=torch.int64, device=device)
        phase = "exchange of process identities"
        self.all_gather(everybody, torch.tensor([identity()], device=device), phase)()
        found = self.to_host(phase, everybody)()
        for i, rank in enumerate(self.group.ranks):
            board.identities[rank] = (found[3 * i], found[3 * i + 1], found[3 * i + 2])

    def where(self, phase: str) -> str:
        """Name this rank, the layer and the phase, for a message."""
        return f"rank {self.group.ranks[self.group.rank]}, {self.layer}, {phase}"

    @contextmanager
    def error_context(self, phase: str) -> Iterator[None]:
        """`with channel.error_context(phase):` name the error of other code's collective."""
        try:
            yield
        except ExpertParallelError:
            raise
        except RuntimeError as error:
            raise self._explained(error, phase, failure_board()) from error

    def _explained(self, error: RuntimeError, phase: str, board: FailureBoard) -> ExpertParallelError:
        """The error of a collective as one that names rank, layer, phase and the ranks that are missing."""
        reason = board.ended or board.explain(self.group, f"{self.layer}, {phase}")
        board.mark_handled()
        return self.failure(phase, board, reason, _first_line(error) or type(error).__name__)

    def failure(self, phase: str, board: FailureBoard, reason: str, detail: str) -> ExpertParallelError:
        """Return the error of a collective that cannot complete, for `reason`; it is logged."""
        message = f"{self.where(phase)}: {reason} (step {board.step}; {detail})"
        logger.error(message)  # at once: a launcher may end this process before its traceback is printed
        return _reported(ExpertParallelError(message))


def _poll(arrived: Callable[[], bool], board: FailureBoard) -> None:
    start = time.monotonic()
    while not arrived():
        if board.ended:
            raise RuntimeError("another rank has failed")
        if time.monotonic() - start > SPIN_S:
            time.sleep(SPIN_S / 10)


@cache  # torch makes the name of a device's type anew each time
def only_queues(device: torch.device) -> bool:
    """Return whether waiting for a collective of tensors on this device only queues work there."""
    return device.type != "cpu"


def end_step(layer: str, device: torch.device) -> None:
    """Compare what the ranks have done in this step, where it was not compared at once. Called on every rank.

    The comparison is read at the end of the next step, so that no rank waits for it.

    Raises:
        ConfigurationMismatch: on the ranks of a group that did not all do the same in the step before.
    """
    board = failure_board()
    changed = [schedule for schedule in board.schedules.values() if schedule.rolling != schedule.compared]
    if not changed:
        return
    board.step += 1
    comparisons, board.comparisons = board.comparisons, []
    for compare in comparisons:
        compare()
    for schedule in sorted(changed, key=lambda schedule: schedule.group.name):
        mine, calls = schedule.rolling, schedule.cut()
        if only_queues(device):
            channel = Channel(group=schedule.group, layer=layer)
            board.comparisons.append(channel._compare_late(mine, calls, device))


class report_failure:
    """`with report_failure(layer):` publish this rank's exception, so that the other ranks stop waiting."""

    __slots__ = ("layer",)

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or hasattr(error, "was_reported") or ends_recomputation(error) or not knows_ranks():
            return
        _reported(error)
        board = failure_board()
        if board.ended and isinstance(error, Exception):  # it has read what an aborted collective left
            raise _reported(ExpertParallelError(f"rank {board.rank}, {self.layer}: {board.ended}")) from error
        board.report(self.layer, f"rank {board.rank} failed with {type(error).__name__}: {_first_line(error)}")
        board.stay()
        board.mark_handled()


def _reported(error: Error) -> Error:
    """The error, marked as one that the other ranks know of."""
    error.was_reported = True  # type: ignore[attr-defined]
    return error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def copy_to_host(tensor: Tensor) -> tuple[Callable[[], bool], Callable[[], list[int]]]:
    """Start the copy of `Channel.to_host`: (whether it has arrived, the elements)."""
    packed = tensor.reshape(-1)
    if not packed.is_cuda:
        return _at_once, packed.tolist
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    side = _copy_stream(packed.device)
    side.wait_stream(torch.cuda.current_stream(packed.device))
    with torch.cuda.stream(side):
        host.copy_(packed, non_blocking=True)
        done = side.record_event()
    packed.record_stream(side)
    return done.query, host.tolist


def _at_once() -> bool:
    return True


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
