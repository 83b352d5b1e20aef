"""Several processes on gloo that run the functions of a file's tests, one after the other.

A new file gets new processes: each of gloo's groups has threads that wake a hundred times a second until it is gone.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import pytest

Key, Result = TypeVar("Key"), TypeVar("Result")

# what the ranks' functions import: seconds for each process that does so itself
PRELOADED = ["torch.distributed.tensor", "torch._dynamo", "moe_triton.distributed.gradients"]
PRELOADED += ["moe_triton.integrations.transformers", "transformers.modeling_utils", "transformers.trainer"]
PRELOADED += ["deepspeed", "tests.helpers.interpreter", "tests.helpers.preloaded"]  # the last runs layers
TIMEOUT = 120  # seconds for a collective, long enough for a busy machine; tests of faults make their own processes


def fork_context() -> Any:
    """Processes are forks of one that has imported everything and loaded the CPU's loops, on one thread."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def at_once(calls: Mapping[Key, Callable[[], Result]], workers: int = 2) -> dict[Key, Result]:
    """Make calls that mostly wait for other processes, two at a time, and return their results.

    With more of them a busy machine keeps a rank from answering in time.
    """
    with ThreadPoolExecutor(workers) as pool:
        started = {key: pool.submit(call) for key, call in calls.items()}
    return {key: future.result() for key, future in started.items()}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """`run(function, *args)` calls function(*args) in every process and returns their results by rank."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.start()

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        world, context = self.world, fork_context()
        pipes = [context.Pipe() for _ in range(world)]
        store = str(Path(self.folder.name) / "store")
        self.processes = [
            context.Process(target=serve, args=(rank, world, store, pipe[1]), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        self.pipes = [pipe[0] for pipe in pipes]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [pipe.recv() for pipe in self.pipes]
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:  # the others may be out of step: the next test gets new processes
            self.close()
            self.start()
        call = f"{function.__name__}({', '.join(map(repr, args))})"
        assert not failures, "\n".join([call, *failures])
        return [result for _, result in answers]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(10)
            process.kill()
        self.folder.cleanup()


def serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    """What every process does until it is told to stop."""
    import torch
    import torch.distributed as dist

    from tests.helpers.interpreter import spare_time
    from tests.helpers.poison import poisoned

    spare_time()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    while (task := pipe.recv()) is not None:
        function, args = task
        torch.manual_seed(0)
        try:
            with poisoned():
                pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


@contextmanager
def started(world: int) -> Iterator[Ranks]:
    ranks = Ranks(world)
    try:
        yield ranks
    finally:
        ranks.close()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    with started(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with started(2) as ranks:
        yield ranks


def products(**choices: tuple[Any, ...]) -> list[Any]:
    """pytest parameters for every combination, named by their values."""
    combinations = itertools.product(*choices.values())
    return [pytest.param(*values, id="-".join(str(value) for value in values)) for values in combinations]
