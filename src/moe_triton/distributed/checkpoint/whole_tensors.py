"""Whole tensors [E, ...], from a file or from memory, into a spread model: every rank takes its own experts only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe_triton.distributed.checkpoint.global_tensors import model_tensors, unwrapped
from moe_triton.distributed.checkpoint.hub_names import Part, hub_parts, pretrained
from moe_triton.distributed.errors import CheckpointError

Source = Mapping[str, Tensor] | str | PathLike[str]


def load_experts_from(source: Source, model: nn.Module, *, only_experts: bool = True) -> list[str]:
    """Fill the model from whole tensors [E, ...]: every rank takes its own experts, and of those its own slices.

    No rank talks to another, and of a file only the rank's own part is read. For a model of transformers, what the
    source has not under the model's own name is looked for under the hub's: a matrix per expert in most families.

    Args:
        source: a mapping of whole tensors by the model's names; or a safetensors file, its ".index.json", or the folder
            of a "model.safetensors" (what `export_safetensors` and transformers' `save_pretrained` write).
        model: its experts may be spread by `ExpertParallel`, its parameters by FSDP2; values take its dtype.
        only_experts: leave all other parameters and buffers as they are; else the source must have them too.

    Returns:
        The names that were filled.

    Raises:
        TypeError: an argument of the wrong kind, by name. ValueError: the model has no experts to fill, or a tensor of
        the source has another shape. CheckpointError: a file that cannot be read, a missing key; by name. Nothing is
        changed where the fault is in a name or a shape.
    """
    found = model_tensors(model)
    given = _reader(source)
    reader: _Memory | _Files | _Hub = given
    names = [name for name, tensor in found.items() if not only_experts or tensor.is_expert]
    if not names:
        raise ValueError("model: got one without experts, wanted one with experts, or only_experts=False")
    wanted = {name: found[name].as_global() for name in names}
    if (of_transformers := pretrained(unwrapped(model))) is not None:
        shapes = {name: tensor.shape for name, tensor in wanted.items() if not given.has(name)}
        reader = _Hub(given, shapes, hub_parts(of_transformers, shapes))
    for name, tensor in wanted.items():
        shape = reader.shape(name)
        if shape != tensor.shape:
            raise ValueError(f"source: {name!r} has shape {list(shape)}, wanted {list(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            for offset, box in tensor.boxes.items():
                spot = tuple(slice(begin, begin + size) for begin, size in zip(offset, box.shape, strict=True))
                box.copy_(reader.read(name, spot))
            tensor.fill_copies()
    return names


class _Memory:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise CheckpointError(f"source: has no {name!r}")
        if not isinstance(tensor := self.tensors[name], Tensor):
            raise TypeError(f"source: got {type(tensor).__name__} at {name!r}, wanted a Tensor")
        return tuple(tensor.shape)

    def read(self, name: str, spot: tuple[slice, ...]) -> Tensor:
        return self.tensors[name][spot]


class _Files:
    """Tensors by the files that hold them; of a file only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            index, single = path / "model.safetensors.index.json", path / "model.safetensors"
            path = index if index.is_file() else single
        self.path = path
        self.files: dict[str, Path] = {}
        try:
            if path.suffix == ".json":
                entries = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
                self.files = {name: path.parent / file for name, file in entries.items()}
            else:
                with safe_open(path, framework="pt") as file:
                    self.files = dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"source: cannot read {path}: {error}") from error

    def has(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.files:
            raise CheckpointError(f"source: {self.path} has no {name!r}")
        try:
            with safe_open(self.files[name], framework="pt") as file:
                return tuple(file.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"source: cannot read {name!r} in {self.files[name]}: {error}") from error

    def read(self, name: str, spot: tuple[slice, ...]) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_slice(name)[spot]


class _Hub:
    """The model's tensors, put together from a reader's tensors under the hub's names."""

    def __init__(
        self, reader: _Memory | _Files, shapes: dict[str, tuple[int, ...]], parts: dict[str, list[Part]]
    ) -> None:
        self.reader = reader
        self.shapes = shapes
        self.parts = parts

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.parts:
            return self.reader.shape(name)
        whole = self.shapes[name]
        for part in self.parts[name]:
            if part.expert is None:
                return self.reader.shape(part.name)
            if (shape := self.reader.shape(part.name)) != (wanted := part.shape(whole)):
                raise ValueError(f"source: {part.name!r} has shape {list(shape)}, wanted {list(wanted)}")
        return whole

    def read(self, name: str, spot: tuple[slice, ...]) -> Tensor:
        if name not in self.parts:
            return self.reader.read(name, spot)
        if (first := self.parts[name][0]).expert is None:
            return self.reader.read(first.name, spot)
        experts, rows, *rest = spot
        read: dict[int, list[Tensor]] = {expert: [] for expert in range(experts.start, experts.stop)}
        for part in self.parts[name]:
            low, high = max(part.low, rows.start), min(part.high, rows.stop)
            if part.expert in read and low < high:
                read[part.expert].append(self.reader.read(part.name, (slice(low - part.low, high - part.low), *rest)))
        return torch.stack([torch.cat(pieces) for pieces in read.values()])


def _reader(source: object) -> _Memory | _Files:
    if isinstance(source, Mapping):
        return _Memory(source)
    if isinstance(source, (str, PathLike)):
        return _Files(Path(source))
    raise TypeError(f"source: got {type(source).__name__}, wanted a mapping of tensors or a path")
