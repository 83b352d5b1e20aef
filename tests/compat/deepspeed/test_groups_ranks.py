"""DeepSpeed's process groups over four ranks: the four cases of the documentation."""

from __future__ import annotations

import pytest

from tests.helpers import deepspeed_parity as parity

CONSECUTIVE = {"ep": [[0, 1], [0, 1], [2, 3], [2, 3]], "edp": [[0, 2], [1, 3], [0, 2], [1, 3]]}
LANES = {"ep": [[0, 2], [1, 3], [0, 2], [1, 3]], "edp": [[0], [1], [2], [3]]}


@pytest.mark.parametrize(
    ("tensor_parallel", "expected"), [(1, CONSECUTIVE), (2, LANES)], ids=["expert + data", "expert + data + model"]
)
def test_expert_parallelism(four_ranks, tensor_parallel, expected):
    """S2 and S4; the groups are where DeepSpeed's engine looks for them."""
    for rank, found in enumerate(four_ranks.run(parity.initialized_groups, tensor_parallel, {"ep_size": 2})):
        ep, edp = expected["ep"][rank], expected["edp"][rank]
        assert found["ep_size_2"] == (ep, edp, ep, edp, ep.index(rank), len(edp), ep, 2)
        assert found["max"] == 2
        assert "exist already" in found["again"]


def test_model_parallelism_alone(four_ranks):
    """S3: an explicit call keeps ep_size = 1; the engine's own takes the data-parallel world size."""
    for found in four_ranks.run(parity.initialized_groups, 2, {}):
        assert set(found) == {"ep_size_1", "max", "again"}
    for names in four_ranks.run(parity.lazily_initialized, 2):
        assert "ep_size_2" in names
    for names in four_ranks.run(parity.lazily_initialized, 1):  # S1
        assert names == ["ep_size_1"]


def test_sizes_are_clamped(four_ranks):
    for found in four_ranks.run(parity.initialized_groups, 1, {"ep_size": 8}):
        assert set(found) == {"ep_size_4", "max", "again"}


def test_layers_with_fewer_experts_than_ranks(four_ranks):
    """`num_ep_list` holds the layers' expert counts: large ones share a group, small ones have their own."""
    for found in four_ranks.run(parity.initialized_groups, 1, {"ep_size": 4, "num_ep_list": [2, 4, 8, 2]}):
        assert set(found) == {"ep_size_2", "ep_size_4", "max", "again"}
    for layers in four_ranks.run(parity.documented_layers, 4, [2, 4, 8]):
        assert layers == [(2, 1, "ep_size_2"), (4, 1, "ep_size_4"), (4, 2, "ep_size_4")]


def test_a_size_that_does_not_divide(four_ranks):
    for message in four_ranks.run(parity.refused, {"ep_size": 3}):
        assert message == "ValueError: ep_size: got 3, wanted a divisor of the data-parallel world size 4"
