"""Small models on Colossal-AI's layers, and a training run that is the same code on one process and in ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.compat.colossalai import initialize
from moe_triton.compat.colossalai.context import ParallelMode, global_context, moe_set_seed
from moe_triton.compat.colossalai.engine import MoeGradientHandler
from moe_triton.compat.colossalai.model_zoo.moe.models import VanillaFFN, Widenet, moe_mlp_args
from moe_triton.compat.colossalai.nn.layer.moe import (
    Experts,
    FFNExperts,
    MoeLayer,
    MoeModule,
    Top1Router,
    Top2Router,
    build_ffn_experts,
)
from moe_triton.compat.colossalai.nn.loss import MoeCrossEntropyLoss
from moe_triton.distributed.checkpoint.global_tensors import model_tensors
from tests.helpers.colossalai_context import launched

D, F, CLASSES, BATCH = 16, 24, 5, 8


class TanhExpert(nn.Module):
    """An expert that no fused path knows, with a tied parameter and a tuple for output."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.first = nn.Linear(d_model, d_model, bias=False)
        self.second = nn.Linear(d_model, d_model)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.second(torch.tanh(self.first(x))), None


class TwoLayers(nn.Module):
    """Tokens [B, 3, D] through two MoE blocks with residual connections; mean and classifier."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(self.norm(x))
        return self.head(x.mean(1))


def widenet(capacity_factor: float | None = None, **options: Any) -> nn.Module:
    arguments = {"drop_rate": 0.0, "noisy": False, "depth": 2, "num_heads": 2, "d_kv": 8, "d_model": D, "d_ff": F}
    model = Widenet(
        4, capacity_factor, img_size=4, patch_size=2, in_chans=1, num_classes=CLASSES, **{**arguments, **options}
    )
    nn.init.normal_(model.linear.weight, std=0.5)  # so that gradients reach the blocks from the first step
    return model


def layers(num_experts: int = 4, kind: str = "mixed", priority: str | None = None, **router: Any) -> nn.Module:
    router = {"capacity_factor": None, **router}
    if kind == "module":
        first = MoeModule(D, num_experts, 1, 9.0, 9.0, expert_cls=TanhExpert, d_model=D)
        ffn = build_ffn_experts(num_experts, D, F)
        second = MoeModule(D, num_experts, 2, 9.0, 9.0, use_residual=True, expert_instance=ffn,
                           expert_cls=VanillaFFN, **moe_mlp_args(D, F, 0.0))  # fmt: skip
        return TwoLayers(first, second)
    if kind == "slices":
        parts = [build_ffn_experts(num_experts, D, F), build_ffn_experts(num_experts, D, D, activation=nn.Tanh())]
    elif kind == "called":
        parts = [Experts(expert=TanhExpert, num_experts=num_experts, d_model=D),
                 FFNExperts(num_experts, D, F, activation=nn.Tanh())]  # fmt: skip
    else:
        parts = [Experts(expert=VanillaFFN, num_experts=num_experts, **moe_mlp_args(D, F, 0.0)),
                 FFNExperts(num_experts, D, F)]  # fmt: skip
    routers = Top1Router(min_capacity=1, **router), Top2Router(**router)
    if priority is not None:  # v0.0.2's top-1 draws lots, which one process draws otherwise than four
        routers[0].priority = priority
    return TwoLayers(*(MoeLayer(D, num_experts, r, e) for r, e in zip(routers, parts, strict=True)))


@dataclass
class Case:
    """A model by the name of its function and that function's options, in a config."""

    config: dict[str, Any] = field(default_factory=dict)
    model: str = "layers"
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    rule: str = "mean"


def batch(case: Case, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = (BATCH, 1, 4, 4) if case.model == "widenet" else (BATCH, 3, D)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def train(case: Case) -> dict[str, Any]:
    """Losses of some steps, and the last gradients as boxes {offset: tensor} of global ones."""
    with launched(case.config):
        moe_set_seed(42)
        model = {"widenet": widenet, "layers": layers}[case.model](**case.options).double()
        criterion = MoeCrossEntropyLoss(aux_weight=0.1, label_smoothing=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = initialize(model, optimizer, criterion, verbose=False)
        engine.gradient_handlers[:] = [MoeGradientHandler(model, rule=case.rule)]
        group = global_context.group(ParallelMode.DATA)
        losses = []
        for step in range(case.steps):
            x, y = (part.chunk(group.size)[group.rank] for part in batch(case, step))
            engine.zero_grad()
            loss = criterion(engine(x), y)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        gradients = {}
        for name, tensor in model_tensors(model).items():
            assert tensor.live.grad is not None, name
            gradients[name] = tensor._replace(live=tensor.live.grad).as_global().boxes
        return {"losses": losses, "gradients": gradients, "rank": group.rank,
                "tensor rank": global_context.get_local_rank(ParallelMode.TENSOR)}  # fmt: skip
