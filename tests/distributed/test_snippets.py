"""The training loops of README and docs/, as they stand there, on four ranks against one process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_triton import MoE
from moe_triton.distributed import make_groups
from tests.helpers.compare import assert_close

ROOT = Path(__file__).parents[2]
HIDDEN, STEPS = 16, 3
LOOPS = {"README.md": 1, "docs/many_gpus.md": 3}  # how many loops over batches there are
SMALLER = {"2048, 768, num_experts=128, top_k=8,": f"{HIDDEN}, 24, num_experts=8, top_k=3, dtype=torch.float64,"}


def loops(page: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if "for x, y in batches" in block]


def batches(tokens: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, STEPS, tokens, HIDDEN, dtype=torch.float64, generator=generator)
    return list(zip(*x, strict=True))


def trained(code: str, tokens: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """(this rank's losses, the router's gradients after each step); runs in every rank."""
    for old, new in SMALLER.items():
        assert old in code
        code = code.replace(old, new)
    code = code.replace("make_groups(ep=8)", "make_groups(ep=2)").replace('dist.init_process_group("nccl")', "")
    groups = make_groups(ep=2)
    start = sum(tokens[: groups.dp.rank])
    here = slice(start, start + tokens[groups.dp.rank])
    losses, gradients = [], []

    def mine() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches(sum(tokens)):
            yield x[here], y[here]
            losses.append(names["loss"].detach())
            gradient = names["layer"].router.weight.grad.clone()
            gradients.append(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)  # FSDP2

    names = {"torch": torch, "F": F, "MoE": MoE, "batches": mine(), "elements_of_all_ranks": sum(tokens) * HIDDEN}
    torch.manual_seed(0)
    exec(code, names)
    return losses, gradients


def in_one_process(tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, 24, num_experts=8, top_k=3, aux_loss_weight=0.01, dtype=torch.float64)
    optimizer = torch.optim.AdamW(layer.parameters())
    losses, gradients = [], []
    for x, y in batches(tokens):
        output, aux_loss, _ = layer(x)
        loss = F.mse_loss(output, y) + aux_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        gradients.append(layer.router.weight.grad.clone())
    return losses, gradients


@pytest.mark.parametrize("page", list(LOOPS))
def test_every_loop_is_found(page):
    assert len(loops(page)) == LOOPS[page]


@pytest.mark.parametrize(("page", "number"), [(page, i) for page, count in LOOPS.items() for i in range(count)])
def test_loops_train_as_one_process(four_ranks, page, number):
    code = loops(page)[number]
    sums = 'rule="sum"' in code
    if "import ExpertParallel" not in code:  # it goes on from the page's first
        code = "from moe_triton.distributed import *\ngroups = make_groups(ep=2)\n" + code
    tokens = [6, 0, 9, 1] if sums else [4, 4, 4, 4]
    wanted_losses, wanted_gradients = in_one_process(sum(tokens))
    found = four_ranks.run(trained, code, tokens)
    for step in range(STEPS):
        losses = torch.stack([losses[step] for losses, _ in found])
        assert_close(losses.sum() if sums else losses.mean(), wanted_losses[step], tolerance=1e-9)
        for _, gradients in found:
            assert_close(gradients[step], wanted_gradients[step], tolerance=1e-9)
