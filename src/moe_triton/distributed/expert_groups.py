"""The groups of an ExpertParallel, from what its user gives: a process group, a mesh or ParallelGroups."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_triton.checks import check_int
from moe_triton.distributed.groups import ALONE, Group, ParallelGroups, group_from_handle, group_of_one, my_group
from moe_triton.torch_internals import root_mesh

SPREAD = ("ep", "edp", "etp")  # a mesh's dimensions over which tokens are spread
REPEATED = ("tp", "pp")  # those over which they are not: ranks with the same tokens, or with other layers


class ExpertGroups(NamedTuple):
    """The groups of an ExpertParallel on this rank.

    ep     other experts
    edp    the same experts, other tokens
    etp    slices of the same experts
    tp     the same tokens
    data   the groups over which the tokens are spread, one after the other
    alone  this rank only: what stands for a kind that nobody shares
    """

    ep: Group
    edp: Group
    etp: Group
    tp: Group
    data: tuple[Group, ...]
    alone: Group


def expert_groups(given: object) -> ExpertGroups:
    """Return the groups that a user's process group, mesh or ParallelGroups names; ExpertGroups as they are."""
    if isinstance(given, ExpertGroups):
        return given
    if isinstance(given, ParallelGroups):
        # with replicated experts the copies of a token at the tp ranks go to copies of its experts
        tp = given.alone if given.tables.order == "tp-replicated" else given.tp
        return ExpertGroups(given.ep, given.edp, given.etp, tp, (given.dp,), given.alone)
    if isinstance(given, DeviceMesh):
        return _groups_of_mesh(given)
    if given is None and not (dist.is_available() and dist.is_initialized()):
        return ExpertGroups(ALONE, ALONE, ALONE, ALONE, (ALONE,), ALONE)
    if given is not None and not isinstance(given, dist.ProcessGroup):
        raise TypeError(
            f"group_or_mesh: got {type(given).__name__}, wanted a ProcessGroup, a DeviceMesh, ParallelGroups or None"
        )
    ep = group_from_handle(given)
    if ep.size < dist.get_world_size():
        raise ValueError(
            f"group_or_mesh: got a group of {ep.size} of {dist.get_world_size()} ranks, which does not say who holds "
            "the same experts; wanted a DeviceMesh with 'edp' and 'ep', or make_groups(ep=...)"
        )
    alone = group_of_one()
    return ExpertGroups(ep, alone, alone, alone, (ep,), alone)


def _groups_of_mesh(mesh: DeviceMesh) -> ExpertGroups:
    """By the names of its dimensions. Raises ValueError for one that would be left out, though it may spread tokens."""
    names = mesh.mesh_dim_names or ()
    sizes = dict(zip(names, mesh.shape, strict=False))
    if mesh.ndim == 1 and "ep" not in names:
        names, sizes = ("ep",), {"ep": mesh.size()}
    if "ep" not in names:
        raise ValueError(f"group_or_mesh: got a mesh with the dimensions {names}, wanted one called 'ep'")
    unknown = {name: size for name, size in sizes.items() if size > 1 and name not in (*SPREAD, *REPEATED)}
    if unknown or (unknown := _sliced_off(mesh)):
        raise ValueError(
            f"group_or_mesh: got a mesh in which nothing says what the ranks of {unknown} share, wanted one mesh of "
            "'ep' (other experts), 'edp' (the same experts, other tokens), 'etp' (slices of the same experts), 'tp' "
            "and 'pp', or make_groups(...)"
        )

    alone = group_of_one()

    def dimension(name: str) -> Group:
        if name not in names:
            return alone
        return group_from_handle(mesh.get_group() if mesh.ndim == 1 else mesh.get_group(name))

    ep, edp, etp = (dimension(name) for name in SPREAD)
    return ExpertGroups(ep, edp, etp, alone, (ep, edp, etp), alone)


def _sliced_off(mesh: DeviceMesh) -> dict[str, int]:
    """The dimensions, by name, of the mesh that this one was sliced from, along which it is one of several."""
    root = root_mesh(mesh)
    places = torch.isin(root.mesh, mesh.mesh.flatten()).nonzero()
    return {
        name: size
        for dim, (name, size) in enumerate(zip(root.mesh_dim_names or (), root.shape, strict=False))
        if size > 1 and name not in REPEATED and places[:, dim].unique().numel() == 1
    }


def all_ep_groups(given: object, ep: Group) -> list[list[int]]:
    """Return the ranks of every expert-parallel group of the world."""
    if isinstance(given, ParallelGroups):
        return given.tables.ep
    if isinstance(given, DeviceMesh) and given.ndim > 1:
        axis = (given.mesh_dim_names or ()).index("ep")
        return given.mesh.movedim(axis, -1).reshape(-1, ep.size).tolist()
    return [list(ep.ranks)]


def two_levels(groups: ExpertGroups, every: list[list[int]], ranks_per_node: int, mode: str) -> tuple[Group, Group]:
    """(between nodes, in the node): the ranks at the same place of every node, and the node's own."""
    ep = groups.ep
    check_int("ranks_per_node", ranks_per_node, low=1)
    if ep.size % ranks_per_node:
        raise ValueError(f"ranks_per_node: got {ranks_per_node}, wanted a divisor of the group's {ep.size} ranks")
    if mode != "dropless":
        raise ValueError(f"mode: got {mode!r} with ranks_per_node, wanted 'dropless'")
    if ranks_per_node in (1, ep.size):  # one level has one rank
        return groups.alone, ep
    starts = range(0, ep.size, ranks_per_node)
    between = my_group([ranks[place::ranks_per_node] for ranks in every for place in range(ranks_per_node)])
    return between, my_group([ranks[start : start + ranks_per_node] for ranks in every for start in starts])
