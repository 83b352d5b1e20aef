"""DeviceMeshes: given to ExpertParallel, every dimension with other tokens counts, or is refused; as a pair they are
the groups of all kinds."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_triton.distributed import ExpertParallel, ParallelGroups, make_groups
from moe_triton.distributed.rank_tables import KINDS

WRONG = {
    "a dense name": ((2, 2), ("dp", "ep"), None, "'dp': 2"),
    "torchtitan's": ((2, 1, 2), ("dp_replicate", "efsdp", "ep"), None, "'dp_replicate': 2"),
    "dense and expert names": ((1, 2, 2, 1), ("pp", "dp_shard", "ep", "tp"), None, "'dp_shard': 2"),
    "a slice": ((2, 2), ("edp", "ep"), "ep", "'edp': 2"),
    "a slice of two": ((2, 1, 2), ("dp", "edp", "ep"), ("edp", "ep"), "'dp': 2"),
    "context": ((2, 2), ("ep", "cp"), None, "'cp': 2"),
}
RIGHT = {
    "copies": ((2, 2), ("edp", "ep"), None, (2, 2, 1)),
    "slices": ((2, 2), ("ep", "etp"), None, (2, 1, 2)),
    "unknown, of one rank": ((1, 2, 2), ("dp_replicate", "edp", "ep"), None, (2, 2, 1)),
    "stages and the same tokens": ((2, 2, 1), ("pp", "ep", "tp"), None, (2, 1, 1)),
    "a slice of a stage": ((2, 2), ("pp", "ep"), "ep", (2, 1, 1)),
    "one dimension of any name": ((4,), ("world",), None, (4, 1, 1)),
}


def refused(shape: tuple, names: tuple, slice_of: object, message: str) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    mesh = mesh if slice_of is None else mesh[slice_of]
    with pytest.raises(ValueError, match=f"group_or_mesh: got a mesh .*{message}.* wanted one mesh of 'ep'"):
        ExpertParallel(mesh)


def accepted(shape: tuple, names: tuple, slice_of: object, sizes: tuple) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    parallel = ExpertParallel(mesh if slice_of is None else mesh[slice_of])
    assert (parallel.ep.size, parallel.edp.size, parallel.etp.size) == sizes
    assert {group.size for group in parallel.data} == {*sizes}


def flattened() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
    assert ExpertParallel(mesh._flatten("ep")).ep.size == 4


def of_some_ranks() -> None:
    """A mesh that is no part of another stands for all ranks of its model."""
    torch.manual_seed(0)
    rank = torch.distributed.get_rank()
    group = torch.distributed.new_group([0, 1])
    if rank < 2:
        mesh = DeviceMesh.from_group(group, "cpu", mesh=torch.tensor([0, 1]), mesh_dim_names=("ep",))
        assert ExpertParallel(mesh).ep.ranks == (0, 1)


@pytest.mark.parametrize("case", list(WRONG))
def test_a_dimension_without_meaning(four_ranks, case):
    four_ranks.run(refused, *WRONG[case])


@pytest.mark.parametrize("case", list(RIGHT))
def test_known_dimensions(four_ranks, case):
    four_ranks.run(accepted, *RIGHT[case])


def test_flattened_and_partial_meshes(four_ranks):
    four_ranks.run(flattened)
    four_ranks.run(of_some_ranks)


PAIRS = {
    "torchtitan": (
        {"dp_replicate": 1, "fsdp": 4, "tp": 1},
        {"dp_replicate": 1, "efsdp": 2, "ep": 2, "etp": 1},
        {"ep": 2},
    ),
    "HSDP": ({"dp_replicate": 2, "dp_shard": 2}, {"dp_replicate": 2, "ep": 2}, {"dp_replicate": 2, "ep": 2}),
    "context": ({"dp_shard": 2, "cp": 2}, {"ep": 4}, {"ep": 4}),
    "tensor parallel": ({"dp": 2, "tp": 2}, {"efsdp": 2, "ep": 2}, {"ep": 2, "tp": 2}),
    "stages": ({"pp": 2, "dp": 2}, {"pp": 2, "ep": 2}, {"pp": 2, "ep": 2}),
}


def from_a_pair(dense: dict, experts: dict, sizes: dict) -> None:
    """Groups and meshes are those of `make_groups`, and a dimension's own process group is used."""
    meshes = {
        name: init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
        for name, shape in (("dense", dense), ("experts", experts))
    }
    found, wanted = ParallelGroups.from_meshes(**meshes), make_groups(**sizes)
    for kind in KINDS:
        assert getattr(found, kind).ranks == getattr(wanted, kind).ranks, kind
        assert getattr(found, kind).rank == getattr(wanted, kind).rank, kind
    if found.ep.size < 4:
        assert found.ep.handle is meshes["experts"].get_group("ep")
    assert torch.equal(found.dp_mesh.mesh, wanted.dp_mesh.mesh)
    assert torch.equal(found.edp_mesh.mesh, wanted.edp_mesh.mesh)
    assert found.dp_mesh.mesh_dim_names == (("dp_replicate", "dp_shard") if sizes.get("dp_replicate") else ("dp",))
    total = torch.ones(1)
    torch.distributed.all_reduce(total, group=found.dp.handle)
    assert total == found.dp.size
    assert ExpertParallel(found).ep is found.ep


def from_wrong_pairs() -> None:
    dense, experts = (init_device_mesh("cpu", (2, 2), mesh_dim_names=names) for names in (("dp", "cp"), ("x", "ep")))
    with pytest.raises(ValueError, match=r"experts: .* the 2 ranks of 'x' share"):
        ParallelGroups.from_meshes(dense=dense, experts=experts)
    assert ParallelGroups.from_meshes(dense=dense, experts=experts, names={"x": "edp"}).edp.size == 2
    with pytest.raises(ValueError, match=r"dense: got a mesh of the 2 ranks|dense: got those of 2 ranks"):
        ParallelGroups.from_meshes(dense=dense["dp"], experts=experts["ep"])
    with pytest.raises(ValueError, match="wanted one called 'ep'"):
        ParallelGroups.from_meshes(dense=dense, experts=experts, names={"x": "edp", "ep": "etp"})
    with pytest.raises(TypeError, match="dense: got int, wanted a DeviceMesh"):
        ParallelGroups.from_meshes(dense=4, experts=experts)


@pytest.mark.parametrize("case", list(PAIRS))
def test_a_pair_of_meshes(four_ranks, case):
    four_ranks.run(from_a_pair, *PAIRS[case])


def test_pairs_that_say_too_little(four_ranks):
    four_ranks.run(from_wrong_pairs)
