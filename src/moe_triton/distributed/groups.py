"""Process groups and device meshes made from the rank tables, once, in one order on all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_triton.distributed.rank_tables import KINDS, RankTables, plan
from moe_triton.torch_internals import timeout_of

# torch 2.13 has renamed it, and warns of the old name
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One of this rank's groups: its members' global ranks, this rank's place, and torch's handle.

    A group of one has a process group of its own too, since torch takes None for all ranks; `handle` is None without
    torch.distributed only. A deep copy shares the process group; pickling leaves it out, and `handle` of an unpickled
    group raises RuntimeError.
    """

    ranks: tuple[int, ...]
    rank: int
    handle: dist.ProcessGroup | None = field(default_factory=lambda: None, repr=False)  # no class attribute: see below

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def name(self) -> str:
        """torch's name of the group, the same on all of its ranks."""
        return "" if self.handle is None else self.handle.group_name

    def __deepcopy__(self, memo: object) -> Group:
        return self

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in vars(self).items() if k != "handle" or v is None}

    def __getattr__(self, name: str) -> Any:
        """Raise for what is missing: for `handle` with the reason."""
        if name == "handle":
            raise RuntimeError(
                "handle: got an unpickled group, which has no process group; wanted a layer made in this process with "
                "ExpertParallel(...), which can load the unpickled layer's state_dict"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


ALONE = Group(ranks=(0,), rank=0)  # without torch.distributed


def group_from_handle(handle: dist.ProcessGroup | None) -> Group:
    """Return the Group of a torch process group that this rank is in; None is the default group."""
    handle = dist.group.WORLD if handle is None else handle
    return Group(ranks=tuple(dist.get_process_group_ranks(handle)), rank=dist.get_rank(handle), handle=handle)


def number_of_ranks(groups: Iterable[Group]) -> int:
    """Ranks in the product of the groups."""
    return math.prod(group.size for group in groups)


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """This rank's groups of every kind; see `moe_triton.distributed.rank_tables` for the kinds."""

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
        """Return a mesh [dp] over the data-parallel ranks."""
        return self._mesh(torch.tensor(self.dp.ranks), ("dp",))

    def _mesh(self, ranks: torch.Tensor, names: tuple[str, ...]) -> DeviceMesh:
        handles = [getattr(self, name).handle for name in names]
        group = handles if len(handles) > 1 else handles[0]
        return DeviceMesh.from_group(group, device_type(), mesh=ranks, mesh_dim_names=names)


def device_type() -> str:
    """Return the device whose collectives the default process group runs: "cuda" where it has NCCL, else "cpu"."""
    # not get_backend(), which is "undefined" after init_process_group() without a backend
    return "cuda" if "cuda:nccl" in dist.get_backend_config() else "cpu"


def default_timeout() -> timedelta:
    """Return the time-out that init_process_group was given; new_group would take 30 minutes by default."""
    world = dist.group.WORLD
    assert world is not None
    timeout = timeout_of(world, torch.device(device_type()))
    return dist.default_pg_timeout if timeout is None else timeout


# by the default group, for as long as there is that one; then by members and time-out
_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[object, ...], dist.ProcessGroup]] = WeakKeyDictionary()


def make_groups(tables: RankTables | None = None, *, timeout: timedelta | None = None, **sizes: Any) -> ParallelGroups:
    """Make the groups of `tables`, or of `plan(world, **sizes)`, on this rank.

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
        raise ValueError(f"tables: got those of {tables.world} ranks, wanted those of {world}")
    mine = {kind: my_group(getattr(tables, kind), timeout) for kind in KINDS}
    return ParallelGroups(tables=tables, rank=rank, alone=group_of_one(), **mine)


def my_group(partition: list[list[int]], timeout: timedelta | None = None) -> Group:
    """Return this rank's group of a partition of the world. Every rank makes all of them, in one order, for torch."""
    rank, mine = dist.get_rank(), None
    for ranks in partition:
        if ranks == [rank]:
            mine = group_of_one()
        elif len(ranks) > 1:
            handle = _process_group(tuple(ranks), timeout)
            if rank in ranks:
                mine = Group(ranks=tuple(ranks), rank=ranks.index(rank), handle=handle)
    assert mine is not None
    return mine


def group_of_one() -> Group:
    """Return the group of this rank only. Its member alone makes it, so that it costs no barrier of the world."""
    rank, made = dist.get_rank(), _made_here()
    if (rank,) not in made:
        made[(rank,)] = dist.new_group([rank], use_local_synchronization=True)
    return Group(ranks=(rank,), rank=0, handle=made[(rank,)])


def _process_group(ranks: tuple[int, ...], timeout: timedelta | None) -> dist.ProcessGroup:
    made, key = _made_here(), (ranks, default_timeout() if timeout is None else timeout)
    if key not in made:
        made[key] = dist.new_group(list(ranks), timeout=key[1])
    return made[key]


def _made_here() -> dict[tuple[object, ...], dist.ProcessGroup]:
    world = dist.group.WORLD
    assert world is not None
    return _made.setdefault(world, {})
