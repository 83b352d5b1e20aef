"""Tokens that are the same on all ranks of a tensor-parallel group: each rank takes its share, and gets all back.

Slicing is after routing, so that every rank's router sees every token and gets its whole gradient; DeepSpeed's
drop_tokens and gather_tokens do the same around its exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.groups import Group
from moe_triton.records import ExpertParameters
from moe_triton.torch_internals import never_compiled


def share(num_tokens: int, group: Group, rank: int | None = None) -> tuple[int, int]:
    """Return the tokens [start, end) of a rank of the group: runs of ceil(T / size), the last ones shorter."""
    size = -(-num_tokens // group.size)
    rank = group.rank if rank is None else rank
    return min(rank * size, num_tokens), min((rank + 1) * size, num_tokens)


def slice_tokens(x: Tensor, channel: Channel) -> Tensor:
    """Return this rank's share of the tokens x [T, ...]; backward gathers the shares' gradients."""
    if not x.is_floating_point():
        start, end = share(x.shape[0], channel.group)
        return x[start:end]
    return _Slice.apply(x, channel)


def gather_tokens(x: Tensor, channel: Channel, num_tokens: int) -> Tensor:
    """Gather all T tokens, from every rank's share; backward takes this rank's share of the gradient."""
    return _Gather.apply(x, channel, num_tokens)


@never_compiled
def sum_slices_gradients(parameters: ExpertParameters, channel: Channel) -> ExpertParameters:
    """Return the parameters of a slice of the experts such that backward sums what it adds to gradients of whole ones.

    The adapters' factors that touch no sliced dimension are whole on every rank, and each slice uses them.
    """
    whole = {"gate_up_lora_a": parameters.gate_up_lora_a, "down_lora_b": parameters.down_lora_b}
    summed = {name: _SumGradient.apply(x, channel) for name, x in whole.items() if x is not None}
    return parameters._replace(**summed)


def _all_shares(x: Tensor, channel: Channel, num_tokens: int) -> Tensor:
    room = -(-num_tokens // channel.group.size)
    padded = x.new_zeros(room, *x.shape[1:])
    padded[: x.shape[0]] = x
    out = x.new_empty(room * channel.group.size, *x.shape[1:])
    channel.all_gather(out, padded, "gathering of the tp ranks' tokens")()
    return out[:num_tokens]


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channel: Channel) -> Tensor:
        ctx.channel, ctx.num_tokens = channel, x.shape[0]
        start, end = share(x.shape[0], channel.group)
        return x[start:end].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_shares(grads[0], ctx.channel, ctx.num_tokens), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channel: Channel) -> Tensor:
        ctx.channel = channel
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        ctx.channel.all_reduce(total, "sum of the slices' gradients")
        return total, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channel: Channel, num_tokens: int) -> Tensor:
        ctx.bounds = share(num_tokens, channel.group)
        return _all_shares(x, channel, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        start, end = ctx.bounds
        return grads[0][start:end].contiguous(), None, None
