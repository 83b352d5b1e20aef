"""DeepSpeed's process groups: expert (E), data (D) and model (M) parallelism.

`initialize` is that of DeepSpeed's documentation; a layer with an `ep_size` makes its groups when the engine calls its
`set_deepspeed_parallelism`. Groups have the names "ep_size_N" and live in
`deepspeed.utils.groups` where deepspeed is installed. On one process without torch.distributed there are no groups,
every size is 1 and every rank 0.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist

from moe_triton.checks import check_int
from moe_triton.compat.deepspeed import upstream
from moe_triton.distributed import ParallelGroups, RankTables, make_groups, plan


class _Named(NamedTuple):
    """Groups of one kind by name: torch's handles, and lists of ranks."""

    handles: dict[str, Any]
    ranks: dict[str, Any]


def _stores(name: str) -> _Named:
    """Return DeepSpeed's dictionaries of groups where deepspeed is installed, else new ones."""
    if upstream.groups is None:
        return _Named({}, {})
    return _Named(getattr(upstream.groups, name), getattr(upstream.groups, f"{name}_RANKS"))


@dataclass
class _State:
    """The arguments of `initialize`, and this rank's groups by name."""

    ep_size: int | None = None
    mpu: Any = None
    world: Any = None  # the default group that the others belong to
    parallel: dict[str, ParallelGroups] = field(default_factory=dict)
    expert_parallel: _Named = field(default_factory=partial(_stores, "_EXPERT_PARALLEL_GROUP"))
    expert_data_parallel: _Named = field(default_factory=partial(_stores, "_EXPERT_DATA_PARALLEL_GROUP"))


_state = _State()


def group_name(ep_size: int) -> str:
    """Return the key of the groups of an expert-parallel size."""
    return f"ep_size_{ep_size}"


def initialize(ep_size: int = 1, mpu: Any = None, num_ep_list: list[int] | None = None) -> None:
    """Make the groups for expert parallelism, once, on every rank.

    - S1 data parallelism only: nothing to call; the engine's first MoE layer makes groups of size 1.
    - S2 expert + data: `initialize(ep_size)`.
    - S3 model, no expert parallelism: `initialize(mpu=mpu)` keeps ep_size = 1. When nobody called `initialize` and the
      engine is given an mpu, ep_size is the data-parallel world size (`ensure_initialized`).
    - S4 model + data + expert: `initialize(ep_size, mpu)`: groups within each model-parallel lane.

    Args:
        ep_size: largest expert-parallel size; clamped to the data-parallel world size, which it must divide.
        mpu: a model parallel unit (Megatron's) with get_{model,data}_parallel_{rank,world_size,group}.
        num_ep_list: the expert counts of the model's layers; each divides ep_size or is a multiple of it. Layers with
            fewer experts than ep_size get groups of their own; the others share "ep_size_{ep_size}". Default [ep_size].

    Raises:
        ValueError, TypeError: a bad size, or an mpu whose sizes do not make up the world.
        RuntimeError: a second call, or several processes without torch.distributed initialised.
    """
    if is_initialized():
        raise RuntimeError("initialize: expert-parallel groups exist already, wanted one call per process")
    check_int("ep_size", ep_size, low=1)
    counts = sorted(set([ep_size] if num_ep_list is None else num_ep_list))
    for count in counts:
        check_int("num_ep_list", count, low=1)
        if count % ep_size and ep_size % count:
            raise ValueError(f"num_ep_list: got {count}, wanted a divisor or a multiple of ep_size={ep_size}")
    if not counts or counts[-1] < ep_size:
        raise ValueError(f"num_ep_list: got {num_ep_list}, wanted an entry of at least ep_size={ep_size}")
    _check_started()
    if mpu is not None:
        _set_mpu(mpu)
    data_parallel = get_data_parallel_world_size()
    ep_size = min(ep_size, data_parallel)
    sizes = sorted({min(count, ep_size) for count in counts})
    for size in sizes:
        if data_parallel % size:
            raise ValueError(f"ep_size: got {size}, wanted a divisor of the data-parallel world size {data_parallel}")
    _state.ep_size = ep_size
    for size in sizes:
        create_expert_groups(size, within_lanes=mpu is not None)


def ensure_initialized(mpu: Any = None) -> None:
    """Call `initialize` if nobody did: S1 without an mpu (ep_size 1), S3 with one (ep_size = data-parallel size)."""
    if is_initialized():
        return
    if mpu is None:
        initialize()
    else:
        initialize(_size_of(mpu, DATA), mpu)


def is_initialized() -> bool:
    """Return whether `initialize` has been called."""
    _notice_world()
    return _state.ep_size is not None


def ep_size_for(num_experts: int) -> int:
    """Return the expert-parallel size of a layer that names none, at most its experts; 1 before `initialize`.

    `layer.MoE` raises ValueError where it does not divide the experts.
    """
    return min(num_experts, _state.ep_size or 1)


def reset() -> None:
    """Forget all groups and the mpu, as after torch.distributed.destroy_process_group()."""
    _forget_groups()
    _set_mpu(None)


def _notice_world() -> None:
    """Forget the groups where torch.distributed has been restarted since."""
    if dist.is_initialized():
        if _state.world not in (None, dist.group.WORLD):
            _forget_groups()
        _state.world = dist.group.WORLD


def _forget_groups() -> None:
    global _state
    for groups in (*_state.expert_parallel, *_state.expert_data_parallel):
        groups.clear()
    if upstream.groups is not None:
        upstream.groups.expert_tensor_parallel_world_size = 1
    _state = _State(mpu=_state.mpu)


def create_expert_groups(ep_size: int, *, within_lanes: bool = False, data_before_expert: bool = False) -> None:
    """Make the groups "ep_size_{ep_size}" if there are none yet; every rank must call it.

    Args:
        ep_size: ranks per expert-parallel group; divides the ranks of a pipeline stage (of a lane).
        within_lanes: only ranks with the same model-parallel rank form groups, and each lane runs all tokens (experts
            that are tensor-parallel themselves). Else all ranks of a stage do, and model-parallel ranks, which hold
            the same tokens, send a share of them each.
        data_before_expert: expert-parallel groups are strided, expert-data-parallel ones consecutive.

    Raises ValueError where the sizes do not fit, or the mpu's groups are not runs of consecutive ranks, as Megatron's.
    """
    name = group_name(ep_size)
    _notice_world()
    if not dist.is_initialized() or name in _state.parallel:
        return
    sizes = tensor_parallel_world_size(), pipeline_parallel_world_size()
    tables = rank_tables(
        dist.get_world_size(), ep_size, *sizes, within_lanes=within_lanes, data_before_expert=data_before_expert
    )
    _check_mpu_ranks(tables)
    parallel = make_groups(tables)
    _state.parallel[name] = parallel
    for group, named in ((parallel.ep, _state.expert_parallel), (parallel.edp, _state.expert_data_parallel)):
        if name not in named.handles:  # DeepSpeed's own layers may have made them
            named.handles[name], named.ranks[name] = group.handle, list(group.ranks)
    if within_lanes and upstream.groups is not None:
        upstream.groups.expert_tensor_parallel_world_size = sizes[0]


def rank_tables(
    world_size: int,
    ep_size: int,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    *,
    within_lanes: bool = False,
    data_before_expert: bool = False,
) -> RankTables:
    """Return DeepSpeed's expert-parallel (.ep) and expert-data-parallel (.edp) groups, as lists of ranks.

    W=8, ep=2: [0,1][2,3][4,5][6,7] and [0,2,4,6][1,3,5,7]. With tensor_parallel=2, within lanes: [0,2][4,6][1,3][5,7]
    and [0,4][2,6][1,5][3,7]. W=8, ep=2, data before expert: [0,4][1,5][2,6][3,7] and [0,1,2,3][4,5,6,7].
    """
    options = {"pp": pipeline_parallel, "tp": tensor_parallel, "ep": ep_size}
    if within_lanes and data_before_expert:
        lanes = plan(world_size, **options, etp=tensor_parallel, order="data-before-expert")
        return replace(lanes, order="tp-replicated", etp=[[rank] for ranks in lanes.etp for rank in ranks])
    strided = "data-before-expert" if data_before_expert else "ep-consecutive"
    return plan(world_size, **options, order="tp-replicated" if within_lanes else strided)


def parallel_groups(ep_size: int) -> ParallelGroups | None:
    """Return what the exchange runs over; None where `create_expert_groups` has made nothing."""
    return _state.parallel.get(group_name(ep_size))


def _check_mpu_ranks(tables: RankTables) -> None:
    for kind, names in (("tp", TENSOR), ("dp", DATA)):
        group = _ask(get_mpu(), names, "group", None)
        wanted = tables.group_of(kind, dist.get_rank())
        if isinstance(group, dist.ProcessGroup) and dist.get_process_group_ranks(group) != wanted:
            got = dist.get_process_group_ranks(group)
            raise ValueError(f"mpu: got the {names[0]} ranks {got}, wanted {wanted}")


# The model parallel unit. Megatron and DeepSpeed have had several names for the same things. --------------------------

TENSOR = ("tensor_model_parallel", "slice_parallel", "model_parallel")
PIPELINE = ("pipeline_model_parallel", "pipe_parallel")
DATA = ("data_parallel",)


def get_mpu() -> Any:
    """Return the model parallel unit that `initialize` or DeepSpeed's engine was given, or None."""
    return _state.mpu if upstream.groups is None else upstream.groups.mpu


def tensor_parallel_world_size() -> int:
    """Return ranks that hold the same tokens."""
    return _size_of(get_mpu(), TENSOR)


def tensor_parallel_rank() -> int:
    return _ask(get_mpu(), TENSOR, "rank", 0)


def tensor_parallel_group() -> Any:
    """Return what `get_model_parallel_group` does, by any of the names that an mpu may have for it."""
    return _model_group(TENSOR)


def pipeline_parallel_world_size() -> int:
    return _size_of(get_mpu(), PIPELINE)


def _set_mpu(mpu: Any) -> None:
    if mpu is not None:
        world, sizes = _world_size(), [_size_of(mpu, names) for names in (TENSOR, PIPELINE, DATA)]
        if sizes[0] * sizes[1] * sizes[2] != world:
            raise ValueError(
                f"mpu: got tensor x pipeline x data parallelism of {sizes[0]} x {sizes[1]} x {sizes[2]}, "
                f"wanted a product of {world}, the world size"
            )
    _state.mpu = mpu
    if upstream.groups is not None:
        upstream.groups.mpu = mpu


def _ask(mpu: Any, names: tuple[str, ...], what: str, default: Any) -> Any:
    for name in names:
        getter = getattr(mpu, f"get_{name}_{what}", None)
        if getter is not None:
            return getter()
    return default


def _model_group(names: tuple[str, ...]) -> Any:
    if (group := _ask(get_mpu(), names, "group", None)) is not None or not dist.is_initialized():
        return group
    if not _state.parallel:
        raise RuntimeError("mpu: got none with a model-parallel group, and no groups exist yet; call initialize first")
    return next(iter(_state.parallel.values())).alone.handle  # torch takes None for all ranks


def _size_of(mpu: Any, names: tuple[str, ...]) -> int:
    return _ask(mpu, names, "world_size", 1)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _check_started() -> None:
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"initialize: torch.distributed is not initialised in a world of {os.environ['WORLD_SIZE']}, "
            "wanted deepspeed.init_distributed() or torch.distributed.init_process_group() before"
        )


# Getters --------------------------------------------------------------------------------------------------------------


def get_expert_parallel_group(name: str) -> Any:
    """Return the ProcessGroup of this rank; None on one process without torch.distributed."""
    return _lookup(_state.expert_parallel.handles, name)


def get_expert_data_parallel_group(name: str) -> Any:
    """Return the ProcessGroup of the ranks with the same experts; None on one process without torch.distributed."""
    return _lookup(_state.expert_data_parallel.handles, name)


def get_expert_parallel_group_ranks(name: str) -> list[int]:
    return list(_lookup(_state.expert_parallel.ranks, name) or [0])


def get_expert_data_parallel_group_ranks(name: str) -> list[int]:
    return list(_lookup(_state.expert_data_parallel.ranks, name) or [0])


def get_expert_parallel_group_dict() -> dict[str, Any]:
    return _state.expert_parallel.handles


def get_expert_data_parallel_group_dict() -> dict[str, Any]:
    return _state.expert_data_parallel.handles


def get_expert_parallel_world_size(name: str) -> int:
    return len(get_expert_parallel_group_ranks(name))


def get_expert_data_parallel_world_size(name: str) -> int:
    return len(get_expert_data_parallel_group_ranks(name))


def get_expert_parallel_rank(name: str) -> int:
    return get_expert_parallel_group_ranks(name).index(_rank())


def get_expert_data_parallel_rank(name: str) -> int:
    return get_expert_data_parallel_group_ranks(name).index(_rank())


def get_expert_parallel_src_rank(name: str) -> int:
    """Return the global rank of the group's rank 0."""
    return get_expert_parallel_group_ranks(name)[0]


def get_max_expert_size() -> int:
    """Return the largest expert-parallel size that there are groups for; 1 when there are none."""
    sizes = [
        int(name.removeprefix("ep_size_")) for name in _state.expert_parallel.handles if name.startswith("ep_size_")
    ]
    return max(sizes, default=_state.ep_size or 1)


def get_max_expert_size_name() -> str:
    return group_name(get_max_expert_size())


def get_max_expert_parallel_group() -> Any:
    return get_expert_parallel_group(get_max_expert_size_name())


def get_data_parallel_group() -> Any:
    """Return the mpu's data-parallel group, else the world; None on one process without torch.distributed."""
    if get_mpu() is not None:
        return get_mpu().get_data_parallel_group()
    return dist.group.WORLD if dist.is_initialized() else None


def get_data_parallel_world_size() -> int:
    return _world_size() if get_mpu() is None else _size_of(get_mpu(), DATA)


def get_data_parallel_rank() -> int:
    return _rank() if get_mpu() is None else _ask(get_mpu(), DATA, "rank", 0)


def get_model_parallel_group() -> Any:
    """Return the mpu's model-parallel group, or the group of this rank only; None without torch.distributed.

    Raises RuntimeError where neither an mpu nor `initialize` has made groups.
    """
    return _model_group(("model_parallel",))


def get_model_parallel_world_size() -> int:
    return _size_of(get_mpu(), ("model_parallel",))


def get_model_parallel_rank() -> int:
    return _ask(get_mpu(), ("model_parallel",), "rank", 0)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _lookup(groups: dict[str, Any], name: str) -> Any:
    if name in groups:
        return groups[name]
    if dist.is_initialized():
        raise ValueError(
            f"name: got {name!r}, wanted one of {', '.join(groups) or 'the groups, of which there are none'}"
        )
    return None
