"""Checkpoints of a run: those of `moe_triton.distributed`, with the step, settings and generators as their `extra`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moe_triton.distributed import CheckpointError, load_checkpoint, save_checkpoint
from moe_triton.distributed.checkpoint.manifest import NAME, Manifest, decode
from moe_triton.training.config import TrainConfig
from moe_triton.training.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint without its tensors: `step` steps were done with `config` on the corpus with this `digest`."""

    path: Path
    step: int
    config: TrainConfig
    digest: str
    compare_dense: bool


def write_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replace what `checkpoint.path` holds by one rename. All processes of the run call it. Raises TrainingError."""
    config = checkpoint.config
    generators = {"cpu": torch.get_rng_state()}
    if torch.device(config.device).type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(config.device)
    run = {
        "step": checkpoint.step,
        "config": config.as_dict(),
        "digest": checkpoint.digest,
        "compare_dense": checkpoint.compare_dense,
        "generators": generators,
    }
    with one_line("; what was there before is intact"):
        save_checkpoint(checkpoint.path, model, optimizer, extra=run)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Return the checkpoint in a folder; None where no save was completed. Raises TrainingError: damaged files."""
    if not (path / NAME).exists():
        return None
    with one_line():
        run = decode(Manifest.read(path).extra)
    try:
        return Checkpoint(
            path=path,
            step=run["step"],
            config=TrainConfig(**run["config"]),
            digest=run["digest"],
            compare_dense=run["compare_dense"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path / NAME} is not of a checkpoint of moe-triton train: {error}") from error


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Restore the weights, the optimizer's state and the generators', for any number of processes.

    All processes of the run call it. Raises TrainingError, with the model untouched: files that are damaged or missing,
    or do not fit.
    """
    with one_line():
        generators = load_checkpoint(path, model, optimizer)["generators"]
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], next(model.parameters()).device)


@contextlib.contextmanager
def one_line(hint: str = "") -> Iterator[None]:
    """Turn a CheckpointError inside into a TrainingError."""
    try:
        yield
    except CheckpointError as error:
        raise TrainingError(f"{error}{hint}") from error
