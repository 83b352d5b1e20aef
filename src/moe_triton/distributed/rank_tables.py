"""Which ranks form which parallel groups: a pure function of the sizes, so that it can be tested with no process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_triton.checks import check_choice, check_int

ORDERS = ("ep-consecutive", "data-before-expert", "tp-replicated")
KINDS = ("dp", "tp", "pp", "ep", "edp", "etp", "dp_replicate", "dp_shard", "edp_replicate", "edp_shard")
DENSE_AXES, EXPERT_AXES = ("pp", "dp_replicate", "dp", "tp"), ("pp", "dp_replicate", "edp", "ep", "etp")

# What the dimensions of a mesh are where the user does not say it. "fsdp", "efsdp", "dp_shard_cp" and "dp_shard_in_ep"
# are torchtitan's. The ranks of a context-parallel dimension have other tokens.
DENSE_NAMES = {
    **{axis: axis for axis in DENSE_AXES},
    **dict.fromkeys(("dp_shard", "fsdp", "cp", "dp_shard_cp", "batch"), "dp"),
}
EXPERT_NAMES = {
    **{axis: axis for axis in EXPERT_AXES},
    **dict.fromkeys(("efsdp", "dp_shard_in_ep", "dp_shard_mod_ep"), "edp"),
    "tp": "etp",
}


@dataclass(frozen=True, kw_only=True)
class RankTables:
    """The groups of every kind as lists of rank lists; each list of a kind covers the world once.

    dp, tp, pp   of the dense parameters: data, tensor and pipeline parallel
    ep           ranks that share one set of experts between them (expert parallel)
    edp          ranks that hold the same experts (expert data parallel)
    etp          ranks that hold slices of the same experts (expert tensor parallel)
    dense        [pp, dp, tp] ranks by their coordinates
    moe          [pp, edp, ep, etp] ranks by their coordinates; with "tp-replicated" the last axis holds replicas
    replicas     of the shards that FSDP makes (HSDP): dp and edp are [replicas, shards], row-major
    dp_shard, dp_replicate, edp_shard, edp_replicate
                 the parts of dp and of edp over which FSDP shards parameters, and over which it replicates the shards
    """

    world: int
    order: str
    replicas: int
    dp: list[list[int]]
    tp: list[list[int]]
    pp: list[list[int]]
    ep: list[list[int]]
    edp: list[list[int]]
    etp: list[list[int]]
    dp_replicate: list[list[int]]
    dp_shard: list[list[int]]
    edp_replicate: list[list[int]]
    edp_shard: list[list[int]]
    dense: np.ndarray = field(compare=False, repr=False)
    moe: np.ndarray = field(compare=False, repr=False)

    def group_of(self, kind: str, rank: int) -> list[int]:
        """Return the ranks of the group of `kind` that `rank` is in."""
        check_choice("kind", kind, KINDS)
        check_int("rank", rank, low=0, high=self.world - 1)
        return next(ranks for ranks in getattr(self, kind) if rank in ranks)


def plan(
    world: int,
    *,
    pp: int = 1,
    tp: int = 1,
    ep: int = 1,
    etp: int = 1,
    dp_replicate: int = 1,
    order: str = "ep-consecutive",
) -> RankTables:
    """Return the parallel groups of `world` ranks.

    The dense parameters see the ranks as [pp, dp, tp], the experts as [pp, edp, ep, etp], both row-major, with
    dp = world / (pp*tp) and edp = world / (pp*ep*etp); the two need not share a layout (Megatron-Core's folding).

    Args:
        world: number of ranks.
        pp, tp: pipeline and tensor parallel sizes.
        ep: ranks that share one set of experts.
        etp: ranks that split each expert's intermediate size.
        dp_replicate: replicas of the shards that `apply_fsdp2` makes of dense parameters and of experts (HSDP), each in
            a run of consecutive ranks of a stage. Must divide dp and edp.
        order: "ep-consecutive": as above. With etp = 1 this is Megatron-Core's, Colossal-AI's and, without tensor
            parallelism, DeepSpeed's layout; with etp = tp it is DeepSpeed's for experts under tensor parallelism.
            "data-before-expert": [pp, ep, edp, etp], DeepSpeed's `use_data_before_expert_parallel_`.
            "tp-replicated": the groups of etp = tp, but each of the tp ranks holds whole experts (etp must be 1):
            the tables that DeepSpeed's `groups.initialize(ep_size, mpu)` made in 2022.

    Returns:
        RankTables. Groups are listed by pipeline stage, then tensor rank, then what is left.

    Raises:
        ValueError: the sizes do not divide the world, or the order is unknown.
    """
    check_int("world", world, low=1)
    for name, size in (("pp", pp), ("tp", tp), ("ep", ep), ("etp", etp), ("dp_replicate", dp_replicate)):
        check_int(name, size, low=1)
    check_choice("order", order, ORDERS)
    if order == "tp-replicated" and etp != 1:
        raise ValueError(f"etp: got {etp} with order 'tp-replicated', wanted 1")
    slices = tp if order == "tp-replicated" else etp
    sizes = {"pp*tp": pp * tp, "pp*ep*etp": pp * ep * slices}
    if dp_replicate > 1:
        sizes = {f"dp_replicate*{name}": dp_replicate * size for name, size in sizes.items()}
    for name, size in sizes.items():
        if world % size:
            raise ValueError(f"world: got {world}, wanted a multiple of {name} = {size}")
    ranks = np.arange(world)
    dense = ranks.reshape(pp, -1, tp)
    if order == "data-before-expert":
        moe = ranks.reshape(pp, dp_replicate, ep, -1, slices).swapaxes(2, 3).reshape(pp, -1, ep, slices)
    else:
        moe = ranks.reshape(pp, -1, ep, slices)
    return _tables(dense, moe, dp_replicate, order)


def mesh_tables(
    dense: np.ndarray, dense_names: Sequence[str], experts: np.ndarray, expert_names: Sequence[str],
    names: Mapping[str, str] | None = None,
) -> RankTables:  # fmt: skip
    """Return the parallel groups of two meshes of the same ranks: of the dense parameters, and of the experts.

    Args:
        dense, experts: the ranks by their coordinates.
        dense_names, expert_names: of the dimensions.
        names: what dimensions are that DENSE_NAMES and EXPERT_NAMES do not know: name -> one of DENSE_AXES or of
            EXPERT_AXES.

    Raises:
        ValueError: a dimension of several ranks that nothing is known of, by name; ranks that do not ascend along a
        dimension; meshes of other ranks, stages or replicas.
    """
    given = names or {}
    if unused := sorted(set(given) - {*dense_names, *expert_names}):
        raise ValueError(f"names: got {', '.join(map(repr, unused))}, wanted dimensions of the meshes")
    dense5 = _by_axes("dense", dense, dense_names, {**DENSE_NAMES, **given}, DENSE_AXES)
    experts5 = _by_axes("experts", experts, expert_names, {**EXPERT_NAMES, **given}, EXPERT_AXES)
    if sorted(dense5.flat) != list(range(dense5.size)):
        raise ValueError(
            f"dense: got a mesh of the {dense5.size} ranks {_some(dense5.ravel())}, wanted one of all ranks"
        )
    for axes, what in ((1, "pp"), (2, "pp and dp_replicate")):
        ours, theirs = (np.sort(x.reshape(math.prod(x.shape[:axes]), -1)) for x in (dense5, experts5))
        if not np.array_equal(ours, theirs):
            raise ValueError(
                f"experts: got a mesh whose {what} does not divide the ranks as that of dense does, "
                f"{_some(theirs)} and {_some(ours)}"
            )
    pp, replicas, _, tp = dense5.shape
    moe = experts5.reshape(pp, -1, *experts5.shape[3:])
    return _tables(dense5.reshape(pp, -1, tp), moe, replicas, "meshes")


def _by_axes(
    mesh: str, ranks: np.ndarray, names: Sequence[str], known: Mapping[str, str], axes: Sequence[str]
) -> np.ndarray:
    """The ranks of a mesh by `axes`, each of which may be several of the mesh's dimensions, or none."""
    if ranks.ndim != len(names):
        raise ValueError(f"{mesh}: got a mesh without names of its dimensions, wanted one with mesh_dim_names")
    for dim, (name, size) in enumerate(zip(names, ranks.shape, strict=True)):
        if size > 1 and known.get(name) not in axes:
            raise ValueError(
                f"{mesh}: got a mesh in which nothing says what the {size} ranks of {name!r} share, wanted "
                f"names={{{name!r}: one of {', '.join(map(repr, axes))}}}"
            )
        if (np.diff(ranks, axis=dim) < 0).any():
            raise ValueError(f"{mesh}: got a mesh whose ranks do not ascend along {name!r}, wanted ascending ones")
    of_axis = [[dim for dim, name in enumerate(names) if known.get(name) == axis] for axis in axes]
    rest = [dim for dim in range(ranks.ndim) if all(dim not in dims for dims in of_axis)]  # of one rank
    shape = [math.prod(ranks.shape[dim] for dim in dims) for dims in of_axis]
    return ranks.transpose([dim for dims in of_axis for dim in dims] + rest).reshape(shape)


def _some(ranks: np.ndarray) -> str:
    """The ranks for a message, of a large world the first ones."""
    text = str(ranks.tolist())
    return text if len(text) <= 80 else f"{text[:80]}..."


def _tables(dense: np.ndarray, moe: np.ndarray, replicas: int, order: str) -> RankTables:
    """The tables of [pp, dp, tp] and [pp, edp, ep, etp]."""
    etp = _along(moe, 3)
    if order == "tp-replicated":
        etp = [[rank] for group in etp for rank in group]
    sharded: dict[str, list[list[int]]] = {}
    for name, ranks in (("dp", dense), ("edp", moe)):
        parts = ranks.reshape(ranks.shape[0], replicas, -1, *ranks.shape[2:])
        sharded |= {f"{name}_replicate": _along(parts, 1), f"{name}_shard": _along(parts, 2)}
    return RankTables(
        world=dense.size, order=order, replicas=replicas, dp=_along(dense, 1), tp=_along(dense, 2),
        pp=_along(dense, 0), ep=_along(moe, 2), edp=_along(moe, 1), etp=etp, dense=dense, moe=moe, **sharded,
    )  # fmt: skip


def _along(view: np.ndarray, axis: int) -> list[list[int]]:
    """The ranks along one axis, ascending, for every place on the others: stage first, then the last, then the rest."""
    last = view.ndim - 1
    others = [i for i in (0, last, *range(1, last)) if i != axis]
    return np.sort(view.transpose(*others, axis).reshape(-1, view.shape[axis])).tolist()
