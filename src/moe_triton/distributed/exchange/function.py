"""Exchange + experts + exchange as one autograd Function.

So backward can send the rows' gradients while the parameters' are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_triton import runtime
from moe_triton.distributed.exchange.channel import report_failure
from moe_triton.distributed.exchange.stages import InnermostStage, Saved, Stage


class Exchanged(torch.autograd.Function):
    """Exchange + experts + exchange."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        ids: Tensor,
        stage: Stage,
        experts: InnermostStage,
        is_training: bool,
        before_backward: Callable[[], report_failure],
        *parameters: Tensor,
    ) -> Tensor:
        saved = Saved(parameters, is_training=is_training)
        wide = weights if weights.dtype == torch.float64 else weights.float()
        with runtime.plain_maths(hidden):
            out = stage.forward(hidden.contiguous(), ids, wide.contiguous(), ids.numel(), saved)
        ctx.num_saved = len(saved.tensors)
        ctx.save_for_backward(*saved.tensors, *parameters)
        ctx.stage, ctx.experts, ctx.dtype, ctx.before_backward = stage, experts, weights.dtype, before_backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read once: checkpointing hooks allow a single unpack
        saved = Saved(tensors[ctx.num_saved :], tensors[: ctx.num_saved])
        wanted, grad = ctx.needs_input_grad[7:], grads[0].contiguous()
        with ctx.before_backward(), runtime.plain_maths(grad):
            finish = ctx.stage.start_backward(0, grad, saved)
            found = ctx.experts.backward_weights(wanted, saved)
            grad_hidden, grad_weights = finish()
        found = [g if want else None for g, want in zip(found, wanted, strict=True)]
        return (grad_hidden, grad_weights.to(ctx.dtype), *(None,) * 5, *found)
