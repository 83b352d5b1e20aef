"""Replicas of hot experts: a replicated run equals the unreplicated one, also when experts move between steps."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_triton.distributed import (
    ConfigurationMismatch,
    ExpertParallel,
    clip_grad_norm_,
    make_groups,
    rebalance,
    reduce_gradients,
    wrap_ddp,
)
from tests.helpers import parity
from tests.helpers.compare import assert_close
from tests.helpers.parity import HIDDEN, Case

LAYER = {"aux_loss_weight": 0.1, "bias": True}


def whole_parameters(layer, groups) -> dict[str, torch.Tensor]:
    """The layer's parameters with all experts, by name; every replica has to be equal to the others."""
    found = {}
    for name, parameter in layer.named_parameters():
        found[name] = parameter.detach()
        if not name.startswith("experts."):
            continue
        slots = [torch.empty_like(parameter) for _ in range(groups.ep.size)]
        if groups.ep.size > 1:
            dist.all_gather(slots, parameter.detach(), group=groups.ep.handle)
        else:
            slots = [parameter.detach()]
        slots = torch.cat(slots)
        owner = layer.experts.physical_to_logical
        experts = []
        for expert in range(layer.experts.num_experts):
            copies = slots[owner == expert]
            assert (copies == copies[0]).all(), f"{name}: the replicas of expert {expert} differ"
            experts.append(copies[0])
        found[name] = torch.stack(experts)
    return found


def trained(sizes: dict, redundant: int, steps: int) -> None:
    """AdamW with clipping on both; the replicated one is rebalanced after every step but the last."""
    groups = make_groups(**sizes)
    case = Case([5] * groups.dp.size, layer=LAYER, lora=True)
    layer = parity.make_layer(case, ExpertParallel(groups, redundant_experts=redundant, loss_reduction="sum"))
    whole = parity.make_layer(case, None)
    optimizers = [torch.optim.AdamW(x.parameters(), lr=0.05) for x in (layer, whole)]
    moved = 0
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(sum(case.tokens), HIDDEN, dtype=case.dtype) * 3
        grad = torch.randn_like(x)
        here = slice(groups.dp.rank * 5, groups.dp.rank * 5 + 5)
        for optimizer in optimizers:
            optimizer.zero_grad()
        out = whole(x)
        ((out.output * grad).sum() + out.aux_loss).backward()
        out = layer(x[here])
        ((out.output * grad[here]).sum() + out.aux_loss).backward()
        reduce_gradients(layer, rule="sum")
        norm = clip_grad_norm_(layer, 1.0)
        assert_close(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0))
        for optimizer in optimizers:
            optimizer.step()
        if step < steps - 1:
            (report,) = rebalance(layer, optimizers[0])
            assert report.after <= report.before + 1e-9
            moved += report.moved
    assert moved > 0, "nothing moved: the test shows nothing"
    mine = whole_parameters(layer, groups)
    for name, parameter in whole.named_parameters():
        assert_close(mine[name], parameter)


def saved_and_loaded() -> None:
    groups = make_groups(ep=2)
    case = Case([5, 5], layer=LAYER)
    layers = [parity.make_layer(case, ExpertParallel(groups, redundant_experts=4)) for _ in range(2)]
    x = torch.randn(5, HIDDEN, dtype=case.dtype)
    layers[0](x)
    loads = {"experts": torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 50])}
    rebalance(layers[0], loads=loads)
    assert layers[0].experts.placement.replicas.tolist()[0] == 2
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(layers[1].experts.placement.physical_to_logical, layers[0].experts.placement.physical_to_logical)
    assert torch.equal(layers[0](x).output, layers[1](x).output)
    with pytest.raises(ValueError, match="redundant_experts"):
        wrap_ddp(layers[0])


@pytest.mark.parametrize(("sizes", "redundant"), [({"ep": 4}, 4), ({"ep": 4}, 8), ({"ep": 2}, 2)], ids=str)
def test_replicated_equals_unreplicated(four_ranks, sizes, redundant):
    four_ranks.run(trained, sizes, redundant, 4)


def test_in_one_process():
    """One rank can hold replicas too: nothing travels, and nothing changes."""
    torch.manual_seed(0)
    case = Case([6], layer=LAYER)
    layer = parity.make_layer(case, ExpertParallel(redundant_experts=3))
    whole = parity.make_layer(case, None)
    x = torch.randn(6, HIDDEN, dtype=case.dtype)
    assert_close(layer(x).output, whole(x).output)


def test_the_map_is_saved(two_ranks):
    two_ranks.run(saved_and_loaded)


def test_bad_number_of_redundant_experts():
    with pytest.raises(ValueError, match="redundant_experts: got -1"):
        ExpertParallel(redundant_experts=-1)


def moved_with_other_gradients() -> None:
    layer = parity.make_layer(Case([5] * 4, layer=LAYER), ExpertParallel(make_groups(ep=4), redundant_experts=4))
    if dist.get_rank() == 1:
        layer.experts.down_proj.grad = torch.zeros_like(layer.experts.down_proj)
    with pytest.raises(ConfigurationMismatch, match=r"comparison of what moves with the experts: .* moved: "):
        rebalance(layer)


def test_ranks_have_to_move_the_same(four_ranks):
    four_ranks.run(moved_with_other_gradients)
