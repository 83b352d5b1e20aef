"""Checkpoints: weights, AdamW's state and torch's generators in one safetensors file, the rest in its header.

No pickle anywhere, so opening a checkpoint runs no code.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe_triton.training.config import TrainConfig
from moe_triton.training.errors import TrainingError
from moe_triton.training.files import reason, replace_file
from moe_triton.training.workers import ALONE, Workers

FORMAT = "moe_triton.training/1"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint as read: `step` steps were done with `config` on the corpus with this `digest`."""

    path: Path
    step: int
    config: TrainConfig
    digest: str
    compare_dense: bool
    tensors: dict[str, Tensor]


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    config: TrainConfig,
    digest: str,
    compare_dense: bool,
    workers: Workers = ALONE,
) -> None:
    """Replaces `path` atomically; the checkpoint before stays until this one is complete. Raises TrainingError.

    The file holds whole tensors with all experts, whatever the number of workers: all of them must call it, and the
    first one writes.
    """
    parameters = dict(model.named_parameters())
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    owners = {f"model.{name}": parameter for name, parameter in parameters.items()}
    state = optimizer.state_dict()["state"]
    for index, name in enumerate(parameter_names(model, optimizer)):
        for key, value in state.get(index, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
            owners[f"optimizer.{name}.{key}"] = parameters[name]
    tensors = workers.whole(tensors, model, owners)
    if not workers.is_first:
        return
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.device(config.device).type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(config.device)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = {
        "format": FORMAT,
        "step": step,
        "config": config.as_dict(),
        "digest": digest,
        "compare_dense": compare_dense,
        "crc32": checksum(tensors),
    }
    replace_file(path, [safetensors.torch.save(tensors, {"moe_triton": json.dumps(header)})])


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads and verifies a checkpoint. Raises TrainingError naming the file: unreadable, truncated or foreign."""
    damaged = f"{path} is damaged or is not a checkpoint of moe-triton train"
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["moe_triton"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header["format"] != FORMAT or header["crc32"] != checksum(tensors):
            raise TrainingError(f"{damaged}: its contents do not match their checksum")
        return Checkpoint(
            path=path,
            step=header["step"],
            config=TrainConfig(**header["config"]),
            digest=header["digest"],
            compare_dense=header["compare_dense"],
            tensors=tensors,
        )
    except TrainingError:
        raise
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {reason(error)}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{damaged}: {error}") from error


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, workers: Workers = ALONE
) -> None:
    """Puts the weights, the optimizer's state and the generators' in place. Raises TrainingError if they do not fit.

    Every worker takes the rows of its own experts.
    """
    parameters = dict(model.named_parameters())
    names = parameter_names(model, optimizer)
    state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(names))}
    index_of = {name: index for index, name in enumerate(names)}
    weights = {}
    try:
        for name, value in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "model":
                weights[rest] = workers.local(value, parameters[rest], model) if rest in parameters else value
            elif kind == "optimizer":
                parameter, _, key = rest.rpartition(".")
                state[index_of[parameter]][key] = workers.local(value, parameters[parameter], model)
        model.load_state_dict(weights)
        groups = optimizer.state_dict()["param_groups"]
        # Before the first step AdamW has no state; an empty entry would make it believe that it has.
        optimizer.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})
        torch.set_rng_state(checkpoint.tensors["rng.cpu"])
        if "rng.cuda" in checkpoint.tensors:
            torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"], checkpoint.config.device)
    except (RuntimeError, KeyError) as error:
        raise TrainingError(f"{checkpoint.path} does not fit the model of its own settings: {error}") from error


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in the order of its state dict."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over the names and bytes of all tensors: safetensors itself would not notice a changed byte."""
    value = 0
    for name in sorted(tensors):
        data = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        value = zlib.crc32(data, zlib.crc32(name.encode(), value))
    return value
