"""The auxiliary losses' gradients do not depend on how the global batch is spread over ranks and micro-batches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_triton import BalanceAccumulator, MoE
from moe_triton.distributed import ExpertParallel, make_groups
from tests.helpers.compare import assert_close
from tests.helpers.loss_gradients import (
    CELLS,
    EXPERTS,
    LAYOUTS,
    LOSSES,
    MICRO_BATCHES,
    SEQUENCES,
    TOLERANCE,
    error_of,
    error_of_cell,
    global_batch,
    make_layer,
    table,
)
from tests.helpers.ranks import products

PAGE = Path(__file__).parents[2] / "docs" / "numbers.md"


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_are_those_of_one_process(four_ranks, layout, micro_batches):
    """The matrix: layout x micro-batches, with all three losses; with unequal masks too where they count tokens."""
    for column in ("all three", "the first two, masked"):
        assert max(four_ranks.run(error_of_cell, layout, micro_batches, column)) <= TOLERANCE


@pytest.mark.parametrize(("layout", "name"), products(layout=(None, {"ep": 2}), name=tuple(LOSSES)))
def test_each_loss_without_counting_before(four_ranks, layout, name):
    """One micro-batch of equal ranks sees the whole global batch already, by the published method."""
    assert max(four_ranks.run(error_of, layout, 1, {name: 0.5}, False, False)) <= TOLERANCE


def test_counting_is_what_makes_the_micro_batches_agree(two_ranks):
    assert min(two_ranks.run(error_of, None, 2, {"aux_loss_weight": 0.5}, False, False)) > 1e-3


def test_the_page_has_the_matrix():
    written = re.search(
        r"<!-- table: gradients \(benchmarks/invariance.py\) -->\n(.*?)<!-- end", PAGE.read_text(), re.S
    )
    assert written
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written[1].splitlines()]
    wanted = [[cell.strip() for cell in line.strip("|").split("|")] for line in table([0.0] * len(CELLS))]
    assert [row[:2] for row in rows] == [row[:2] for row in wanted]
    assert rows[:2] == wanted[:2]
    assert all(float(error) <= TOLERANCE for row in rows[2:] for error in row[2:])


def running() -> None:
    """Micro-batch j is balanced by the load of the micro-batches up to j, of all ranks."""
    x, mask = global_batch(masked=True)
    layer, rank = make_layer({"aux_loss_weight": 1.0}), dist.get_rank()
    balance = BalanceAccumulator(layer)
    mine = list(zip(*(piece.chunk(2)[rank].chunk(2) for piece in (x, mask)), strict=True))
    both = [list(zip(*(piece.chunk(2)[r].chunk(2) for piece in (x, mask)), strict=True)) for r in range(2)]
    for _ in range(2):  # the second step starts anew
        counts, tokens = torch.zeros(EXPERTS, dtype=torch.float64), 0
        for j, (part, part_mask) in enumerate(mine):
            got = layer(part, part_mask).aux_loss
            for r in range(2):
                routing = layer.router(both[r][j][0].flatten(0, 1), both[r][j][1].flatten())
                counts, tokens = counts + routing.counts, tokens + routing.num_tokens
            own = layer.router(part.flatten(0, 1), part_mask.flatten())
            wanted = EXPERTS / 2 * (counts / tokens * own.score_sums / own.num_tokens).sum()
            assert_close(got, wanted)
        balance.step()


def test_running_load_over_ranks_and_micro_batches(two_ranks):
    two_ranks.run(running)


RULES = (
    {"expert_choice": 1.5},
    {"sinkhorn": 4},
    {"token_rounding": 2},
    {"top_p": 0.4},
    {"null_experts": 2},
    {"null_experts": 2, "null_output": "zero"},
    {"hash_table": torch.rand(9, EXPERTS).argsort(1)[:, :2]},
)


def routed(index: int) -> None:
    """A rank's tokens are one group of `choice_groups`; null experts cost no exchange."""
    options = RULES[index]
    groups = make_groups(ep=2)
    by_batch = {"expert_choice", "sinkhorn", "token_rounding"} & options.keys()
    weights = {"aux_loss_weight": 0.1, "capacity_factor": 1.0, "drop_policy": "probability", "min_capacity": 0}
    local = make_layer(weights, ExpertParallel(groups, loss_reduction="sum"), **options)
    whole = make_layer(weights | {"capacity_groups": 2}, **options, **({"choice_groups": 2} if by_batch else {}))
    x, mask = global_batch(masked=True)
    ids = torch.randint(0, 9, mask.shape)
    rank = dist.get_rank()

    def run(layer: MoE, *, part: slice) -> list[torch.Tensor]:
        leaf = x[part].clone().requires_grad_()
        out = layer(leaf, mask[part], token_ids=ids[part] if "hash_table" in options else None)
        (out.output.square().sum() + out.aux_loss).backward()
        return [out.output, leaf.grad]

    mine = slice(rank * SEQUENCES // 2, (rank + 1) * SEQUENCES // 2)
    expected, got = run(whole, part=slice(None)), run(local, part=mine)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b[mine])
    weight = local.router.weight.grad.clone()
    dist.all_reduce(weight)
    assert_close(weight, whole.router.weight.grad)
    for name in ("gate_up_proj", "down_proj"):
        part = getattr(whole.experts, name).grad[list(local.experts.local_experts)]
        assert_close(getattr(local.experts, name).grad, part)


@pytest.mark.parametrize("index", range(len(RULES)), ids=[next(iter(rule)) for rule in RULES])
def test_rules_over_ranks_are_those_of_one_process(two_ranks, index):
    two_ranks.run(routed, index)


def updated() -> None:
    """The bias of all ranks' tokens, whichever way it is updated."""
    x, _ = global_batch(masked=False)
    for bias_update in ("sign", "quantile"):
        whole, local = (make_layer({}, choice_bias=True, bias_update=bias_update).router for _ in range(2))
        for piece in x.chunk(2)[dist.get_rank()].chunk(2):
            local(piece.flatten(0, 1))
        if dist.get_rank() == 0:
            whole(x.flatten(0, 1))  # the other rank has nothing to add
        for router in (local, whole):
            router.update_choice_bias(0.1)
        assert torch.equal(local.choice_bias, whole.choice_bias)
        assert local.choice_bias.abs().max() > 0


def test_choice_bias_over_ranks(two_ranks):
    two_ranks.run(updated)


def test_eval_and_a_failed_count_leave_nothing_behind():
    layer, (x, mask) = make_layer({"aux_loss_weight": 1.0}), global_batch(masked=True)
    alone = layer(x, mask).aux_loss
    balance = BalanceAccumulator(layer)
    layer.eval()
    assert torch.equal(layer(x[:2]).aux_loss, layer(x[:2]).aux_loss)
    layer.train()
    with pytest.raises(ValueError, match="hidden_states"), balance.counting():
        [layer(piece) for piece in (x[:3], x[..., :2])]
    assert_close(layer(x, mask).aux_loss, alone)
    assert not torch.equal(layer(x[:2]).aux_loss, alone)
    balance.step()
    assert_close(layer(x, mask).aux_loss, alone)


def recomputed() -> None:
    """A recomputation counts nothing, and its loss is the one of its forward."""
    x, mask = global_batch(masked=True)
    found = []
    for again in (False, True):
        layer = make_layer({"aux_loss_weight": 0.5})
        BalanceAccumulator(layer)
        for part, part_mask in zip(x.chunk(2), mask.chunk(2), strict=True):
            leaf = part.clone().requires_grad_()
            out = checkpoint(layer, leaf, part_mask, use_reentrant=False) if again else layer(leaf, part_mask)
            out.aux_loss.backward()
        found.append(layer.router.weight.grad)
    assert torch.equal(*found)


def test_recomputation_counts_once(two_ranks):
    two_ranks.run(recomputed)


def test_a_model_without_such_a_loss_is_refused():
    with pytest.raises(ValueError, match="model: got no MoE layer with an aux_loss_weight or z_loss_weight"):
        BalanceAccumulator(make_layer({"sequence_loss_weight": 1.0}))
