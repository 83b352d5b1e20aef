"""A DeviceMesh given to ExpertParallel: every dimension with other tokens counts, or is refused."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_triton.distributed import ExpertParallel

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
