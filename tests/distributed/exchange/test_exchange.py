"""An expert-parallel layer equals the layer in one process: outputs, loss and every gradient, in every mode."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import parity
from tests.helpers.parity import Case
from tests.helpers.ranks import products

EVEN, UNEVEN, SOME_EMPTY = [6, 6, 6, 6], [9, 1, 4, 2], [5, 0, 7, 0]
LOSSES = {"aux_loss_weight": 0.1, "z_loss_weight": 0.01}


@pytest.mark.parametrize(
    ("tokens", "deduplicate", "chunks"),
    products(tokens=(EVEN, UNEVEN, SOME_EMPTY, [0, 0, 0, 0]), deduplicate=(True, False), chunks=(1, 3)),
)
def test_dropless(four_ranks, tokens, deduplicate, chunks):
    four_ranks.run(
        parity.check,
        Case(tokens, exchange={"deduplicate": deduplicate, "chunks": chunks}, layer={**LOSSES, "bias": True}),
    )


@pytest.mark.parametrize("chunks", [2, 8])
@pytest.mark.parametrize("mode", ["bounded", "allgather", "capacity"])
def test_fixed_sizes(four_ranks, mode, chunks):
    layer = {**LOSSES, "capacity_factor": 1.0} if mode == "capacity" else LOSSES
    tokens = EVEN if mode == "capacity" else SOME_EMPTY
    for most in (None, 11):
        exchange = {"mode": mode, "chunks": chunks, "max_tokens_per_rank": most}
        four_ranks.run(parity.check, Case(tokens, exchange=exchange, layer=layer))


@pytest.mark.parametrize("mode", ["dropless", "capacity", "bounded", "allgather"])
def test_capacity_equals_capacity_groups(four_ranks, mode):
    layer = {"capacity_factor": 0.7, "min_capacity": 1, "renormalize": True, "shared_intermediate_size": 8}
    results = four_ranks.run(parity.check, Case(EVEN, exchange={"mode": mode}, layer=layer))
    outputs = torch.cat([result["output"] for result in results])
    assert outputs.shape == (24, parity.HIDDEN)


def test_several_capacity_groups_on_a_rank(four_ranks):
    # ceil(0.9 * 3 * 3 / 8) = 2 places in each of two groups of 3 tokens, but 3 for the 6 tokens at once
    layer = {"capacity_factor": 0.9, "min_capacity": 1, "capacity_groups": 2}
    four_ranks.run(parity.check, Case(EVEN, exchange={"mode": "capacity"}, layer=layer))


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 2, "order": "data-before-expert"}, {"ep": 1}], ids=str)
def test_fewer_expert_ranks_than_ranks(four_ranks, sizes):
    four_ranks.run(parity.check, Case(UNEVEN, sizes=sizes, layer=LOSSES))


def test_experts_that_do_not_divide(four_ranks):
    four_ranks.run(parity.check, Case(UNEVEN, experts=7, layer=LOSSES))


def test_all_tokens_to_one_expert(four_ranks):
    four_ranks.run(parity.check, Case(UNEVEN, one_expert=True, layer={"top_k": 1}))


@pytest.mark.parametrize("per_node", [2, 4, 1])
def test_two_level_exchange(four_ranks, per_node):
    exchange = {"ranks_per_node": per_node, "chunks": 2}
    four_ranks.run(parity.check, Case(SOME_EMPTY, exchange=exchange, layer={**LOSSES, "bias": True}))


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("sizes", [{"ep": 2, "etp": 2}, {"ep": 1, "etp": 4}, {"ep": 2, "etp": 2, "tp": 2}], ids=str)
def test_expert_tensor_parallelism(four_ranks, sizes, activation):
    tokens = UNEVEN if "tp" not in sizes else [5, 8]
    layer = {**LOSSES, "bias": True, "activation": activation}
    four_ranks.run(parity.check, Case(tokens, sizes=sizes, layer=layer))


@pytest.mark.parametrize(
    ("sizes", "exchange"),
    [
        ({"ep": 4}, {"chunks": 2}),
        ({"ep": 2}, {"mode": "allgather"}),
        ({"ep": 2, "etp": 2}, {}),
        ({"ep": 1, "etp": 4}, {}),
        ({"ep": 2, "etp": 2, "tp": 2}, {}),
    ],
    ids=str,
)
def test_adapters(four_ranks, sizes, exchange):
    tokens = UNEVEN if "tp" not in sizes else [5, 8]
    four_ranks.run(parity.check, Case(tokens, sizes=sizes, exchange=exchange, layer={"bias": True}, lora=True))


@pytest.mark.parametrize("sizes", [{"ep": 4, "tp": 2}, {"ep": 2, "tp": 2}, {"ep": 1, "tp": 4}], ids=str)
@pytest.mark.parametrize("mode", ["dropless", "capacity"])
def test_tensor_parallel_token_slicing(four_ranks, sizes, mode):
    layer = {**LOSSES, "capacity_factor": 1.0} if mode == "capacity" else LOSSES
    tokens = [6] * (4 // sizes["tp"])
    four_ranks.run(parity.check, Case(tokens, sizes=sizes, exchange={"mode": mode}, layer=layer))


@pytest.mark.parametrize("sizes", [{"ep": 1, "etp": 4}, {"ep": 1, "tp": 4}, {"ep": 2, "etp": 2}], ids=str)
def test_the_shared_expert_beside_slices(four_ranks, sizes):
    tokens = [6] if "tp" in sizes else UNEVEN
    layer = {**LOSSES, "bias": True, "shared_intermediate_size": 8, "shared_gate": True}
    four_ranks.run(parity.check, Case(tokens, sizes=sizes, layer=layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [[40, 40, 40, 40], [90, 3, 0, 50]], ids=str)
def test_the_same_bits(four_ranks, tokens, dtype):
    four_ranks.run(parity.check_bits, Case(tokens, dtype=dtype, layer={"bias": True}, lora=True), "torch")


def test_the_same_bits_by_kernels(two_ranks):
    case = Case([7, 5], sizes={"ep": 2}, dtype=torch.float32, layer={"bias": True}, experts=4)
    two_ranks.run(parity.check_bits, case, "triton")


@pytest.mark.parametrize("mode", ["dropless", "capacity", "bounded", "allgather"])
def test_kernels(two_ranks, mode):
    layer = {**LOSSES, "backend": "triton", "capacity_factor": 1.0, "top_k": 2}
    is_first = mode == "dropless"  # chunks and adapters are no other kernels in another mode
    exchange = {"mode": mode, "chunks": 2 if is_first else 1}
    case = Case([6, 6], sizes={"ep": 2}, exchange=exchange, layer=layer, dtype=torch.float32, experts=4, lora=is_first)
    two_ranks.run(parity.check, case)
