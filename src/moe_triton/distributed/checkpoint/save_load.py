"""Checkpoints of expert-parallel models: global tensors, so that any number of ranks can load what any other saved.

A checkpoint is a folder with a manifest (`checkpoint.json`) and a folder of safetensors files. A save writes a new
folder of files beside the old one, and only when every rank's are on disk is the manifest replaced, in one rename; then
the old files go. So what a reader finds is one whole checkpoint, the old or the new. Usage: docs/checkpoints.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_triton.distributed.checkpoint.global_tensors import GlobalTensor, model_tensors, named_experts
from moe_triton.distributed.checkpoint.manifest import NAME, Manifest, decode, dtype_name, dtype_of, encode
from moe_triton.distributed.checkpoint.optimizer_state import Restoration, describe
from moe_triton.distributed.checkpoint.team import Team
from moe_triton.distributed.errors import CheckpointError
from moe_triton.distributed.holders import StackedExperts
from moe_triton.files import file_checksum, sync_directory

Tensors = dict[str, GlobalTensor]


def save_checkpoint(
    folder: str | PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Save the model's parameters and persistent buffers, and the optimizer's state, as global tensors.

    Every rank of `group` calls it, and returns when the checkpoint is complete. The one that `folder` held before stays
    whole until then, and is removed afterwards.

    Args:
        folder: on a file system that all ranks share; made where it does not exist.
        model: its experts may be spread by `ExpertParallel`, its parameters by FSDP2; what several ranks have is
            written by one of them.
        optimizer: any torch optimizer whose state consists of tensors of the parameters' shapes and scalars.
        extra: anything else to keep, small: None, numbers, strings, tensors, and lists, tuples and dicts of such. The
            first rank's is saved.
        group: the processes that save together; None: all, or this one where torch.distributed is not in use.

    Raises:
        ValueError, TypeError: an argument that cannot be saved, by name.
        CheckpointError: the folder cannot be written, or the ranks do not agree on what they save.
        ExpertParallelError: a rank died or does not answer.
        Each of them is raised on every rank, and then the checkpoint that `folder` held is still there.
    """
    path = Path(folder)
    team = Team.of(group, f"save_checkpoint to {path}")
    tensors: Tensors = {}
    kept: dict[str, Any] = {}  # not among what the ranks compare: the first rank's is saved

    def collect() -> dict[str, Any]:
        mine = model_tensors(model)
        tensors.update({f"model.{name}": tensor.as_global() for name, tensor in mine.items()})
        described = None
        if optimizer is not None:
            described, state = describe(optimizer, mine)
            tensors.update(state)
        kept["extra"] = encode("extra", dict(extra or {}))
        return {
            "tensors": {key: _spec(tensor) for key, tensor in tensors.items()},
            "experts": {name: _experts(name, module) for name, module in named_experts(model).items()},
            "optimizer": described,
        }

    found = team.distinct("collecting the tensors", collect)
    try:
        contents = {**_merged(found), **kept}
    except ValueError as error:
        raise CheckpointError(f"{team.task}: {error}") from error
    data = team.first("making a folder", lambda: _new_folder(path))
    try:
        _write(path, data, tensors, contents, team)
    except BaseException:
        if team.is_first:
            _discard(path, data)
        raise


def _write(path: Path, data: str, tensors: Tensors, contents: dict[str, Any], team: Team) -> None:
    from moe_triton.distributed.checkpoint import storage

    full = {key: tensor for key, tensor in tensors.items() if 0 not in tensor.shape}
    written = storage.write(path / data, full, team)

    def measure() -> dict[str, dict[str, int]]:
        files = {name: path / data / name for name in written}
        return {name: {"bytes": f.stat().st_size, "crc32": file_checksum(f)} for name, f in files.items()}

    files = {name: entry for part in team.gather("checking the files", measure) for name, entry in part.items()}

    def switch() -> None:
        for name, entry in files.items():
            if not (path / data / name).is_file() or (path / data / name).stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{path} is not on a file system that all ranks share: {name} is not seen here")
        for folder in (path / data, path):
            sync_directory(folder)
        Manifest(data=data, files=files, **contents).write(path)
        _remove_others(path, data)

    team.first("switching to the new checkpoint", switch)


def load_checkpoint(
    folder: str | PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Load what `save_checkpoint` saved, into a model and optimizer that may be spread over other ranks or not at all.

    Every rank of `group` calls it and reads its own part, into the model's memory; values take the model's dtype. All
    checks come first: of names, shapes and the files' checksums (each file is checked by one rank). Reading runs no
    code from the checkpoint: it is safetensors and JSON.

    Args:
        folder: where `save_checkpoint` saved.
        model: with the names and global shapes that were saved.
        optimizer: of the kind and with the groups that were saved; its state and settings are replaced. None: the
            state, where there is one, is left out.
        group: the processes that load together; None: all, or this one where torch.distributed is not in use.

    Returns:
        The `extra` that was saved.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, by name.
        CheckpointError: no checkpoint there, a damaged or missing file, a missing or unexpected key, another shape; on
            every rank, naming file and key, with the model untouched.
        ExpertParallelError: a rank died or does not answer.
    """
    path = Path(folder)
    team = Team.of(group, f"load_checkpoint from {path}")
    manifest = team.first("reading the manifest", lambda: Manifest.read(path))
    tensors: Tensors = {}
    restorations: list[Restoration] = []

    def prepare() -> list[str]:
        mine = model_tensors(model)
        tensors.update({f"model.{name}": tensor.as_global() for name, tensor in mine.items()})
        if optimizer is not None:
            if manifest.optimizer is None:
                raise CheckpointError(f"{path / NAME} has no optimizer state: it was saved without an optimizer")
            restorations.append(Restoration(optimizer, mine, manifest.optimizer))
            tensors.update(restorations[0].tensors)
        _check_fit(tensors, manifest, path)
        return list(tensors)

    known = {key for keys in team.distinct("comparing with the model", prepare).values() for key in keys}
    saved = manifest.tensors if optimizer is not None else [key for key in manifest.tensors if key.startswith("model.")]
    if unexpected := sorted(set(saved) - known):
        raise CheckpointError(f"{team.task}: {path / NAME} has {_some(unexpected)}, which the model has not")
    mine = sorted(manifest.files)[team.group.rank :: team.group.size]
    team.run("checking the files", lambda: _verify(path / manifest.data, mine, manifest))

    from moe_triton.distributed.checkpoint import storage

    full = {key: tensor for key, tensor in tensors.items() if 0 not in tensor.shape}
    storage.read(path / manifest.data, full, team)
    for restoration in restorations:
        restoration.finish()
    return decode(manifest.extra)


def _spec(tensor: GlobalTensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}


def _experts(name: str, module: StackedExperts) -> dict[str, Any]:
    found: dict[str, Any] = {"num_experts": module.num_experts}
    if module.placement is not None:
        found["placement"] = encode(f"{name}.placement", module.placement.physical_to_logical)
    return found


def _merged(found: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """What the ranks save, together. Raises ValueError where two of them do not agree.

    `found` has what they save by rank, of equal ones only the first.
    """
    tensors: dict[str, Any] = {}
    experts: dict[str, Any] = {}
    state: dict[str, Any] = {}
    first = found[0]["optimizer"]
    for rank, mine in found.items():
        _add("", tensors, mine["tensors"], rank)
        _add("experts of ", experts, mine["experts"], rank)
        theirs = mine["optimizer"]
        if (theirs is None) != (first is None):
            raise ValueError("optimizer: got one on some ranks only, wanted one on all or on none")
        if theirs is not None:
            # a parameter without state has to be so everywhere, or pieces of its moments would be missing
            names = [name for group in theirs["groups"] for name in group["names"]]
            _add("optimizer state of ", state, {name: theirs["state"].get(name, {}) for name in names}, rank)
            settings = [group["settings"] for group in theirs["groups"]]
            if theirs["kind"] != first["kind"] or settings != [group["settings"] for group in first["groups"]]:
                raise ValueError(f"optimizer: its kind or settings on rank {rank} are not those on rank 0")
    optimizer = None
    if first is not None:
        lists = [[group["names"] for group in mine["optimizer"]["groups"]] for mine in found.values()]
        groups = [
            {"names": list(dict.fromkeys(name for names in lists for name in names[i])), "settings": group["settings"]}
            for i, group in enumerate(first["groups"])
        ]
        state = {name: entries for name, entries in state.items() if entries}
        optimizer = {"kind": first["kind"], "groups": groups, "state": state}
    return {"tensors": tensors, "experts": experts, "optimizer": optimizer}


def _add(what: str, all_ranks: dict[str, Any], mine: dict[str, Any], rank: int) -> None:
    for key, value in mine.items():
        if all_ranks.setdefault(key, value) != value:
            raise ValueError(f"{what}{key}: {value} on rank {rank}, but {all_ranks[key]} on one before it")


def _check_fit(tensors: Tensors, manifest: Manifest, path: Path) -> None:
    file = path / NAME
    if missing := sorted(set(tensors) - set(manifest.tensors)):
        raise CheckpointError(f"{file} has no {_some(missing)}, which the model has")
    for key, tensor in tensors.items():
        shape, dtype = manifest.tensors[key]["shape"], dtype_of(manifest.tensors[key]["dtype"])
        if list(tensor.shape) != shape:
            raise CheckpointError(f"{key}: {file} has shape {shape}, the model {list(tensor.shape)}")
        if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.dtype.is_floating_point):
            raise CheckpointError(f"{key}: {file} has dtype {dtype}, the model {tensor.dtype}")


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(repr(key) for key in keys[:5]) + more


def _verify(folder: Path, names: Iterable[str], manifest: Manifest) -> None:
    for name in names:
        file, wanted = folder / name, manifest.files[name]
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete")
        if (size := file.stat().st_size) != wanted["bytes"]:
            raise CheckpointError(f"{file} is damaged: it has {size} bytes, wanted {wanted['bytes']}")
        if file_checksum(file) != wanted["crc32"]:
            raise CheckpointError(f"{file} is damaged: its contents do not match their checksum")


def _new_folder(path: Path) -> str:
    """Makes the folder for the next save's files, and removes what interrupted ones left. Returns its name."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        sync_directory(path.parent)
    if (current := _current(path)) is not None:
        _remove_others(path, current)
    last = max((int(folder.name.removeprefix(PREFIX)) for folder in _data_folders(path)), default=0)
    name = f"{PREFIX}{last + 1:06d}"
    (path / name).mkdir()
    return name


PREFIX = "tensors-"


def _data_folders(path: Path) -> list[Path]:
    return [folder for folder in path.glob(f"{PREFIX}*") if folder.name.removeprefix(PREFIX).isdecimal()]


def _current(path: Path) -> str | None:
    try:
        return Manifest.read(path).data
    except CheckpointError:
        return None


def _remove_others(path: Path, data: str) -> None:
    for folder in _data_folders(path):
        if folder.name != data:
            shutil.rmtree(folder, ignore_errors=True)


def _discard(path: Path, data: str) -> None:
    """Removes a failed save's files, unless the manifest names them (only flushing it failed) or cannot be read."""
    current = _current(path)
    if current != data and (current is not None or not (path / NAME).exists()):
        shutil.rmtree(path / data, ignore_errors=True)
