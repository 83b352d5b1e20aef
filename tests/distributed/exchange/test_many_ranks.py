"""32 ranks as threads of one process, and worlds of thousands of ranks with no communication at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from moe_triton import MoE
from moe_triton.distributed import ExpertParallel, GroupOptions, make_groups, plan
from moe_triton.distributed import groups as groups_module
from moe_triton.distributed.groups import control_group
from tests.helpers.compare import assert_close

HIDDEN, INTERMEDIATE, TOP_K = 8, 4, 3


def in_threads(world: int, function: Callable[[], Any]) -> list[Any]:
    """function() in every one of `world` ranks of torch's threaded process group; their results by rank."""
    world_of_threads, results, failures = _install_threaded_pg(), [None] * world, []
    store = dist.HashStore()
    _set_thread_isolation_mode(True)  # every thread has a registry of groups of its own

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = function()
        except BaseException as error:  # the other threads would wait for ever
            failures.append(error)
            ProcessLocalGroup.exception_handle(error)
        finally:
            if world_of_threads.default_pg is not None:
                dist.destroy_process_group()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        _set_thread_isolation_mode(False)
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
    assert not failures, failures[0]
    return results


def part_of(layer: MoE, name: str, whole: torch.Tensor) -> torch.Tensor:
    """What this rank holds of an expert parameter, or of its gradient."""
    experts = whole[list(layer.experts.local_experts)]
    return torch.stack([layer.experts.local_slice(name, expert) for expert in experts])


@pytest.mark.parametrize(
    ("sizes", "exchange"),
    [({"ep": 32}, {}), ({"ep": 8}, {}), ({"ep": 8, "etp": 2}, {"ranks_per_node": 4})],
    ids=["ep=32", "ep=8 x edp=4", "ep=2x4 x etp=2 x edp=2"],
)
def test_32_ranks_equal_one(monkeypatch, sizes, exchange):
    monkeypatch.setattr(groups_module, "default_timeout", lambda: timedelta(seconds=60))  # threaded groups have none
    world, experts = 32, 64
    tokens = [rank % 3 for rank in range(world)]
    torch.manual_seed(0)
    arguments = {"top_k": TOP_K, "aux_loss_weight": 0.1, "dtype": torch.float64}
    whole = MoE(HIDDEN, INTERMEDIATE, experts, **arguments)
    x_all, grad_all = (torch.randn(sum(tokens), HIDDEN, dtype=torch.float64) for _ in range(2))
    x_whole = x_all.clone().requires_grad_()
    expected = whole(x_whole)
    ((expected.output * grad_all).sum() + expected.aux_loss).backward()

    def rank_of_many() -> None:
        rank = dist.get_rank()
        groups = make_groups(**sizes)
        parallel = ExpertParallel(groups, chunks=2, loss_reduction="sum", **exchange)
        layer = MoE(HIDDEN, INTERMEDIATE, experts, expert_parallel=parallel, **arguments)
        here = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
        with torch.no_grad():
            layer.router.weight.copy_(whole.router.weight)
            for name, parameter in layer.experts.named_parameters():
                parameter.copy_(part_of(layer, name, getattr(whole.experts, name)))
        x = x_all[here].clone().requires_grad_()
        got = layer(x)
        ((got.output * grad_all[here]).sum() + got.aux_loss).backward()
        assert_close(got.output, expected.output[here])
        assert_close(x.grad, x_whole.grad[here])
        for name, parameter in layer.experts.named_parameters():
            total = parameter.grad.clone()
            if groups.edp.size > 1:
                dist.all_reduce(total, group=groups.edp.handle)
            assert_close(total, part_of(layer, name, getattr(whole.experts, name).grad))
        total = layer.router.weight.grad.clone()
        dist.all_reduce(total)
        assert_close(total, whole.router.weight.grad)

    in_threads(world, rank_of_many)


@pytest.fixture
def world_of_4096():
    dist.init_process_group("fake", store=FakeStore(), rank=1234, world_size=4096)
    yield
    dist.destroy_process_group()


def test_plans_of_4096_ranks():
    tables = plan(4096, pp=4, tp=8, ep=64, etp=2)
    for kind, size in {"dp": 128, "tp": 8, "pp": 4, "ep": 64, "edp": 8, "etp": 2}.items():
        groups = getattr(tables, kind)
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(4096))


SIZES = {"pp": 4, "tp": 8, "ep": 64, "dp_replicate": 2}
MADE = ("dp", "tp", "pp", "ep", "edp", "dp_replicate", "dp_shard", "edp_shard")  # edp_replicate is dp_replicate


def test_groups_are_made_once(world_of_4096, monkeypatch):
    made: list[tuple[int, ...]] = []
    original = dist.new_group

    def new_group(ranks, **options):
        made.append(tuple(ranks))
        return original(ranks, **options)

    monkeypatch.setattr(dist, "new_group", new_group)
    tables = make_groups(**SIZES).tables
    assert len(made) == 1 + sum(len(getattr(tables, kind)) for kind in MADE)
    assert len(set(made)) == len(made)
    make_groups(**SIZES)
    assert len(set(made)) == len(made)


def test_nccl_splits_the_world_once_for_a_kind(world_of_4096, monkeypatch):
    splits = {}

    def split_group(*, split_ranks, group_desc, **options):
        splits[group_desc] = split_ranks
        return dist.group.WORLD

    monkeypatch.setattr(groups_module, "_is_splittable", lambda: True)
    monkeypatch.setattr(dist, "split_group", split_group)
    tables = make_groups(**SIZES).tables
    assert splits == {f"moe_triton {kind}": getattr(tables, kind) for kind in MADE}


def test_options_of_groups(world_of_4096, monkeypatch):
    calls = []
    monkeypatch.setattr(groups_module, "device_type", lambda: "cuda")
    monkeypatch.setattr(groups_module, "default_timeout", lambda: timedelta(seconds=9))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=lambda **given: given), raising=False)
    original = dist.new_group

    def new_group(ranks, *, pg_options=None, **options):
        calls.append((len(ranks), pg_options, options.get("group_desc")))
        return original(ranks, **options)

    monkeypatch.setattr(dist, "new_group", new_group)
    urgent = GroupOptions(high_priority=True, description="tokens")
    groups = make_groups(ep=4096, options={"ep": urgent, "dp": GroupOptions(description="unused")})
    assert (4096, {"is_high_priority_stream": True}, "tokens") in calls, "not the default group, whose is normal"
    assert groups.dp.handle is dist.group.WORLD
    assert groups.ep.handle is not dist.group.WORLD
    assert groups.control.handle is dist.group.WORLD
    with pytest.raises(ValueError, match="options: got 'expert'"):
        make_groups(options={"expert": urgent})


def test_objects_travel_beside_nccl(world_of_4096, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cuda:nccl")
    made = []
    monkeypatch.setattr(dist, "new_group", lambda ranks=None, **options: made.append(options) or dist.group.WORLD)
    control_group()
    control_group()
    assert [options["backend"] for options in made] == ["gloo"]


def test_groups_and_meshes_of_4096_ranks(world_of_4096):
    groups = make_groups(ep=64, pp=4)
    assert (groups.ep.size, groups.edp.size, groups.dp.size, groups.pp.size) == (64, 16, 1024, 4)
    assert groups.tables.group_of("ep", 1234) == list(groups.ep.ranks)
    assert groups.moe_mesh.shape == (16, 64)
    assert groups.moe_mesh["ep"].get_local_rank() == groups.ep.rank
    assert groups.moe_mesh["edp"].get_local_rank() == groups.edp.rank
    parallel = ExpertParallel(groups)
    assert parallel.experts_of(256) == range(4 * groups.ep.rank, 4 * groups.ep.rank + 4)
    layer = MoE(16, 8, 256, expert_parallel=parallel, device="meta")
    assert layer.experts.gate_up_proj.shape == (4, 16, 16)


def test_a_device_mesh_of_4096_ranks(world_of_4096):
    mesh = init_device_mesh("cpu", (64, 64), mesh_dim_names=("edp", "ep"))
    parallel = ExpertParallel(mesh)
    assert (parallel.ep.size, parallel.edp.size) == (64, 64)
    assert parallel.ep.rank == 1234 % 64
    assert len({rank // 64 for rank in parallel.ep.ranks}) == 1
