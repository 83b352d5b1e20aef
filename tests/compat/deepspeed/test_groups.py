"""DeepSpeed's process groups: the tables, the four cases, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch.distributed as dist
from deepspeed.utils.groups import _get_expert_parallel_ranks as upstream_ranks

from moe_triton.compat.deepspeed import groups
from moe_triton.compat.deepspeed.groups import rank_tables
from tests.helpers.ranks import products


@pytest.fixture(autouse=True)
def no_groups():
    groups.reset()
    yield
    groups.reset()


def test_tables():
    plain = rank_tables(8, 2)
    assert plain.ep == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert plain.edp == [[0, 2, 4, 6], [1, 3, 5, 7]]
    lanes = rank_tables(8, 2, 2, within_lanes=True)
    assert lanes.ep == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert lanes.edp == [[0, 4], [2, 6], [1, 5], [3, 7]]
    lanes = rank_tables(16, 4, 2, within_lanes=True)
    assert lanes.ep == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    assert lanes.edp == [[0, 8], [2, 10], [4, 12], [6, 14], [1, 9], [3, 11], [5, 13], [7, 15]]
    strided = rank_tables(8, 2, data_before_expert=True)
    assert strided.ep == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert strided.edp == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(("ep", "tp", "pp", "dp"), products(ep=(1, 2, 3), tp=(1, 2), pp=(1, 2), dp=(1, 2, 4)))
def test_tables_are_upstreams(ep, tp, pp, dp):
    world = ep * tp * pp * dp
    for strided in (False, True):
        tables = rank_tables(world, ep, tp, pp, within_lanes=True, data_before_expert=strided)
        theirs = upstream_ranks(world, tp, ep, pp, strided)
        assert tables.ep == theirs[0]
        assert sorted(tables.edp) == sorted(theirs[1])
        across = rank_tables(world, ep, tp, pp, data_before_expert=strided)  # all ranks of a stage
        theirs = upstream_ranks(world, 1, ep, pp, strided)
        assert sorted(across.ep) == sorted(theirs[0])
        assert sorted(across.edp) == sorted(theirs[1])


def test_one_process_needs_no_process_group():
    assert not dist.is_initialized()
    groups.initialize(ep_size=4)  # clamped to the one rank there is
    name = groups.get_max_expert_size_name()
    assert name == "ep_size_1"
    assert groups.get_expert_parallel_group(name) is None
    assert groups.get_data_parallel_group() is groups.get_max_expert_parallel_group() is None
    sizes = (
        groups.get_expert_parallel_world_size(name),
        groups.get_expert_data_parallel_world_size(name),
        groups.get_data_parallel_world_size(),
        groups.get_model_parallel_world_size(),
    )
    ranks = (
        groups.get_expert_parallel_rank(name),
        groups.get_expert_data_parallel_rank(name),
        groups.get_expert_parallel_src_rank(name),
        groups.get_data_parallel_rank(),
        groups.get_model_parallel_rank(),
    )
    assert (sizes, ranks) == ((1,) * 4, (0,) * 5)


def test_a_second_call_is_an_error():
    groups.initialize()
    with pytest.raises(RuntimeError, match="initialize: expert-parallel groups exist already"):
        groups.initialize()
    groups.ensure_initialized()  # is content


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ep_size": 0}, ValueError, "ep_size: got 0"),
        ({"ep_size": 2.0}, TypeError, "ep_size: got 2.0"),
        ({"ep_size": 4, "num_ep_list": [4, 6]}, ValueError, "num_ep_list: got 6, wanted a divisor or a multiple of"),
        ({"ep_size": 4, "num_ep_list": [2]}, ValueError, r"num_ep_list: got \[2\], wanted an entry of at least"),
        ({"ep_size": 4, "num_ep_list": []}, ValueError, r"num_ep_list: got \[\]"),
        ({"ep_size": 4, "num_ep_list": [0, 4]}, ValueError, "num_ep_list: got 0"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        groups.initialize(**arguments)
    assert not groups.is_initialized()


def test_several_processes_without_a_process_group(monkeypatch):
    """A silent clamp to one rank would train every rank by itself."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised in a world of 2"):
        groups.initialize(2)


class Mpu:
    """Sizes alone."""

    def __init__(self, model: int, data: int) -> None:
        self.get_model_parallel_world_size = lambda: model
        self.get_data_parallel_world_size = lambda: data


def test_an_mpu_that_does_not_fit():
    with pytest.raises(ValueError, match="data parallelism of 2 x 1 x 2, wanted a product of 1"):
        groups.initialize(mpu=Mpu(2, 2))


def test_newer_names_of_an_mpu():
    mpu = Mpu(1, 1)
    mpu.get_tensor_model_parallel_world_size = lambda: 1
    mpu.get_pipeline_model_parallel_world_size = lambda: 1
    mpu.get_tensor_model_parallel_rank = lambda: 0
    groups.initialize(mpu=mpu)
    assert groups.get_mpu() is mpu
    assert (groups.tensor_parallel_rank(), groups.pipeline_parallel_world_size()) == (0, 1)


def test_sizes_of_layers():
    assert groups.ep_size_for(64) == 1  # nobody initialised: all experts here
    groups.initialize()
    assert groups.ep_size_for(64) == 1


def test_torch_distributed_may_be_started_anew():
    """Groups of a process group that is gone are forgotten by themselves."""
    program = """
import tempfile
import torch.distributed as dist
from torch import nn
from moe_triton.compat import deepspeed as compat
for i in range(2):
    store = tempfile.mktemp()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    compat.groups.initialize()
    compat.MoE(4, nn.Linear(4, 4), 2).set_deepspeed_parallelism()
    group = compat.groups.get_expert_parallel_group("ep_size_1")
    dist.barrier(group)
    dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
