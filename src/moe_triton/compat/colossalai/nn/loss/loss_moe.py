"""The loss of a model with experts: the caller's, and the auxiliary losses of its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.checks import check_number
from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT


class MoeLoss(nn.Module):
    """loss_fn(*args, **kwargs)(output, label) + aux_weight * the auxiliary losses of the forward that came before.

    The losses are removed from the MoE context, so that no later step counts them again. Activation checkpointing has
    to be the kind that runs the first forward under autograd (`use_reentrant=False`): the other kind would lose the
    router's gradient, and raises.

    Args:
        aux_weight: at least 0.
        loss_fn: a class of criteria, such as nn.CrossEntropyLoss.
        args, kwargs: of the class.

    Under data parallelism each rank's auxiliary loss is its share, which averages to the global one.
    """

    def __init__(self, aux_weight: float, loss_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        check_number("aux_weight", aux_weight, low=0)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: got {type(loss_fn).__name__}, wanted a class of criteria")
        self.loss_fn = loss_fn(*args, **kwargs)
        self.aux_weight = float(aux_weight)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map what `loss_fn` takes to a scalar."""
        main = self.loss_fn(*args, **kwargs)
        found = MOE_CONTEXT.take_losses()
        if main.requires_grad and torch.is_grad_enabled() and not all(loss.has_gradient for loss in found):
            raise RuntimeError(
                "MoeLoss: an MoE layer ran without autograd, so that its auxiliary loss has no gradient; under "
                "activation checkpointing wanted torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        total = main
        for loss in found:
            total = total + self.aux_weight * loss.value.to(main.dtype)
        return total


class MoeCrossEntropyLoss(MoeLoss):
    """`MoeLoss` over nn.CrossEntropyLoss, whose arguments are the others."""

    def __init__(self, aux_weight: float = 0.01, *args: Any, **kwargs: Any) -> None:
        super().__init__(aux_weight, nn.CrossEntropyLoss, *args, **kwargs)
