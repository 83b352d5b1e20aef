"""Loss scaling for models whose experts are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.groups import group_from_handle


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` that skips a step on all ranks when any rank has found an inf or NaN.

    An expert's gradient may overflow on the ranks that hold it and nowhere else. torch's own scaler would then skip the
    step and lower the scale on those alone, and the ranks' dense parameters would part. Use it as torch's, after
    `reduce_gradients` and before `clip_grad_norm_`; every rank of the default group must call `unscale_` and `step`
    for the same optimizers in the same order.

    Args:
        arguments: those of `torch.amp.GradScaler`: device, init_scale, growth_factor, backoff_factor, growth_interval,
            enabled.

    Raises:
        ExpertParallelError: a rank is gone; the message names it.
    """

    def _unscale_grads_(self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, *arguments: Any) -> Any:
        """What `unscale_` and `step` learn of the gradients: {device: whether any is not finite, as 0.0 or 1.0}."""
        per_device = super()._unscale_grads_(optimizer, inv_scale, found_inf, *arguments)
        if not (dist.is_available() and dist.is_initialized()):
            return per_device
        world, device = group_from_handle(None), found_inf.device
        # a rank without any gradient takes part, and steps or skips with the others
        anywhere = torch.stack([found.to(device) for found in (found_inf, *per_device.values())]).amax()
        if world.size > 1:
            Channel(group=world, layer="GradScaler").all_reduce(anywhere, "found_inf", dist.ReduceOp.MAX)
        return {place: anywhere.to(place) for place in (device, *per_device)}
