"""What makes every gradient that of the global batch: dense parameters' and experts' over ranks of their own."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from moe_triton.checks import check_choice
from moe_triton.compat.colossalai.context.parallel_context import global_context
from moe_triton.distributed.gradients import RULES, reduce_gradients
from moe_triton.distributed.parameters import expert_parameters


def holds_experts(model: nn.Module) -> bool:
    """Return whether any of the model's parameters belong to experts that may be spread over ranks."""
    return bool(expert_parameters(model))


class MoeGradientHandler:
    """Averages dense gradients over the data-parallel ranks; experts' are summed over their copies.

    Args:
        model: as it is trained.
        optimizer: not used; upstream's second argument.
        rule: "mean": experts' sums are divided by the number of data-parallel ranks, so that an update does not depend
            on how many ranks share the experts. "colossalai": by the number of copies, as upstream does: ep times
            larger. "sum": see `moe_triton.distributed.reduce_gradients`.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None, *, rule: str = "mean") -> None:
        check_choice("rule", rule, RULES)
        self._model = model
        self.rule = rule

    def handle_gradient(self) -> None:
        """Reduce all gradients, in place; once per optimizer step, on every rank."""
        reduce_gradients(self._model, global_context.groups(), rule=self.rule)
