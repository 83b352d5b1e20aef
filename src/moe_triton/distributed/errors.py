"""What goes wrong between processes, and who is to blame."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist


class ExpertParallelError(RuntimeError):
    """A collective of an MoE layer failed. The message names rank, layer and phase, and the ranks that are gone."""


class ConfigurationMismatch(ExpertParallelError):
    """The ranks of a group do not agree on what they are about to compute."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, or does not fit the model. The message names the file."""


Identity = tuple[str, int, int]  # host, process id, start time of the process in clock ticks (0 where unknown)


def identity() -> Identity:
    """Who this process is, for `missing_ranks` on the others."""
    return socket.gethostname(), os.getpid(), _start_time(os.getpid())


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (the state) on; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold anything


def _start_time(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def has_died(who: Identity) -> bool:
    """Whether a process of this machine is gone, or is a zombie; False for one on another machine or system."""
    host, pid, started = who
    if host != socket.gethostname() or not Path("/proc/self/stat").exists():
        return False
    fields = _stat(pid)
    return not fields or fields[0] in "ZX" or int(fields[19]) != started


def publish_identity() -> None:
    """Write who this process is into the default group's store, where the others look when a collective fails."""
    _store().set(f"moe_triton/identity/{dist.get_rank()}", json.dumps(identity()))


def remember_identities(ranks: Sequence[int]) -> None:
    """Read who the ranks are, once all of them have published it: the store may be gone when it is wanted."""
    for rank in ranks:
        if rank not in _identities:
            host, pid, started = json.loads(_store().get(f"moe_triton/identity/{rank}"))
            _identities[rank] = (host, pid, started)


_identities: dict[int, Identity] = {}  # of global ranks


def forget_identities() -> None:
    """For a new default group."""
    _identities.clear()


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def missing_ranks(ranks: Sequence[int], failure: str, patience: float = 3.0) -> str:
    """Which of `ranks` (global) died or do not answer, in words.

    A rank whose collective failed says so in the store of the default group and waits up to `patience` seconds for the
    others to do the same: one that never does is stuck somewhere else.
    """
    me = dist.get_rank()
    silent = {rank for rank in ranks if rank != me}
    try:
        _store().set(f"moe_triton/failed/{me}", failure)
        deadline = time.monotonic() + patience
        while silent and not _dead(range(dist.get_world_size())) and time.monotonic() < deadline:
            silent = {rank for rank in silent if not _store().check([f"moe_triton/failed/{rank}"])}
            time.sleep(0.02)
    except RuntimeError:  # torch's DistError: the store went with the process that served it
        if not _dead(ranks):
            return "the store does not answer: the process that serves it, rank 0 or the launcher, has gone"
    dead = _dead(range(dist.get_world_size()))
    found = [f"rank {rank} has died" for rank in dead]
    found += [f"rank {rank} does not answer" for rank in sorted(silent - set(dead))] if not dead else []
    return ", ".join(found) or "no rank is missing"


def _dead(ranks: Iterable[int]) -> list[int]:
    return [rank for rank in ranks if rank in _identities and has_died(_identities[rank])]
