"""Process groups and device meshes made from the rank tables, once, in one order on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_triton.distributed.plan import KINDS, RankTables, plan

# torch 2.13 has renamed it, and warns of the old name
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One of this rank's groups: its members' global ranks, this rank's place, and torch's handle.

    A group of one has a process group of its own too, since torch takes None for all ranks; `handle` is None without
    torch.distributed only.
    """

    ranks: tuple[int, ...]
    rank: int
    handle: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def name(self) -> str:
        """torch's name of the group, the same on all of its ranks."""
        return "" if self.handle is None else self.handle.group_name


ALONE = Group(ranks=(0,), rank=0)  # without torch.distributed


def group_from_handle(handle: dist.ProcessGroup | None) -> Group:
    """The Group of a torch process group that this rank is in."""
    handle = dist.group.WORLD if handle is None else handle
    return Group(ranks=tuple(dist.get_process_group_ranks(handle)), rank=dist.get_rank(handle), handle=handle)


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """This rank's groups of every kind; see `moe_triton.distributed.plan` for the kinds."""

    tables: RankTables
    rank: int
    dp: Group
    tp: Group
    pp: Group
    ep: Group
    edp: Group
    etp: Group
    alone: Group  # of this rank only

    @cached_property
    def moe_mesh(self) -> DeviceMesh:
        """A mesh [edp, ep] over the ranks of this pipeline stage and expert tensor slice, for DTensor and FSDP2."""
        stage, _, _, slot = (int(i[0]) for i in (self.tables.moe == self.rank).nonzero())
        return self._mesh(torch.from_numpy(self.tables.moe[stage, :, :, slot].copy()), ("edp", "ep"))

    @cached_property
    def dp_mesh(self) -> DeviceMesh:
        """A mesh [dp] over the data-parallel ranks."""
        return self._mesh(torch.tensor(self.dp.ranks), ("dp",))

    def _mesh(self, ranks: torch.Tensor, names: tuple[str, ...]) -> DeviceMesh:
        handles = [getattr(self, name).handle for name in names]
        group = handles if len(handles) > 1 else handles[0]
        return DeviceMesh.from_group(group, device_type(), mesh=ranks, mesh_dim_names=names)


def device_type() -> str:
    """The device that the default process group's collectives take: "cuda" under NCCL, else "cpu"."""
    return "cuda" if "nccl" in dist.get_backend() else "cpu"


def default_timeout() -> timedelta:
    """What init_process_group was given. new_group would take 30 minutes where it is not told."""
    world = dist.group.WORLD
    assert world is not None
    options = world._get_backend(torch.device(device_type())).options
    return dist.default_pg_timeout if options is None else options._timeout  # the "fake" backend has none


_made: dict[tuple[object, ...], dist.ProcessGroup] = {}  # by the default group and the members


def make_groups(tables: RankTables | None = None, *, timeout: timedelta | None = None, **sizes: Any) -> ParallelGroups:
    """The groups of `tables`, or of `plan(world, **sizes)`, on this rank.

    Every rank of the world must call it with the same arguments: torch makes groups collectively. Groups with the same
    members are made once.

    Args:
        tables: from `plan`; None plans the present world.
        timeout: after which a collective fails; None is the default group's.
        sizes: pp, tp, ep, etp and order for `plan` where `tables` is None.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the tables are for another number of ranks.
    """
    if not dist.is_initialized():
        raise RuntimeError("make_groups: torch.distributed is not initialised; call init_process_group first")
    world, rank = dist.get_world_size(), dist.get_rank()
    tables = plan(world, **sizes) if tables is None else tables
    if tables.world != world:
        raise ValueError(f"tables: got a plan for {tables.world} ranks, wanted one for {world}")
    mine = {}
    for kind in KINDS:
        for ranks in getattr(tables, kind):
            handle = _process_group(tuple(ranks), timeout)
            if rank in ranks:
                mine[kind] = Group(ranks=tuple(ranks), rank=ranks.index(rank), handle=handle)
    return ParallelGroups(tables=tables, rank=rank, alone=group_of_one(), **mine)


def my_group(partition: list[list[int]]) -> Group:
    """This rank's group of a partition of the world. Every rank makes all of them, in one order, as torch wants it."""
    rank, mine = dist.get_rank(), None
    for ranks in partition:
        handle = _process_group(tuple(ranks), None)
        if rank in ranks:
            mine = Group(ranks=tuple(ranks), rank=ranks.index(rank), handle=handle)
    assert mine is not None
    return mine


def group_of_one(mesh: torch.Tensor | None = None) -> Group:
    """Return the group of this rank only; every rank of the world, or of a `mesh` of some of its ranks, calls it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if mesh is None or mesh.numel() == world:
        return my_group([[other] for other in range(world)])
    key = (dist.group.WORLD, rank)
    if key not in _made:  # not every rank of the world makes this one, so that its key is not `_process_group`'s
        _made[key] = dist.new_group([rank], use_local_synchronization=True)
    return Group(ranks=(rank,), rank=0, handle=_made[key])


def _process_group(ranks: tuple[int, ...], timeout: timedelta | None) -> dist.ProcessGroup:
    if len(ranks) == 1:
        timeout = None  # there is nobody to wait for
    elif timeout is None:
        timeout = default_timeout()
    key = (dist.group.WORLD, ranks, timeout)
    if key not in _made:
        _made[key] = dist.new_group(list(ranks), timeout=timeout)
    return _made[key]
