"""Gradients of the auxiliary losses where the global batch is spread over ranks and micro-batches, against one process.

Float64; a layer alone, whose only loss is its `aux_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_triton import BalanceAccumulator, MoE, Router
from moe_triton.distributed import ExpertParallel, make_groups
from tests.helpers.compare import relative_rms

SEQUENCES, LENGTH, HIDDEN, EXPERTS = 8, 6, 8, 4
LOSSES = {"aux_loss_weight": 0.3, "z_loss_weight": 0.2, "sequence_loss_weight": 0.1}
TOKEN_MEANS = ("aux_loss_weight", "z_loss_weight")  # means over tokens: a mask changes how much a rank counts
LAYOUTS = (None, {"ep": 4}, {"ep": 2}, {"ep": 1}, {"ep": 2, "tp": 2}, {"ep": 2, "etp": 2})  # None: no ExpertParallel
MICRO_BATCHES = (1, 2)
TOLERANCE = 1e-12  # relative RMS, float64


def make_layer(weights: Mapping[str, float], parallel: ExpertParallel | None = None, **router: Any) -> MoE:
    torch.manual_seed(0)
    router = Router(HIDDEN, EXPERTS, 2, score="sigmoid", dtype=torch.float64, **router)
    return MoE(HIDDEN, 4, EXPERTS, 2, router=router, expert_parallel=parallel, dtype=torch.float64, **weights)


def global_batch(masked: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(SEQUENCES, LENGTH, HIDDEN, dtype=torch.float64) + 0.5
    # a mask leaves every sequence some tokens, and not equally many
    lengths = torch.randint(1, LENGTH + 1, (SEQUENCES, 1)) if masked else torch.full((SEQUENCES, 1), LENGTH)
    return x, torch.arange(LENGTH) < lengths


def gradients(layer: MoE, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of the mean loss over micro-batches: that of the router's weight, and that of the hidden states."""
    leaves = [x.clone().requires_grad_() for x, _ in batches]
    for x, (_, mask) in zip(leaves, batches, strict=True):
        (layer(x, mask).aux_loss / len(batches)).backward()
    return layer.router.weight.grad, torch.cat([x.grad for x in leaves])


def error_of(
    layout: dict[str, int] | None, micro_batches: int, weights: Mapping[str, float], masked: bool, counted: bool
) -> float:
    """The larger relative RMS error of the two gradients, in every one of four ranks."""
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
    if weights.keys() & set(TOKEN_MEANS):
        balance = BalanceAccumulator(layer)
        if counted:
            with balance.counting():
                for piece, piece_mask in batches:
                    layer(piece, piece_mask)
    got, got_x = gradients(layer, batches)
    dist.all_reduce(got, group=group)
    assert expected.abs().max() > 1e-4
    return max(relative_rms(got / ranks, expected), relative_rms(got_x / ranks, expected_x.chunk(ranks)[rank]))


# The table ------------------------------------------------------------------------------------------------------------

# name of a column -> (losses, whether a mask leaves the ranks unequal numbers of tokens)
COLUMNS: dict[str, tuple[dict[str, float], bool]] = {
    "load balance": ({"aux_loss_weight": 0.3}, False),
    "z-loss": ({"z_loss_weight": 0.2}, False),
    "per sequence": ({"sequence_loss_weight": 0.1}, False),
    "all three": (LOSSES, False),
    "the first two, masked": ({name: LOSSES[name] for name in TOKEN_MEANS}, True),
}
CELLS = [(layout, n, column) for layout in LAYOUTS for n in MICRO_BATCHES for column in COLUMNS]
Cell = tuple[dict[str, int] | None, int, str]


def error_of_cell(layout: dict[str, int] | None, micro_batches: int, column: str) -> float:
    weights, masked = COLUMNS[column]
    return error_of(layout, micro_batches, weights, masked, counted=True)


def name_of(layout: dict[str, int] | None) -> str:
    return "dp=4, no expert parallelism" if layout is None else ", ".join(f"{k}={v}" for k, v in layout.items())


def table(errors: list[float]) -> list[str]:
    """Lines of Markdown; `errors` in the order of CELLS."""
    lines = [f"| four ranks | micro-batches | {' | '.join(COLUMNS)} |", f"|---|--:|{'--:|' * len(COLUMNS)}"]
    found = iter(errors)
    for layout in LAYOUTS:
        for micro_batches in MICRO_BATCHES:
            cells = " | ".join(f"{next(found):.0e}" for _ in COLUMNS)
            lines.append(f"| {name_of(layout)} | {micro_batches} | {cells} |")
    return lines
