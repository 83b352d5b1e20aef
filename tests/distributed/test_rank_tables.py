"""The rank tables: published layouts, and what holds for every plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_triton.distributed import plan
from moe_triton.distributed.rank_tables import KINDS, ORDERS, mesh_tables


def test_deepspeed_data_and_expert_parallel():
    tables = plan(8, ep=2)
    assert tables.ep == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert tables.edp == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert tables.dp == [list(range(8))]


@pytest.mark.parametrize("options", [{"etp": 2}, {"order": "tp-replicated"}], ids=str)
def test_deepspeed_under_tensor_parallelism(options):
    tables = plan(8, tp=2, ep=2, **options)
    assert tables.ep == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert tables.edp == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert tables.dp == [[0, 2, 4, 6], [1, 3, 5, 7]]
    wide = plan(16, tp=2, ep=4, **options)
    assert wide.ep == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    assert wide.edp == [[0, 8], [2, 10], [4, 12], [6, 14], [1, 9], [3, 11], [5, 13], [7, 15]]
    assert tables.etp == ([[0, 1], [2, 3], [4, 5], [6, 7]] if "etp" in options else [[i] for i in range(8)])


def test_deepspeed_data_before_expert():
    tables = plan(8, ep=2, order="data-before-expert")
    assert tables.ep == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert tables.edp == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_colossalai():
    tables = plan(4, ep=2)
    assert tables.ep == [[0, 1], [2, 3]]
    assert tables.edp == [[0, 2], [1, 3]]


def test_megatron_folding_puts_expert_parallel_ranks_side_by_side():
    tables = plan(16, pp=2, tp=2, ep=4)
    assert tables.ep == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert tables.edp == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
    assert tables.pp == [[i, i + 8] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert tables.tp == [[i, i + 1] for i in range(0, 16, 2)]


@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 4])] * 4),
    copies=st.sampled_from([1, 2, 3]),
    order=st.sampled_from(ORDERS),
)
def test_every_kind_covers_the_world_once(sizes, copies, order):
    pp, tp, ep, etp = sizes
    etp = 1 if order == "tp-replicated" else etp
    world = pp * tp * ep * etp * copies
    tables = plan(world, pp=pp, tp=tp, ep=ep, etp=etp, order=order)
    for kind in KINDS:
        groups = getattr(tables, kind)
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        assert len({len(group) for group in groups}) == 1
        assert all(tables.group_of(kind, rank) == group for group in groups for rank in group)
    assert len(tables.ep[0]) == ep
    assert len(tables.edp[0]) * ep * (tp if order == "tp-replicated" else etp) * pp == world
    for ranks in tables.ep:  # ranks of one expert-parallel group never hold the same experts
        assert len({tuple(tables.group_of("edp", rank)) for rank in ranks}) == ep


def test_four_thousand_ranks():
    tables = plan(4096, pp=4, tp=4, ep=64, etp=2)
    assert [len(getattr(tables, kind)[0]) for kind in KINDS] == [256, 4, 4, 64, 8, 2, 1, 256, 1, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world": 6, "ep": 4}, r"world: got 6, wanted a multiple of pp\*ep\*etp = 4"),
        ({"world": 6, "tp": 4}, r"world: got 6, wanted a multiple of pp\*tp = 4"),
        ({"world": 0}, "world: got 0"),
        ({"world": 4, "ep": 0}, "ep: got 0"),
        ({"world": 4, "order": "random"}, "order: got 'random'"),
        ({"world": 4, "tp": 2, "etp": 2, "order": "tp-replicated"}, "etp: got 2 with order 'tp-replicated', wanted 1"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


@pytest.mark.parametrize("order", ["ep-consecutive", "data-before-expert"])
def test_replicas_of_shards_are_runs_of_ranks(order):
    tables = plan(16, pp=2, ep=2, dp_replicate=2, order=order)
    assert tables.dp_shard == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert tables.dp_replicate[:4] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    shards = [[0, 2], [4, 6], [1, 3], [5, 7]] if order == "ep-consecutive" else [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert sorted(tables.edp_shard)[:4] == sorted(shards)
    assert sorted(tables.edp_replicate)[:4] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    with pytest.raises(ValueError, match=r"world: got 8, wanted a multiple of dp_replicate\*pp\*ep\*etp = 16"):
        plan(8, ep=8, dp_replicate=2)


def as_mesh(**sizes: int) -> tuple[np.ndarray, tuple[str, ...]]:
    return np.arange(np.prod(list(sizes.values()))).reshape(*sizes.values()), tuple(sizes)


DENSE = {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "cp": 2, "tp": 2}


@pytest.mark.parametrize(
    ("dense", "experts", "sizes"),
    [
        (DENSE, {"pp": 2, "dp_replicate": 2, "efsdp": 2, "ep": 4}, {"pp": 2, "dp_replicate": 2, "tp": 2, "ep": 4}),
        (DENSE, {"pp": 2, "dp_replicate": 2, "efsdp": 1, "ep": 4, "etp": 2}, {**DENSE, "ep": 4, "etp": 2}),
        (DENSE, {"pp": 2, "dp_replicate": 2, "dp_shard_in_ep": 4, "ep": 1, "tp": 2}, {**DENSE, "ep": 1, "etp": 2}),
        ({"fsdp": 8}, {"ep": 8}, {"ep": 8}),
        ({"dp_replicate": 4, "tp": 2}, {"dp_replicate": 4, "ep": 2}, {"tp": 2, "ep": 2, "dp_replicate": 4}),
    ],
    ids=["torchtitan", "slices", "slices as tp", "one dimension", "replicas only"],
)
def test_meshes_have_the_tables_of_the_plan(dense, experts, sizes):
    sizes = {name: size for name, size in sizes.items() if name not in ("dp_shard", "cp")}
    (dense_ranks, dense_names), (expert_ranks, expert_names) = as_mesh(**dense), as_mesh(**experts)
    found = mesh_tables(dense_ranks, dense_names, expert_ranks, expert_names)
    wanted = plan(dense_ranks.size, **sizes)
    assert {kind: getattr(found, kind) for kind in KINDS} == {kind: getattr(wanted, kind) for kind in KINDS}
    assert (found.replicas, found.dense.shape, found.moe.shape) == (
        wanted.replicas,
        wanted.dense.shape,
        wanted.moe.shape,
    )


def test_dimensions_in_another_order():
    """Replicas inside of the shards, and context parallelism outside of them."""
    found = mesh_tables(*as_mesh(cp=2, dp=2, dp_replicate=2), *as_mesh(ep=4, dp_replicate=2))
    assert found.dp == [list(range(8))]
    assert found.dp_shard == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert found.edp == found.edp_replicate == found.dp_replicate == [[0, 1], [2, 3], [4, 5], [6, 7]]


WRONG = {
    "unknown": ({"data": 4}, {"ep": 4}, {}, "dense: .*what the 4 ranks of 'data' share, wanted names={'data': one of"),
    "unknown experts": ({"dp": 4}, {"x": 2, "ep": 2}, {}, "experts: .*what the 2 ranks of 'x' share"),
    "of the other mesh": ({"ep": 4}, {"ep": 4}, {}, "dense: .*what the 4 ranks of 'ep' share"),
    "a bad meaning": ({"a": 4}, {"ep": 4}, {"a": "ep"}, "dense: .*'a' share"),
    "no such dimension": ({"dp": 4}, {"ep": 4}, {"b": "dp"}, "names: got 'b', wanted dimensions of the meshes"),
    "stages": ({"pp": 2, "dp": 2}, {"ep": 2, "pp": 2}, {}, "experts: got a mesh whose pp does not divide"),
    "replicas": ({"dp_replicate": 2, "dp": 2}, {"ep": 4}, {}, "experts: .*pp and dp_replicate does not divide"),
    "other ranks": ({"dp": 4}, {"ep": 8}, {}, "experts: got a mesh whose pp does not divide"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_meshes_that_say_too_little(case):
    dense, experts, names, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        mesh_tables(*as_mesh(**dense), *as_mesh(**experts), names)


def test_meshes_of_some_ranks_or_in_no_order():
    ranks, names = as_mesh(ep=4)
    with pytest.raises(ValueError, match=r"dense: got a mesh of the 4 ranks \[4, 5, 6, 7\], wanted one of all ranks"):
        mesh_tables(ranks + 4, ("dp",), ranks + 4, names)
    with pytest.raises(ValueError, match="experts: got a mesh whose ranks do not ascend along 'ep'"):
        mesh_tables(ranks, ("dp",), ranks[::-1], names)
    with pytest.raises(ValueError, match="dense: got a mesh without names"):
        mesh_tables(ranks, (), ranks, names)
