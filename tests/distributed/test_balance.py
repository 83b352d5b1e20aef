"""The auxiliary losses' gradients do not depend on how the global batch is spread over ranks and micro-batches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_triton import BalanceAccumulator, MoE, Router
from moe_triton.distributed import ExpertParallel, make_groups
from tests.helpers.compare import assert_close
from tests.helpers.ranks import products

SEQUENCES, LENGTH, HIDDEN, EXPERTS = 8, 6, 8, 4
LOSSES = ("aux_loss_weight", "z_loss_weight", "sequence_loss_weight")
LAYOUTS = (None, {"ep": 4}, {"ep": 2}, {"ep": 1}, {"ep": 2, "tp": 2}, {"ep": 2, "etp": 2})  # None: no ExpertParallel
GLOBAL = {"aux_loss_weight": 0.3, "z_loss_weight": 0.2, "sequence_loss_weight": 0.1}


def make_layer(weights: dict[str, float], parallel: ExpertParallel | None = None, **router) -> MoE:
    torch.manual_seed(0)
    router = Router(HIDDEN, EXPERTS, 2, score="sigmoid", dtype=torch.float64, **router)
    return MoE(HIDDEN, 4, EXPERTS, 2, router=router, expert_parallel=parallel, dtype=torch.float64, **weights)


def global_batch(masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(SEQUENCES, LENGTH, HIDDEN, dtype=torch.float64) + 0.5
    # a mask leaves every sequence some tokens, and not equally many
    lengths = torch.randint(1, LENGTH + 1, (SEQUENCES, 1)) if masked else torch.full((SEQUENCES, 1), LENGTH)
    return x, torch.arange(LENGTH) < lengths


def gradients(layer: MoE, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the mean loss over micro-batches: that of the router's weight, and that of the hidden states."""
    leaves = [x.clone().requires_grad_() for x, _ in batches]
    for x, (_, mask) in zip(leaves, batches, strict=True):
        (layer(x, mask).aux_loss / len(batches)).backward()
    return layer.router.weight.grad, torch.cat([x.grad for x in leaves])


def spread(layout: dict | None, micro_batches: int, weights: dict[str, float], masked: bool, counted: bool) -> None:
    x, mask = global_batch(masked)
    expected, expected_x = gradients(make_layer(weights), [(x, mask)])
    rank, ranks, parallel, group = dist.get_rank(), dist.get_world_size(), None, None
    if layout is not None:
        groups = make_groups(**layout)
        rank, ranks, group = groups.dp.rank, groups.dp.size, groups.dp.handle
        parallel = ExpertParallel(groups, loss_reduction="mean")
    layer = make_layer(weights, parallel)
    mine = [piece.chunk(ranks)[rank].chunk(micro_batches) for piece in (x, mask)]
    batches = list(zip(*mine, strict=True))
    if weights.keys() & {"aux_loss_weight", "z_loss_weight"}:
        balance = BalanceAccumulator(layer)
        if counted:
            with balance.counting():
                for piece, piece_mask in batches:
                    layer(piece, piece_mask)
    got, got_x = gradients(layer, batches)
    dist.all_reduce(got, group=group)
    assert expected.abs().max() > 1e-4
    assert_close(got / ranks, expected)
    assert_close(got_x / ranks, expected_x.chunk(ranks)[rank])


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_are_those_of_one_process(four_ranks, layout, micro_batches):
    """The matrix: layout x micro-batches, with all three losses; with unequal masks too where they count tokens."""
    four_ranks.run(spread, layout, micro_batches, GLOBAL, False, True)
    token_means = {name: GLOBAL[name] for name in LOSSES[:2]}
    four_ranks.run(spread, layout, micro_batches, token_means, True, True)


@pytest.mark.parametrize(("layout", "name"), products(layout=(None, {"ep": 2}), name=LOSSES))
def test_each_loss_without_counting_before(four_ranks, layout, name):
    """One micro-batch of equal ranks sees the whole global batch already, by the published method."""
    four_ranks.run(spread, layout, 1, {name: 0.5}, False, False)


def test_counting_is_what_makes_the_micro_batches_agree(two_ranks):
    with pytest.raises(AssertionError, match="relative RMS error"):
        two_ranks.run(spread, None, 2, {"aux_loss_weight": 0.5}, False, False)


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
