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
from moe_triton.autograd.experts import Weights
from moe_triton.distributed.exchange.channel import report_failure
from moe_triton.distributed.exchange.stages import Exchange, LocalExperts, Parameters, Saved, Stage


class Exchanged(torch.autograd.Function):
    """Exchange + experts + exchange."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        ids: Tensor,
        stage: Stage,
        experts: LocalExperts,
        sizes: list[int],
        stacked: list[bool],
        before_backward: Callable[[], report_failure],
        *flat: Tensor,
    ) -> Tensor:
        saved = Saved()
        experts.parameters = unflatten(flat, sizes, stacked)
        wide = weights if weights.dtype == torch.float64 else weights.float()
        with runtime.plain_maths(hidden):
            out = stage.forward(hidden.contiguous(), ids, wide.contiguous(), ids.numel(), saved)
        experts.parameters = None  # autograd holds what backward needs
        ctx.num_saved = len(saved.tensors)
        ctx.save_for_backward(*saved.tensors, *flat)
        ctx.stage, ctx.experts, ctx.sizes, ctx.stacked, ctx.dtype = stage, experts, sizes, stacked, weights.dtype
        ctx.before_backward = before_backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read once: checkpointing hooks allow a single unpack
        saved, flat = Saved(tensors[: ctx.num_saved]), tensors[ctx.num_saved :]
        experts: LocalExperts = ctx.experts
        experts.parameters = unflatten(flat, ctx.sizes, ctx.stacked)
        wanted, needs, start = ctx.needs_input_grad[8:], [], 0
        for size in ctx.sizes:
            needs.append(any(wanted[start : start + size]))
            start += size
        grad = grads[0].contiguous()
        with ctx.before_backward(), runtime.plain_maths(grad):
            stage = ctx.stage
            if isinstance(stage, Exchange):
                finish = stage.start_backward(0, grad, saved)
            else:
                rows = stage.backward_rows(0, grad, saved)
                finish = lambda: rows  # noqa: E731
            parameters = experts.backward_weights((needs[0], needs[1], needs[2], needs[3]), saved)
            grad_hidden, grad_weights = finish()
        experts.parameters = None
        found: list[Tensor | None] = []
        for group, size in zip(parameters, ctx.sizes, strict=True):
            found += [None] * size if group is None else as_list(group)
        found = [g if want else None for g, want in zip(found, wanted, strict=True)]
        return (grad_hidden, grad_weights.to(ctx.dtype), *(None,) * 6, *found)


def as_list(group: Weights | None) -> list[Tensor]:
    """The tensors of one group of parameters: of stacked ones there is one."""
    if group is None:
        return []
    return [group] if isinstance(group, Tensor) else list(group)


def flatten(parameters: Parameters) -> list[Tensor]:
    """All tensors of the four groups, as autograd wants them."""
    return [tensor for group in parameters for tensor in as_list(group)]


def unflatten(flat: tuple[Tensor, ...], sizes: list[int], stacked: list[bool]) -> Parameters:
    """The four groups again: of `sizes` tensors each, stacked or one per expert."""
    groups: list[Any] = []
    start = 0
    for size, one in zip(sizes, stacked, strict=True):
        part = flat[start : start + size]
        groups.append(None if size == 0 else part[0] if one else list(part))
        start += size
    return groups[0], groups[1], groups[2], groups[3]
