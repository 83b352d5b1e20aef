"""Process groups and device meshes made from the rank tables, once, in one order on all ranks."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_triton.checks import check_choice
from moe_triton.distributed.rank_tables import (
    DENSE_NAMES,
    EXPERT_NAMES,
    KINDS,
    RankTables,
    mesh_tables,
    plan,
)
from moe_triton.torch_internals import timeout_of

# torch 2.13 has renamed it, and warns of the old name
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One of this rank's groups: its members' global ranks, this rank's place, and a reference to torch's handle.

    A group of one has a process group of its own too, since torch takes None for all ranks; the reference is None
    without torch.distributed only. It is a weak one: a layer that lives longer than `destroy_process_group()` would
    keep gloo's threads running, and they can end a process with SIGABRT at its exit. A deep copy shares the process
    group; pickling leaves it out.
    """

    ranks: tuple[int, ...]
    rank: int
    reference: ref[dist.ProcessGroup] | None = field(default_factory=lambda: None, repr=False)  # no class attribute
    size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.ranks))

    @property
    def handle(self) -> dist.ProcessGroup | None:
        """torch's process group. Raises RuntimeError where it was destroyed, and for an unpickled group."""
        handle = None if self.reference is None else self.reference()
        if handle is None and self.reference is not None:
            raise RuntimeError(
                "handle: got a group that destroy_process_group() has ended; wanted one of make_groups()"
            )
        return handle

    @cached_property
    def name(self) -> str:
        """torch's name of the group, the same on all of its ranks."""
        handle = self.handle
        return "" if handle is None else handle.group_name

    def __deepcopy__(self, memo: object) -> Group:
        return self

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in vars(self).items() if k != "name" and (k != "reference" or v is None)}

    def __getattr__(self, name: str) -> Any:
        """Raise for what is missing: for `reference` with the reason."""
        if name == "reference":
            raise RuntimeError(
                "handle: got an unpickled group, which has no process group; wanted a layer made in this process with "
                "ExpertParallel(...), which can load the unpickled layer's state_dict"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


ALONE = Group(ranks=(0,), rank=0)  # without torch.distributed


@contextmanager
def default_group(device: torch.device) -> Iterator[None]:
    """Make the default process group of the processes that torchrun has started, and destroy it in the end."""
    importlib.import_module("torch.distributed.nn.functional")  # later its default arguments would keep the group alive
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def group_from_handle(handle: dist.ProcessGroup | None) -> Group:
    """Return the Group of a torch process group that this rank is in; None is the default group."""
    handle = dist.group.WORLD if handle is None else handle
    assert handle is not None
    return Group(ranks=tuple(dist.get_process_group_ranks(handle)), rank=dist.get_rank(handle), reference=ref(handle))


def number_of_ranks(groups: Iterable[Group]) -> int:
    """Ranks in the product of the groups."""
    return math.prod(group.size for group in groups)


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """How torch makes the process groups of a kind.

    high_priority  NCCL's kernels run on a stream of high priority, so that they do not wait behind products; other
                   backends have no such streams
    description    what torch's logs and flight recorder call them; None: "moe_triton " and the kind
    """

    high_priority: bool = False
    description: str | None = None


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
    dp_replicate: Group
    dp_shard: Group
    edp_replicate: Group
    edp_shard: Group
    alone: Group  # of this rank only
    control: Group  # of all ranks, for Python objects

    @classmethod
    def from_meshes(
        cls, *, dense: DeviceMesh, experts: DeviceMesh, names: Mapping[str, str] | None = None
    ) -> ParallelGroups:
        """Return the groups of two meshes over all ranks, such as torchtitan's dense and sparse ones.

        A dimension's own process groups are used. Where a kind is several dimensions, such as dp of dp_replicate,
        dp_shard and cp, its groups are made: every rank must call this with the same meshes.

        Args:
            dense: of the dense parameters: pipeline stages "pp", replicas of FSDP's shards "dp_replicate", ranks with
                other tokens "dp" (also "dp_shard", "fsdp", "cp", "dp_shard_cp", "batch"), with the same tokens "tp".
            experts: "pp", "dp_replicate", ranks with the same experts and other tokens "edp" (also "efsdp",
                "dp_shard_in_ep", "dp_shard_mod_ep"), with other experts "ep", with slices of the same experts "etp"
                (also "tp").
            names: what dimensions with other names are: {"data": "dp"}. Those of one rank need no meaning.

        Raises:
            TypeError: no DeviceMesh. ValueError: a dimension of unknown meaning, by name; a mesh that is a slice of a
            larger one; meshes with other stages or replicas; no dimension "ep".
        """
        for argument, mesh in (("dense", dense), ("experts", experts)):
            if not isinstance(mesh, DeviceMesh):
                raise TypeError(f"{argument}: got {type(mesh).__name__}, wanted a DeviceMesh")
        dense_names, expert_names = dense.mesh_dim_names or (), experts.mesh_dim_names or ()
        tables = mesh_tables(dense.mesh.numpy(), dense_names, experts.mesh.numpy(), expert_names, names)
        _check_world("dense", tables)
        dense_axes, expert_axes = {**DENSE_NAMES, **(names or {})}, {**EXPERT_NAMES, **(names or {})}
        if "ep" not in (expert_axes.get(name) for name in expert_names):
            raise ValueError(f"experts: got a mesh with the dimensions {expert_names}, wanted one called 'ep'")

        def known(kind: str) -> dist.ProcessGroup | None:
            mesh, axes = (experts, expert_axes) if kind.startswith("e") else (dense, dense_axes)
            axis = {"dp_shard": "dp", "edp_shard": "edp", "edp_replicate": "dp_replicate"}.get(kind, kind)
            spread = [
                name
                for name, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)
                if size > 1 and (axes[name] == axis or (kind in ("dp", "edp") and axes[name] == "dp_replicate"))
            ]
            return mesh.get_group(spread[0]) if len(spread) == 1 else None

        mine = {}
        for kind in KINDS:
            handle = known(kind)
            mine[kind] = my_group(getattr(tables, kind), kind=kind) if handle is None else group_from_handle(handle)
        return cls(tables=tables, rank=dist.get_rank(), alone=group_of_one(), control=control_group(), **mine)

    @cached_property
    def moe_mesh(self) -> DeviceMesh:
        """A mesh [edp, ep] over the ranks of this pipeline stage and expert tensor slice, for DTensor and FSDP2."""
        stage, _, _, slot = (int(i[0]) for i in (self.tables.moe == self.rank).nonzero())
        return self._mesh(self.tables.moe[stage, :, :, slot], ("edp", "ep"))

    @cached_property
    def edp_mesh(self) -> DeviceMesh:
        """A mesh [edp] over the ranks with the same experts; with replicas of shards [edp_replicate, edp_shard]."""
        if self.tables.replicas == 1:
            return self.moe_mesh["edp"]
        return self._hybrid_mesh("edp")

    @cached_property
    def dp_mesh(self) -> DeviceMesh:
        """A mesh [dp] over the data-parallel ranks; with replicas of shards [dp_replicate, dp_shard]."""
        if self.tables.replicas == 1:
            return self._mesh(np.array(self.dp.ranks), ("dp",))
        return self._hybrid_mesh("dp")

    def _hybrid_mesh(self, kind: str) -> DeviceMesh:
        """The mesh of this rank's group of `kind`, as FSDP2 takes it for HSDP."""
        tables = self.tables
        if kind == "dp":
            stage, _, slot = (int(i[0]) for i in (tables.dense == self.rank).nonzero())
            mine = tables.dense[stage, :, slot]
        else:
            stage, _, expert, slot = (int(i[0]) for i in (tables.moe == self.rank).nonzero())
            mine = tables.moe[stage, :, expert, slot]
        mine = mine.reshape(tables.replicas, -1)
        return self._mesh(mine, (f"{kind}_replicate", f"{kind}_shard"))

    def _mesh(self, ranks: np.ndarray, names: tuple[str, ...]) -> DeviceMesh:
        handles = [getattr(self, name).handle for name in names]
        group = handles if len(handles) > 1 else handles[0]
        return DeviceMesh.from_group(group, device_type(), mesh=torch.tensor(ranks), mesh_dim_names=names)


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


# by the default group, for as long as there is that one; then by members, time-out and priority
_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[object, ...], dist.ProcessGroup]] = WeakKeyDictionary()


def make_groups(
    tables: RankTables | None = None,
    *,
    timeout: timedelta | None = None,
    options: Mapping[str, GroupOptions] | None = None,
    **sizes: Any,
) -> ParallelGroups:
    """Make the groups of `tables`, or of `plan(world, **sizes)`, on this rank.

    Every rank of the world must call it with the same arguments: torch makes groups collectively. Groups with the same
    members are made once, and one of all ranks is the default group unless a timeout or a priority is given.

    Args:
        tables: from `plan`; None plans the present world.
        timeout: after which a collective fails; None is the default group's.
        options: of the groups of a kind: {"ep": GroupOptions(high_priority=True)}. Of two kinds with the same members
            and priority the first has the description.
        sizes: pp, tp, ep, etp, dp_replicate and order for `plan` where `tables` is None.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the tables are for another number of ranks, or options are for an unknown kind.
    """
    if not dist.is_initialized():
        raise RuntimeError("make_groups: torch.distributed is not initialised; call init_process_group first")
    given = options or {}
    for kind in given:
        check_choice("options", kind, KINDS)
    tables = plan(dist.get_world_size(), **sizes) if tables is None else tables
    _check_world("tables", tables)
    mine = {kind: my_group(getattr(tables, kind), timeout, kind=kind, options=given.get(kind)) for kind in KINDS}
    return ParallelGroups(
        tables=tables, rank=dist.get_rank(), alone=group_of_one(), control=control_group(), **mine
    )  # fmt: skip


def _check_world(argument: str, tables: RankTables) -> None:
    if tables.world != (world := dist.get_world_size()):
        raise ValueError(f"{argument}: got those of {tables.world} ranks, wanted those of {world}")


def my_group(
    partition: list[list[int]],
    timeout: timedelta | None = None,
    *,
    kind: str = "exchange",
    options: GroupOptions | None = None,
) -> Group:
    """Return this rank's group of a partition of the world into groups of one size; all ranks make all of them."""
    rank, made = dist.get_rank(), _made_here()
    ranks = next(ranks for ranks in partition if rank in ranks)
    options = options or GroupOptions()
    if len(ranks) == 1:
        return group_of_one()
    if len(ranks) == dist.get_world_size() and timeout is None and not options.high_priority:
        return group_from_handle(None)
    timeout = default_timeout() if timeout is None else timeout
    # by the whole partition, so that no rank makes its groups while another has them already
    key = (tuple(sorted(map(tuple, partition))), timeout, options.high_priority)
    if key not in made:
        how = {
            "timeout": timeout,
            "pg_options": _high_priority() if options.high_priority else None,
            "group_desc": options.description or f"moe_triton {kind}",
        }
        made[key] = _split(partition, how) if _is_splittable() else _made_one_by_one(partition, how)
    return Group(ranks=tuple(ranks), rank=ranks.index(rank), reference=ref(made[key]))


def _is_splittable() -> bool:
    """Return whether NCCL's communicator of the world exists already, so that groups are parts of it."""
    world = dist.group.WORLD
    return world is not None and world.bound_device_id is not None and device_type() == "cuda"


def _split(partition: list[list[int]], how: dict[str, Any]) -> dist.ProcessGroup:
    """Make all groups of a partition by one split of the world's communicator."""
    made: Any = dist.split_group(split_ranks=partition, **how)
    return made


def _made_one_by_one(partition: list[list[int]], how: dict[str, Any]) -> dist.ProcessGroup:
    # Not with use_local_synchronization: torch then names a group by how many its members are in, and two ranks that
    # are in different numbers of groups would wait for each other.
    made = [dist.new_group(ranks, **how) for ranks in partition]
    return next(group for group, ranks in zip(made, partition, strict=True) if dist.get_rank() in ranks)


def group_of_one() -> Group:
    """Return the group of this rank only. Its member alone makes it, so that it costs no barrier of the world."""
    rank, made = dist.get_rank(), _made_here()
    if (rank,) not in made:
        made[(rank,)] = dist.new_group([rank], use_local_synchronization=True)
    return Group(ranks=(rank,), rank=0, reference=ref(made[(rank,)]))


def control_group() -> Group:
    """Return a group of all ranks for Python objects, on CPUs: the default group, or one of gloo beside NCCL's.

    Objects would otherwise travel through GPU memory, and a rank that is slow to write its files would run into NCCL's
    watchdog.
    """
    if has_cpu_backend(None):
        return group_from_handle(None)
    made = _made_here()
    if ("control",) not in made:
        made[("control",)] = dist.new_group(backend="gloo", group_desc="moe_triton control")
    return group_from_handle(made[("control",)])


def has_cpu_backend(handle: dist.ProcessGroup | None) -> bool:
    """Return whether a process group, None for the default one, has collectives of tensors on CPUs."""
    return "cpu:" in dist.get_backend_config(handle)


def _high_priority() -> Any:
    """NCCL's options of groups of high priority; None for backends without priorities."""
    if device_type() != "cuda":
        return None
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)


def _made_here() -> dict[tuple[object, ...], dist.ProcessGroup]:
    world = dist.group.WORLD
    assert world is not None
    return _made.setdefault(world, {})
