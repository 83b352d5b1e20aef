"""The processes of one run: alone, or started by torchrun, with the experts spread over them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_triton.checks import check_choice, check_int
from moe_triton.distributed import ExpertParallel, ParallelGroups, explain_termination, make_groups
from moe_triton.distributed.exchange.expert_parallel import MODES
from moe_triton.distributed.groups import default_group
from moe_triton.training.config import check_device
from moe_triton.training.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among those of the run. A batch is divided into runs of sequences, one per rank, in order."""

    rank: int = 0
    world: int = 1
    groups: ParallelGroups | None = None
    mode: str = "dropless"
    chunks: int = 1

    @property
    def is_first(self) -> bool:
        """Return whether this process writes the files and the display."""
        return self.rank == 0

    def expert_parallel(self) -> ExpertParallel | None:
        """Make an ExpertParallel for the layers of one model; None where everything is in one process."""
        if self.groups is None:
            return None
        return ExpertParallel(self.groups, mode=self.mode, chunks=self.chunks, loss_reduction="sum")

    def share(self, sequences: Tensor) -> Tensor:
        """Return this rank's part of the sequences [B, ...]; the first ranks have one more where they do not divide."""
        return sequences.tensor_split(self.world)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise on every rank the TrainingError of any one: for parts of the set-up in which one rank alone may fail.

        No rank continues before all have done this part.
        """
        problem = None
        try:
            yield
        except TrainingError as error:
            problem = str(error)
            if self.world == 1:
                raise
        if self.world > 1:
            problems: list[str | None] = [None] * self.world
            dist.all_gather_object(problems, problem)
            problem = problem or next((found for found in problems if found is not None), None)
        if problem is not None:
            raise TrainingError(problem)


ALONE = Workers()


def check_exchange(mode: str, chunks: int) -> None:
    """Raise ValueError where no exchange can have this mode or number of chunks, for any number of processes."""
    check_choice("ep_mode", mode, MODES)
    check_int("ep_chunks", chunks, low=1)


@contextlib.contextmanager
def started_workers(ep: int, mode: str, chunks: int, device: str) -> Iterator[Workers]:
    """Start the run's processes, by torchrun's environment. Raises TrainingError: arguments that cannot be used."""
    try:
        check_exchange(mode, chunks)
        check_device(device)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if ep < 1 or world % ep:
        hint = "" if world > 1 else "; start it with torchrun --nproc_per_node N -m moe_triton train"
        raise TrainingError(f"--ep: got {ep}, wanted a divisor of the {world} processes{hint}")
    if world == 1:
        yield ALONE
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with default_group(torch.device(device)):
        explain_termination()  # torchrun ends the others when one process dies: they log which one did
        groups = make_groups(ep=ep)
        yield Workers(rank=groups.rank, world=world, groups=groups, mode=mode, chunks=chunks)
