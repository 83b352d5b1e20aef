"""Which boxes of a global tensor lie on a rank: experts, slices of them, and replicas in any order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from moe_triton.distributed import load_checkpoint, load_experts_from, save_checkpoint
from moe_triton.distributed.checkpoint.global_tensors import ExpertLayout, as_global
from moe_triton.distributed.groups import ALONE, Group
from moe_triton.distributed.holders import StackedExperts
from moe_triton.distributed.replicas.placement import build_placement


@pytest.mark.parametrize("parts", [1, 2])
def test_the_boxes_of_all_ranks_make_the_whole_tensor(parts):
    """7 experts over 3 ranks, each in 2 slices of [7, 2n, d] along n: gate and up are sliced apart."""
    whole = torch.randn(7, 8, 3)
    built = torch.full_like(whole, float("nan"))
    for experts in ((0, 1, 2), (3, 4, 5), (6,)):
        for slot in range(2):
            rows = torch.cat([part.chunk(2, dim=1)[slot] for part in whole.chunk(parts, dim=1)], dim=1)
            layout = ExpertLayout(experts=experts, num_experts=7, sliced=(1, parts), slices=2, slot=slot)
            found = as_global(rows[list(experts)], layout)
            assert found.shape == whole.shape
            assert len(found.boxes) == parts
            for offset, box in found.boxes.items():
                place = tuple(slice(start, start + size) for start, size in zip(offset, box.shape, strict=True))
                assert built[place].isnan().all(), "two ranks have the same element"
                built[place] = box
    assert torch.equal(built, whole)


def test_boxes_are_views():
    local = torch.zeros(2, 4, requires_grad=True)
    for box in as_global(local, ExpertLayout(experts=(5, 2), num_experts=8)).boxes.values():
        box.fill_(1)
    assert (local == 1).all()


def test_runs_of_experts_are_one_box():
    layout = ExpertLayout(experts=(4, 5, 1, 2, 3), num_experts=8)
    assert [(offset, len(box)) for offset, box in as_global(torch.zeros(5, 2), layout).boxes.items()] == [
        ((4, 0), 2),
        ((1, 0), 3),
    ]


class Placed(StackedExperts):
    """Experts in slots as a placement planner may fill them."""

    def __init__(self, slots: list[list[int]], rank: int) -> None:
        super().__init__()
        self.num_experts, self.mine, self.slots, self.physical_to_logical = 4, slots[rank], slots, None
        held = torch.tensor([expert for rank_slots in slots for expert in rank_slots])
        self.placement = build_placement(held, torch.ones(4), 1)
        self.expert_parallel = type("", (), {"etp": ALONE})()
        self.weight = nn.Parameter(torch.full((len(slots[rank]), 2), float("nan")))

    @property
    def local_experts(self) -> list[int]:
        return self.mine


def replicas(folder: Path) -> None:
    import torch.distributed as dist

    rank = dist.get_rank()
    first, second = (Placed(slots, rank) for slots in ([[3, 0, 1], [1, 2, 3]], [[2, 1], [1, 0, 3, 1]]))
    with torch.no_grad():
        first.weight.copy_(torch.tensor(first.local_experts)[:, None].expand(3, 2))
    save_checkpoint(folder, first)
    load_checkpoint(folder, second)
    expected = torch.tensor(second.local_experts, dtype=torch.float32)[:, None].expand(-1, 2)
    assert torch.equal(second.weight, expected)
    third = Placed(second.slots, rank)
    load_experts_from({"weight": torch.arange(4.0)[:, None].expand(4, 2)}, third)
    assert torch.equal(third.weight, expected)


def test_replicas_are_saved_once_and_filled_everywhere(two_ranks, tmp_path):
    two_ranks.run(replicas, tmp_path)


def test_slices_that_nobody_explains():
    module = Placed([[0, 1, 2, 3]], 0)
    module.expert_parallel.etp = Group(ranks=(0, 1), rank=0)
    with pytest.raises(ValueError, match=r"has 2 expert slices, but no `sliced_dimensions` to say how 'weight' is cut"):
        save_checkpoint("/nowhere", module)
