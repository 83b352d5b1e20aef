"""What the autograd Functions need under torch.func transforms, and for second derivatives that they have not."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Do what torch's does to a Function's backward; it enters contexts only where gradients are differentiated."""
    recorded = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
        return recorded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return call


def refuse_jvp(name: str) -> Any:
    """Make the `jvp` of an autograd Function that has no forward-mode formula."""

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{name}: got forward-mode differentiation (jvp), wanted reverse mode (backward, torch.func.grad or vjp)"
        )

    return staticmethod(jvp)


def call_per_sample(
    function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Map a function that returns a tuple of tensors over a batch, one call per sample, as `vmap` rules must return it.

    in_dims has an int for every argument that is batched, along that dimension.
    """
    batched = [isinstance(dim, int) for dim in in_dims]
    samples = []
    for index in range(info.batch_size):
        picked = zip(args, in_dims, batched, strict=True)
        samples.append(function(*(arg.select(dim, index) if is_batched else arg for arg, dim, is_batched in picked)))
    outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    return outputs, (0,) * len(outputs)


class TransformedGradient(torch.autograd.Function):
    """A gradient under torch.func: a function of tensors that is called per sample and has no derivative itself."""

    jvp = refuse_jvp("the gradient of route or moe_mlp")

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return call_per_sample(TransformedGradient.apply, info, in_dims, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("the gradient of route or moe_mlp: got a second derivative, wanted the first only")
