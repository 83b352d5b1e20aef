"""What goes wrong between processes, and who is to blame."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist


class ExpertParallelError(RuntimeError):
    """A collective of an MoE layer failed. The message names rank, layer and phase, and the ranks that are gone."""


class ConfigurationMismatch(ExpertParallelError):
    """The ranks of a group do not agree on what they are about to compute."""


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


def missing_ranks(identities: Mapping[int, Identity], ranks: Sequence[int], failure: str, patience: float) -> list[str]:
    """Which of `ranks` died or do not answer, in words.

    A rank whose collective failed says so in the store of the default group and waits up to `patience` seconds for the
    others to do the same: one that never does is stuck somewhere else.
    """
    me = dist.get_rank()
    dead = [rank for rank in identities if rank != me and has_died(identities[rank])]
    if dead:
        return [f"rank {rank} has died" for rank in sorted(dead)]
    try:
        store: Any = dist.distributed_c10d._get_default_store()
        store.set(f"moe_triton/failed/{me}", failure)
        silent = {rank for rank in ranks if rank != me}
        deadline = time.monotonic() + patience
        while silent and time.monotonic() < deadline:
            silent = {rank for rank in silent if not store.check([f"moe_triton/failed/{rank}"])}
            if any(rank in identities and has_died(identities[rank]) for rank in silent):
                break
            time.sleep(0.02)
    except RuntimeError as error:  # torch's DistError: the store has gone with the process that served it
        return [f"rank 0, which serves the store, does not answer ({error})"]
    words = {True: "has died", False: "does not answer"}
    return [f"rank {rank} {words[rank in identities and has_died(identities[rank])]}" for rank in sorted(silent)]
