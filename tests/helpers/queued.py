"""Collectives as NCCL's are, emulated on gloo: what a rank sees of them on GPUs, for tensors on CPUs.

- A wait only queues. What computes on the result stands still where a GPU would, and the host with it; what is read
  later, such as counts, is polled.
- Nothing ends in an error: a collective that a rank does not join, or that it joins with another one or with other
  sizes, is never over. Neither is any that follows on the group.
- Aborted groups let go of whoever waits, and leave garbage.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_triton.distributed import ParallelGroups
from moe_triton.distributed.exchange import channel, failure_board
from tests.helpers.faults import fresh_groups

KINDS = ("ep", "edp", "etp", "tp", "dp")
READ_LATER = ("exchange of counts", "exchange of further counts", "exchange of process identities", "comparison of the")
POLL_S = 0.002


@dataclass
class Job:
    """A collective under way, in the place of torch's Work."""

    device: Device
    phase: str
    descriptor: tuple[Any, ...]
    run: Callable[[dist.ProcessGroup], object]
    over: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout: object = None) -> None:
        self.device.queued.append(self)


def fit(descriptors: Sequence[tuple[Any, ...]]) -> bool:
    """Whether the ranks issue one and the same collective; of an all-to-all the bytes by destination and source."""
    if any(other[0] != descriptors[0][0] for other in descriptors):
        return False
    if descriptors[0][0] != "all_to_all":
        return all(other == descriptors[0] for other in descriptors)
    ranks = range(len(descriptors))
    return all(descriptors[i][1][j] == descriptors[j][2][i] for i in ranks for j in ranks)


class Communicator:
    """One group's collectives in their order, by a thread, over another group of the same ranks."""

    def __init__(self, handle: dist.ProcessGroup) -> None:
        self.handle, self.jobs = handle, queue.Queue()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                everybody: list[Any] = [None] * dist.get_world_size(self.handle)
                dist.all_gather_object(everybody, job.descriptor, group=self.handle)
                if not fit(everybody):
                    return
                job.run(self.handle)
            except RuntimeError:
                return
            job.over.set()


class Device:
    """This process's GPU, as far as its collectives go."""

    def __init__(self) -> None:
        self.queued: list[Job] = []
        self.aborted = threading.Event()
        self.communicators: dict[str, Communicator] = {}
        self.phase = ""

    def event(self, device: torch.device) -> Any:
        return Event(self)

    def copy_to_host(self, tensor: torch.Tensor) -> tuple[Callable[[], bool], Callable[[], list[int]]]:
        done = Event(self)
        done.record()
        return done.query, lambda: tensor.reshape(-1).tolist()

    def collective(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def issue(tensor: torch.Tensor, *args: Any, group: dist.ProcessGroup, async_op: bool = False) -> Any:
            found = self.communicators.get(group.group_name)
            if found is None or not async_op:
                return original(tensor, *args, group=group, async_op=async_op)
            descriptor: tuple[Any, ...] = (kind, tensor.nbytes)
            if kind == "all_to_all":
                rows, received, sent = args
                width = [x[0].nbytes if len(x) else 0 for x in (rows, tensor)]
                descriptor = (kind, [n * width[0] for n in sent], [n * width[1] for n in received])
            job = Job(self, self.phase, descriptor, lambda twin: original(tensor, *args, group=twin))
            found.jobs.put(job)
            return job

        return issue


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.jobs = device, []

    def record(self) -> None:
        """Recorded behind a wait: what follows needs the result, unless the host reads it."""
        self.jobs = [job for job in self.device.queued if not job.over.is_set()]
        self.device.queued[:] = self.jobs
        if self.jobs and not self.jobs[-1].phase.startswith(READ_LATER):
            while not self.query() and not self.device.aborted.is_set():
                time.sleep(POLL_S)

    def query(self) -> bool:
        return all(job.over.is_set() for job in self.jobs)


@contextmanager
def waits_only_queue(seconds: float, grace_s: float | None = 2.5, **sizes: Any) -> Iterator[ParallelGroups]:
    """`with waits_only_queue(seconds, ep=4) as groups:` groups with this time-out whose collectives are as NCCL's.

    grace_s: in the place of FAILURE_GRACE_S, with a look every 0.1 s; None: as users have both.
    """
    groups, twins = fresh_groups(seconds, **sizes), fresh_groups(1000, **sizes)
    device = Device()
    for kind in KINDS:
        mine, twin = getattr(groups, kind), getattr(twins, kind)
        if mine.size > 1 and mine.name not in device.communicators:
            device.communicators[mine.name] = Communicator(twin.handle)
    issue = channel.Channel._issue

    def named(self: Any, phase: str, tensor: torch.Tensor, start: Callable[[], Any]) -> Any:
        def begin() -> Any:  # after the exchange of identities, which may come first
            device.phase = phase
            return start()

        return issue(self, phase, tensor, begin)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel.Channel, "_issue", named)
        patch.setattr(channel, "only_queues", lambda device: True)
        patch.setattr(channel, "copy_to_host", device.copy_to_host)
        patch.setattr(channel, "all_gather_single", device.collective("all_gather", channel.all_gather_single))
        for kind in ("all_to_all_single", "all_reduce", "broadcast"):
            patch.setattr(dist, kind, device.collective(kind.removesuffix("_single"), getattr(dist, kind)))
        patch.setattr(failure_board, "device_event", device.event)
        patch.setattr(failure_board, "abort_groups", device.aborted.set)
        if grace_s is not None:
            patch.setattr(failure_board, "FAILURE_GRACE_S", grace_s)
            patch.setattr(failure_board, "WATCH_INTERVAL_S", 0.1)
        yield groups


def start_anew() -> None:
    """After a failure that every rank has met: the ranks go on as if nothing had been. Called on every rank."""
    dist.barrier()
    board = failure_board.failure_board()
    board.ended = board.ended or "over"  # the thread ends after what it is doing, which may be a report
    if board.watcher is not None:
        board.watcher.join()
        board.watcher = None
    dist.barrier()  # and nobody reports any more
    deadline = time.monotonic() + 60
    board.store_failed = False
    while not board._read():  # a report that is read later would count as one of the next failure
        assert time.monotonic() < deadline, "the store does not answer"
        board.store_failed = False
    board.ended, board.failures = "", max((report.number for report in board.reports), default=0)
    board.schedules.clear()
    board.queued.clear()
    board.comparisons.clear()
    failure_board._aborted.clear()
    dist.barrier()
