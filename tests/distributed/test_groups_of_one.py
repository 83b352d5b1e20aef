"""A group of one rank is a process group of its own: torch takes None for all ranks, and would sum over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_triton import MoE
from moe_triton.compat.colossalai.context import MOE_CONTEXT, ParallelMode, global_context
from moe_triton.compat.deepspeed import groups as deepspeed_groups
from moe_triton.distributed import ExpertParallel, Group, make_groups
from moe_triton.distributed.groups import group_from_handle
from tests.helpers.colossalai_context import launched
from tests.helpers.compare import assert_close

KINDS = ("dp", "tp", "pp", "ep", "edp", "etp", "alone")
SHARED = ("ep", "edp", "etp", "tp", "between_nodes", "in_node")


def half_mesh() -> DeviceMesh:
    """A mesh of this rank's half of the world, as a pipeline stage has."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))["ep"]


def parallel_of(sizes: dict[str, Any]) -> list[Group]:
    found = ExpertParallel(make_groups(**sizes))
    return [getattr(found, name) for name in SHARED]


MADE: dict[str, Callable[[], list[Group]]] = {
    "ep=4": lambda: [getattr(make_groups(ep=4), kind) for kind in KINDS],
    "ep=2, tp=2": lambda: [getattr(make_groups(ep=2, tp=2), kind) for kind in KINDS],
    "tp=4, etp=4": lambda: [getattr(make_groups(tp=4, etp=4), kind) for kind in KINDS],
    "layers of ep=4": lambda: parallel_of({"ep": 4}),
    "layers of tp=2, replicated": lambda: parallel_of({"ep": 2, "tp": 2, "order": "tp-replicated"}),
    "the world": lambda: [getattr(ExpertParallel(), name) for name in SHARED],
    "a mesh": lambda: [getattr(ExpertParallel(init_device_mesh("cpu", (4,))), name) for name in SHARED],
    "a mesh of half the world": lambda: [getattr(ExpertParallel(half_mesh()), name) for name in SHARED],
    "a handle": lambda: [group_from_handle(make_groups(ep=4).alone.handle)],
}


def seen(group: Group) -> tuple[Any, ...]:
    """(our size, torch's size, torch's rank, what a sum of 1, 10, 100, 1000 by rank is)."""
    total = torch.tensor([10 ** dist.get_rank()])
    dist.all_reduce(total, group=group.handle)
    return group.size, dist.get_world_size(group.handle), dist.get_rank(group.handle), total.item()


def all_seen(how: str) -> list[tuple[Any, ...]]:
    found = [seen(group) for group in MADE[how]()]
    after = dist.new_group([0, 1, 2, 3])  # the ranks still agree about the groups that they make together
    total = torch.ones(())
    dist.all_reduce(total, group=after)
    assert total == 4
    dist.destroy_process_group(after)
    return found


@pytest.mark.parametrize("how", MADE)
def test_groups_of_one(four_ranks, how):
    for rank, found in enumerate(four_ranks.run(all_seen, how)):
        alone = [group for group in found if group[0] == 1]
        assert alone
        assert set(alone) == {(1, 1, 0, 10**rank)}
        assert all(size == torchs and total > 10**rank for size, torchs, _, total in found if size > 1)


def exchanged_alone() -> None:
    """Four ranks with all experts and other tokens each, that exchange with nobody but themselves."""
    torch.manual_seed(0)
    layer = MoE(8, 16, 4, expert_parallel=ExpertParallel(make_groups(ep=1), always_exchange=True))
    torch.manual_seed(0)
    plain = MoE(8, 16, 4)
    x = torch.randn(5 + dist.get_rank(), 8)
    assert_close(layer(x).output, plain(x).output)


def test_an_exchange_in_a_group_of_one(four_ranks):
    four_ranks.run(exchanged_alone)


def of_colossalai(max_ep_size: int, num_experts: int) -> list[tuple[Any, ...]]:
    with launched({"max_ep_size": max_ep_size}):
        MOE_CONTEXT.setup(3)
        _, info = MOE_CONTEXT.get_info(num_experts)
        slices = MOE_CONTEXT.get_slices()
        assert MOE_CONTEXT.parallel_info_dict[info.ep_size] is info
        assert MOE_CONTEXT.parallel_info_dict[slices.ep_size].dp_group is slices.dp_group
        assert sorted(MOE_CONTEXT.parallel_info_dict) == sorted({info.ep_size, max_ep_size})
        for shared in (slices.parallel.etp, slices.parallel.edp):
            assert shared.handle in (slices.ep_group, slices.dp_group)
        found = [(info.ep_size, info.ep_group), (info.dp_size, info.dp_group)]
        found += [(global_context.get_world_size(mode), global_context.get_group(mode)) for mode in
                  (ParallelMode.GLOBAL, ParallelMode.DATA, ParallelMode.TENSOR, ParallelMode.MOE_DATA,
                   ParallelMode.MOE_MODEL)]  # fmt: skip
        return [seen(Group(ranks=(0,) * size, rank=0, reference=ref(handle))) for size, handle in found]


@pytest.mark.parametrize(("max_ep_size", "num_experts"), [(4, 1), (4, 2), (4, 4), (2, 8), (1, 8)])
def test_colossalai(four_ranks, max_ep_size, num_experts):
    for rank, found in enumerate(four_ranks.run(of_colossalai, max_ep_size, num_experts)):
        assert all(size == torchs for size, torchs, _, _ in found)
        assert {group for group in found if group[0] == 1} == {(1, 1, 0, 10**rank)}


def of_deepspeed(ep_size: int) -> list[tuple[Any, ...]]:
    deepspeed_groups.reset()
    with pytest.raises(RuntimeError, match="initialize"):
        deepspeed_groups.get_model_parallel_group()
    deepspeed_groups.initialize(ep_size)
    name = deepspeed_groups.group_name(ep_size)
    handles = (
        (deepspeed_groups.get_expert_parallel_world_size(name), deepspeed_groups.get_expert_parallel_group(name)),
        (deepspeed_groups.get_expert_data_parallel_world_size(name),
         deepspeed_groups.get_expert_data_parallel_group(name)),
        (deepspeed_groups.get_model_parallel_world_size(), deepspeed_groups.get_model_parallel_group()),
        (deepspeed_groups.tensor_parallel_world_size(), deepspeed_groups.tensor_parallel_group()),
        (deepspeed_groups.get_data_parallel_world_size(), deepspeed_groups.get_data_parallel_group()),
    )  # fmt: skip
    found = [seen(Group(ranks=(0,) * size, rank=0, reference=ref(handle))) for size, handle in handles]
    deepspeed_groups.reset()
    return found


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_deepspeed(four_ranks, ep_size):
    for rank, found in enumerate(four_ranks.run(of_deepspeed, ep_size)):
        assert [size for size, *_ in found] == [ep_size, 4 // ep_size, 1, 1, 4]
        assert all(size == torchs for size, torchs, _, _ in found)
        assert {group for group in found if group[0] == 1} == {(1, 1, 0, 10**rank)}


def test_an_exchange_without_torch_distributed():
    with pytest.raises(ValueError, match=r"always_exchange: got True without torch\.distributed"):
        ExpertParallel(always_exchange=True)
