"""torch.distributed.checkpoint over `GlobalTensor`s: it shares out the writing, and finds what each box has to read.

DTensor cannot say what we must: gate and up, sliced by expert tensor parallelism, are two boxes of one tensor, and a
rank that holds experts 1 and 5 has two as well. So the planners here speak of boxes, through the interface that
torch.distributed.checkpoint has for planners; no device mesh is needed, and one process is no special case. Storage is
torch's own for safetensors, which runs no code when it is read.

Imported where it is needed only: torch.distributed.checkpoint is slow to import.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moe_triton.distributed.checkpoint.global_tensors import GlobalTensor, Offset
from moe_triton.distributed.checkpoint.team import Team

Tensors = Mapping[str, GlobalTensor]


def write(folder: Path, tensors: Tensors, team: Team) -> set[str]:
    """Write every box once into safetensors files of `folder`; return the names of this rank's, flushed to disk."""
    writer = _Writer(folder, num_ranks=team.group.size)
    _run(team, "writing", lambda **how: dcp.save({**tensors}, storage_writer=writer, planner=_SavePlanner(), **how))
    return writer.written


def read(folder: Path, tensors: Tensors, team: Team) -> None:
    """Fill this rank's boxes from the files of `folder`, whichever ranks wrote them."""
    reader = HuggingFaceStorageReader(str(folder))
    _run(team, "reading", lambda **how: dcp.load({**tensors}, storage_reader=reader, planner=_LoadPlanner(), **how))
    for tensor in tensors.values():
        tensor.fill_copies()


def _run(team: Team, phase: str, function: Any) -> None:
    with team.error_context(phase), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            function(process_group=team.group.handle, no_dist=team.is_alone)
        except dcp.CheckpointException as error:  # the same on all ranks
            mine = error.failures.get(team.group.rank)
            if mine is not None and not isinstance(mine[0], Exception):  # ctrl-C, which torch catches too
                raise mine[0] from error
            raise team.failure(phase, {rank: failure[0] for rank, failure in error.failures.items()}) from error


def _chunk(offset: Offset, box: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(offset), sizes=box.size())


def _write_item(key: str, tensor: GlobalTensor, offset: Offset, box: Tensor) -> WriteItem:
    properties, size = dcp.metadata.TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape)
    data = dcp.planner.TensorWriteData(chunk=_chunk(offset, box), properties=properties, size=size)
    return WriteItem(MetadataIndex(key, torch.Size(offset)), dcp.planner.WriteItemType.SHARD, tensor_data=data)


class _SavePlanner(DefaultSavePlanner):
    """torch's planner, which gives boxes that several ranks have to one of them and checks that none is missing."""

    state_dict: dict[str, GlobalTensor]

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                _write_item(key, tensor, offset, box)
                for key, tensor in self.state_dict.items()
                for offset, box in tensor.boxes.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.state_dict[index.fqn].boxes[tuple(index.offset)].contiguous()


class _LoadPlanner(DefaultLoadPlanner):
    """torch's planner, which reads straight into the boxes."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.tensors: Tensors = state_dict
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, tensor in self.tensors.items():
            saved = self.metadata.state_dict_metadata[key]
            assert isinstance(saved, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, saved, [_chunk(*box) for box in tensor.boxes.items()])
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise TypeError(f"{read_item.storage_index.fqn}: got bytes, wanted tensors only")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.tensors[index.fqn].boxes[tuple(index.offset)]


class _Writer(HuggingFaceStorageWriter):
    """torch's writer, for ranks with several boxes of a tensor: a safetensors file holds a key once, so each goes into
    a further file."""

    def __init__(self, folder: Path, *, num_ranks: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.num_ranks = num_ranks
        self.written: set[str] = set()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files: list[list[WriteItem]] = []
        seen: dict[str, int] = {}
        for item in plan.items:
            place = seen[item.index.fqn] = seen.get(item.index.fqn, -1) + 1
            if place == len(files):
                files.append([])
            files[place].append(item)
        results: list[WriteResult] = []
        for place, items in enumerate(files):
            where = {**plan.storage_data, "shard_index": plan.storage_data["shard_index"] + place * self.num_ranks}
            part = dataclasses.replace(plan, items=items, storage_data=where)
            results += super().write_data(part, planner).wait()
        self.written = {result.storage_data.relative_path for result in results}
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done
