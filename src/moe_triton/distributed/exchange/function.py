"""Exchange + experts + exchange as one autograd Function.

So backward can send the rows' gradients while the parameters' are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_triton import runtime
from moe_triton.autograd.transforms import once_differentiable
from moe_triton.distributed.exchange.channel import report_failure
from moe_triton.distributed.exchange.stages import InnermostStage, Saved, Stage


class StagedCall(NamedTuple):
    """One call of a layer, as its stages take it.

    stage            the outermost one
    experts          the innermost one
    is_training      whether a backward may come
    before_backward  called at its start; what it returns is around it
    """

    stage: Stage
    experts: InnermostStage
    is_training: bool
    before_backward: Callable[[], report_failure]


class Exchanged(torch.autograd.Function):
    """Exchange + experts + exchange."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, ids: Tensor, call: StagedCall, *parameters: Tensor
    ) -> Tensor:
        saved = Saved(parameters, is_training=call.is_training)
        wide = weights if weights.dtype == torch.float64 else weights.float()
        with runtime.plain_maths(hidden):
            out = call.stage.forward(hidden.contiguous(), ids, wide.contiguous(), ids.numel(), saved)
        ctx.save_for_backward(*saved.tensors, *parameters)
        ctx.call, ctx.dtype, ctx.num_saved = call, weights.dtype, len(saved.tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, tensors = ctx.call, ctx.saved_tensors  # read once: checkpointing hooks allow a single unpack
        saved = Saved(tensors[ctx.num_saved :], tensors[: ctx.num_saved])
        wanted, grad = ctx.needs_input_grad[4:], grads[0].contiguous()
        with call.before_backward(), runtime.plain_maths(grad):
            finish = call.stage.start_backward(0, grad, saved)
            found = call.experts.backward_weights(wanted, saved)
            grad_hidden, grad_weights = finish()
        found = [g if want else None for g, want in zip(found, wanted, strict=True)]
        return (grad_hidden, grad_weights.to(ctx.dtype), None, None, *found)
