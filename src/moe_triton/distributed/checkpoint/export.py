"""One set of safetensors files of a model, spread or not, under its own names or those of the hub."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_triton.checks import check_choice
from moe_triton.distributed.checkpoint.global_tensors import GlobalTensor, Offset, as_global, model_tensors, unwrapped
from moe_triton.distributed.checkpoint.hub_names import Part, config_files, hub_parts, pretrained
from moe_triton.distributed.checkpoint.team import Team
from moe_triton.distributed.errors import CheckpointError
from moe_triton.distributed.groups import device_type
from moe_triton.files import reason, replace_file

# As safetensors calls them.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
Shapes = dict[Offset, tuple[int, ...]]  # of boxes
Owners = dict[str, dict[Offset, tuple[int, tuple[int, ...]]]]  # of each tensor's boxes: the rank, and the box's shape


def export_safetensors(
    path: str | PathLike[str],
    model: nn.Module,
    *,
    names: str = "auto",
    max_file_bytes: int = 50 * 10**9,
    group: dist.ProcessGroup | None = None,
) -> list[Path]:
    """Write the model's parameters and persistent buffers to safetensors, as one process would hold them.

    A model of transformers is written as `AutoModelForCausalLM.from_pretrained` of its folder loads it: under the
    hub's names (a matrix per expert in most families), with config.json beside it. Any other model is written under its
    own names, with experts as [E, ...]; the layout of `Experts` is that of transformers.

    The first rank writes, and gathers expert by expert: it holds its own part and one expert (or one tensor that is no
    expert's), the others only their own. An interrupted export leaves what was there before, and files named "*.tmp".

    Args:
        path: the file, "model.safetensors" by custom. A model of more than `max_file_bytes` goes into
            "model-00001-of-0000N.safetensors" and so on, with "model.safetensors.index.json" beside them.
        model: its experts may be spread by `ExpertParallel`, its parameters by FSDP2. Adapters are to be merged first.
        names: "hub" (of a model of transformers), "model" (its own), or "auto": "hub" where there are any.
        max_file_bytes: of tensors in one file; a larger tensor gets a file of its own, with all of its experts.
        group: the processes that hold the model; None: all, or this one where torch.distributed is not in use. Every
            rank of it calls the function.

    Returns:
        The files that hold tensors.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, by name; a model whose names on the hub are not to be had,
        or that has adapters of PEFT. CheckpointError: the file cannot be written; on every rank. ExpertParallelError: a
        rank died or does not answer.
    """
    target = Path(path)
    team = Team.of(group, f"export_safetensors to {target}")
    tensors: dict[str, GlobalTensor] = {}
    config: dict[str, str] = {}

    def collect() -> dict[str, _Described]:
        if target.suffix != ".safetensors":
            raise ValueError(f"path: got {str(target)!r}, wanted a name that ends in .safetensors")
        if max_file_bytes < 1:
            raise ValueError(f"max_file_bytes: got {max_file_bytes}, wanted at least 1")
        check_choice("names", names, ("auto", "hub", "model"))
        of_transformers = pretrained(inner := unwrapped(model))
        if names == "hub" and of_transformers is None:
            raise TypeError(f"model: got {type(inner).__name__}, wanted a model of transformers for names='hub'")
        if any(hasattr(module, "unload_and_optionally_merge_module") for module in inner.modules()):
            raise ValueError(
                "model: has adapters of PEFT, wanted model.merge_and_unload() first, or its save_pretrained"
            )
        found = {}
        for name, tensor in model_tensors(model).items():
            if tensor.live.dtype not in DTYPES:
                raise TypeError(f"model: {name!r} has dtype {tensor.live.dtype}, which safetensors has not")
            part = as_global(tensor.live if tensor.live.dim() else tensor.live.reshape(1), tensor.layout)
            found[name] = _Described(
                shape=tuple(part.shape) if tensor.live.dim() else (),
                dtype=part.dtype,
                rows=1 if tensor.is_expert else max(1, part.shape[0]),
                parts=[Part(name)],
            )
            tensors[name] = part
        if of_transformers is not None and names != "model":
            hub = hub_parts(of_transformers, {name: tensor.shape for name, tensor in found.items()})
            for name, parts in hub.items():
                rows = found[name].rows if parts[0].expert is None else 1
                found[name] = replace(found[name], parts=parts, rows=rows)
            floats = [value.dtype for value in found.values() if value.dtype.is_floating_point]
            config.update(config_files(of_transformers, floats[0]))
        return found

    phase = "collecting the tensors"
    described = team.distinct(phase, collect)
    parts = _parts({name: value for mine in described.values() for name, value in mine.items()}, max_file_bytes)
    shapes = team.gather(phase, lambda: {name: _shapes(tensor) for name, tensor in tensors.items()})
    owners = _owners(shapes)
    mine = team.scatter(phase, lambda: _by_owner(owners, team.group.size))
    sources = _Sources(team=team, tensors=tensors, owners=owners, mine=mine)
    files = _file_names(target, len(parts))
    failure: OSError | None = None
    for file, part in zip(files, parts, strict=True):
        pieces = _pieces(part, sources)
        if not team.is_first:
            for _ in pieces:
                pass
            continue
        chunks = _file_bytes(part, pieces)
        try:
            if failure is None:
                target.parent.mkdir(parents=True, exist_ok=True)
                replace_file(_aside(file, target), chunks)
        except OSError as error:
            failure = error
        for _ in chunks:  # the others go on sending
            pass

    def finish() -> None:
        if failure is not None:
            raise CheckpointError(f"cannot write {target}: {reason(failure)}; what was there before is intact")
        for file in files:
            if (aside := _aside(file, target)) != file:
                os.replace(aside, file)
        if len(parts) > 1:
            total = sum(value.bytes for part in parts for value in part.values())
            where = {
                written.name: file.name
                for file, part in zip(files, parts, strict=True)
                for tensor in part.values()
                for written in tensor.parts
            }
            index = {"metadata": {"total_size": total}, "weight_map": where}
            replace_file(target.with_name(f"{target.name}.index.json"), [json.dumps(index, indent=2).encode()])
        for name, text in config.items():
            replace_file(target.with_name(name), [text.encode()])

    team.first("writing", finish)
    return files


@dataclass(frozen=True, kw_only=True)
class _Described:
    """A tensor as the other ranks need to know it.

    It is written `rows` at a time, 1 expert or all that there are, and under the names of its `parts`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int
    parts: list[Part]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _parts(tensors: dict[str, _Described], limit: int) -> list[dict[str, _Described]]:
    """The tensors of each file, in the model's order, so that a layer is not scattered."""
    parts: list[dict[str, _Described]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.bytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.bytes
    # safetensors wants every tensor aligned to its elements
    return [dict(sorted(part.items(), key=lambda item: -item[1].dtype.itemsize)) for part in parts]


def _file_names(target: Path, count: int) -> list[Path]:
    if count == 1:
        return [target]
    return [target.with_name(f"{target.stem}-{i + 1:05d}-of-{count:05d}.safetensors") for i in range(count)]


def _aside(name: Path, target: Path) -> Path:
    """One of several files is only given its name when all are there."""
    return name if name == target else name.with_name(f"{name.name}.part.tmp")


def _file_bytes(part: dict[str, _Described], pieces: Iterator[Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in part.values():
        for written in tensor.parts:
            shape = written.shape(tensor.shape)
            end = start + math.prod(shape) * tensor.dtype.itemsize
            header[written.name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for piece in pieces:
        yield piece.reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """Where the boxes of every tensor are.

    tensors  what is on this rank
    owners   on the first rank: who gives each box
    mine     the offsets of the boxes that this rank gives, by tensor
    """

    team: Team
    tensors: dict[str, GlobalTensor]
    owners: Owners
    mine: dict[str, list[Offset]]


def _shapes(tensor: GlobalTensor) -> Shapes:
    return {offset: tuple(box.shape) for offset, box in tensor.boxes.items()}


def _owners(shapes: list[dict[str, Shapes]]) -> Owners:
    """The first of the ranks that have a box gives it."""
    found: Owners = {}
    for rank, mine in enumerate(shapes):
        for name, boxes in mine.items():
            owners = found.setdefault(name, {})
            for offset, shape in boxes.items():
                owners.setdefault(offset, (rank, shape))
    return found


def _by_owner(owners: Owners, size: int) -> list[dict[str, list[Offset]]]:
    """What each rank gives."""
    found: list[dict[str, list[Offset]]] = [{} for _ in range(size)]
    for name, boxes in owners.items():
        for offset, (rank, _) in boxes.items():
            found[rank].setdefault(name, []).append(offset)
    return found


def _pieces(part: dict[str, _Described], sources: _Sources) -> Iterator[Tensor]:
    """The part's tensors, some rows at a time: whole on the first rank; the others send it what they have and see none.

    All ranks walk over the same rows in the same order.
    """
    for name, tensor in part.items():
        for start in range(0, tensor.shape[0] if tensor.shape else 1, tensor.rows):
            if not sources.team.is_first:
                _send_rows(name, start, start + tensor.rows, sources)
                continue
            whole = _rows(name, tensor, start, sources)
            if tensor.parts[0].expert is None:
                yield whole
                continue
            for written in tensor.parts:
                if written.expert == start:
                    yield whole[0, written.low : written.high]


def _send_rows(name: str, start: int, stop: int, sources: _Sources) -> None:
    """Send the first rank what this rank gives of rows [start, stop) of a tensor."""
    team = sources.team
    for offset in sources.mine.get(name, ()):
        box = sources.tensors[name].boxes[offset]
        low, high = max(offset[0], start), min(offset[0] + box.shape[0], stop)
        if low < high:
            with team.error_context("sending"):
                rows = box[low - offset[0] : high - offset[0]].to(device_type())
                dist.send(_as_bytes(rows), team.group.ranks[0], group=team.group.handle)


def _rows(name: str, tensor: _Described, start: int, sources: _Sources) -> Tensor:
    """Rows [start, start + rows) of the tensor, on the first rank."""
    team, whole = sources.team, torch.zeros(tensor.rows, *tensor.shape[1:], dtype=tensor.dtype)
    for offset, (owner, shape) in sources.owners[name].items():
        low, high = max(offset[0], start), min(offset[0] + shape[0], start + tensor.rows)
        if low >= high:
            continue
        here = tuple(slice(begin, begin + size) for begin, size in zip(offset[1:], shape[1:], strict=True))
        into = whole[(slice(low - start, high - start), *here)]
        if owner == team.group.rank:
            into.copy_(sources.tensors[name].boxes[offset][low - offset[0] : high - offset[0]])
        else:
            into.copy_(_receive(into, owner, team))
    return whole


def _receive(like: Tensor, owner: int, team: Team) -> Tensor:
    room = torch.zeros(like.shape, dtype=like.dtype, device=device_type())
    with team.error_context("receiving"):
        dist.recv(_as_bytes(room), team.group.ranks[owner], group=team.group.handle)
    return room


def _as_bytes(tensor: Tensor) -> Tensor:
    """gloo knows neither float8 nor bool."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
