"""Processes that are killed, stopped or broken on purpose: what happens in them, and how it is watched from outside."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from moe_triton import MoE
from moe_triton.distributed import ExpertParallel, ParallelGroups, make_groups, reduce_gradients
from tests.helpers.ranks import fork_context, free_port

HIDDEN, EXPERTS = 8, 8
DEADLINE = 300  # seconds until a test says "hang"; what is asserted does not depend on it

_serial = itertools.count()


def fresh_groups(seconds: float = 30, **sizes: Any) -> ParallelGroups:
    """Groups that no earlier test has used or broken: groups are made once for each time-out."""
    return make_groups(timeout=timedelta(seconds=seconds, milliseconds=next(_serial)), **sizes)


class Model(nn.Module):
    """Two MoE layers behind a dense one."""

    def __init__(self, parallel: ExpertParallel, **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        layers = [MoE(HIDDEN, 8, EXPERTS, expert_parallel=parallel, **arguments) for _ in range(2)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        loss = x.new_zeros(())
        for layer in self.layers:
            x, aux, _ = layer(x)
            loss = loss + aux
        return x.square().sum() + loss


def step(model: Model, tokens: int = 6) -> None:
    model(torch.randn(tokens, HIDDEN)).backward()
    reduce_gradients(model)
    model.zero_grad()


@dataclass
class Outcome:
    """How a process ended: its exit code, and the error that it met, as "Type: message"."""

    code: int | None
    error: str


@dataclass
class Scenario:
    """One step in good health, then rank `victim` gets `signal` at the event `when` of its second step.

    seconds   the groups' time-out
    """

    when: str
    victim: int = 2
    signal: int = signal.SIGKILL
    ep: int = 4
    aux_loss_weight: float = 0.0
    seconds: float = 60


def live(rank: int, scenario: Scenario) -> None:
    """What every rank does: it trains for ever."""
    groups = fresh_groups(scenario.seconds, ep=scenario.ep)
    armed = False

    def listen(event: str) -> None:
        if armed and rank == scenario.victim and event == scenario.when:
            os.kill(os.getpid(), scenario.signal)

    parallel = ExpertParallel(groups, listener=listen, chunks=2)
    model = Model(parallel, aux_loss_weight=scenario.aux_loss_weight)
    step(model)
    armed = True
    if rank == scenario.victim and scenario.when == "exit":
        os._exit(3)
    if scenario.when == "issue dense gradients" and rank == scenario.victim:
        _kill_in_reduction(scenario)
    while True:
        step(model)


def _kill_in_reduction(scenario: Scenario) -> None:
    from moe_triton.distributed.exchange import channel

    original = channel.Channel.start_all_reduce

    def start_all_reduce(self: Any, tensor: Any, phase: str, *args: Any) -> Callable[[], None]:
        if phase == "dense gradients":
            os.kill(os.getpid(), scenario.signal)
        return original(self, tensor, phase, *args)

    channel.Channel.start_all_reduce = start_all_reduce  # type: ignore[method-assign]


def _serve(rank: int, world: int, port: int, function: Callable[..., None], args: tuple[Any, ...], pipe: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"  # rank 0 serves the store
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        function(rank, *args)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


@contextmanager
def processes(world: int, function: Callable[..., None], *args: Any) -> Iterator[list[tuple[Any, Any]]]:
    context, port = fork_context(), free_port()
    started = []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world, port, function, args, theirs), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        yield started
    finally:
        for process, _ in started:
            process.kill()


def outcomes(world: int, function: Callable[..., None], *args: Any, without: int | None = None) -> list[Outcome | None]:
    """Run function(rank, *args) in `world` processes of their own, until all of them but `without` have ended."""
    found: list[Outcome | None] = []
    with processes(world, function, *args) as started:
        deadline = time.monotonic() + DEADLINE
        for rank, (process, pipe) in enumerate(started):
            if rank == without:
                found.append(None)
                continue
            error = ""
            try:
                assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} hangs"
                error = pipe.recv()
            except EOFError:
                pass
            process.join(max(0.0, deadline - time.monotonic()))
            found.append(Outcome(code=process.exitcode, error=error))
    return found
