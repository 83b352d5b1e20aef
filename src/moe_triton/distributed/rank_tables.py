"""Which ranks form which parallel groups: a pure function of the sizes, so that it can be tested with no process."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moe_triton.checks import check_choice, check_int

ORDERS = ("ep-consecutive", "data-before-expert", "tp-replicated")
KINDS = ("dp", "tp", "pp", "ep", "edp", "etp")


@dataclass(frozen=True, kw_only=True)
class RankTables:
    """The groups of every kind as lists of rank lists; each list of a kind covers the world once.

    dp, tp, pp   of the dense parameters: data, tensor and pipeline parallel
    ep           ranks that share one set of experts between them (expert parallel)
    edp          ranks that hold the same experts (expert data parallel)
    etp          ranks that hold slices of the same experts (expert tensor parallel)
    dense        [pp, dp, tp] ranks by their coordinates
    moe          [pp, edp, ep, etp] ranks by their coordinates; with "tp-replicated" the last axis holds replicas
    """

    world: int
    order: str
    dp: list[list[int]]
    tp: list[list[int]]
    pp: list[list[int]]
    ep: list[list[int]]
    edp: list[list[int]]
    etp: list[list[int]]
    dense: np.ndarray = field(compare=False, repr=False)
    moe: np.ndarray = field(compare=False, repr=False)

    def group_of(self, kind: str, rank: int) -> list[int]:
        """Return the ranks of the group of `kind` that `rank` is in."""
        check_choice("kind", kind, KINDS)
        check_int("rank", rank, low=0, high=self.world - 1)
        return next(ranks for ranks in getattr(self, kind) if rank in ranks)


def plan(
    world: int, *, pp: int = 1, tp: int = 1, ep: int = 1, etp: int = 1, order: str = "ep-consecutive"
) -> RankTables:
    """Return the parallel groups of `world` ranks.

    The dense parameters see the ranks as [pp, dp, tp], the experts as [pp, edp, ep, etp], both row-major, with
    dp = world / (pp*tp) and edp = world / (pp*ep*etp); the two need not share a layout (Megatron-Core's folding).

    Args:
        world: number of ranks.
        pp, tp: pipeline and tensor parallel sizes.
        ep: ranks that share one set of experts.
        etp: ranks that split each expert's intermediate size.
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
    for name, size in (("pp", pp), ("tp", tp), ("ep", ep), ("etp", etp)):
        check_int(name, size, low=1)
    check_choice("order", order, ORDERS)
    if order == "tp-replicated" and etp != 1:
        raise ValueError(f"etp: got {etp} with order 'tp-replicated', wanted 1")
    slices = tp if order == "tp-replicated" else etp
    for wanted, size in ((f"pp*tp = {pp * tp}", pp * tp), (f"pp*ep*etp = {pp * ep * slices}", pp * ep * slices)):
        if world % size:
            raise ValueError(f"world: got {world}, wanted a multiple of {wanted}")
    ranks = np.arange(world)
    dense = ranks.reshape(pp, -1, tp)
    if order == "data-before-expert":
        moe = ranks.reshape(pp, ep, -1, slices).swapaxes(1, 2)
    else:
        moe = ranks.reshape(pp, -1, ep, slices)
    etp_groups = _along(moe, 3)
    if order == "tp-replicated":
        etp_groups = [[rank] for group in etp_groups for rank in group]
    return RankTables(
        world=world, order=order, dp=_along(dense, 1), tp=_along(dense, 2), pp=_along(dense, 0), ep=_along(moe, 2),
        edp=_along(moe, 1), etp=etp_groups, dense=dense, moe=moe,
    )  # fmt: skip


def _along(view: np.ndarray, axis: int) -> list[list[int]]:
    """The ranks along one axis, for every place on the others: stage first, then the tensor rank, then the rest."""
    last = view.ndim - 1
    others = [i for i in (0, last, *range(1, last)) if i != axis]
    return view.transpose(*others, axis).reshape(-1, view.shape[axis]).tolist()
