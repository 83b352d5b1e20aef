"""A computation that an exchange may make while rows travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from moe_triton.distributed.exchange.meter import ExchangeMeter
from moe_triton.runtime import autocast_dtype, without_autocast


class Deferred:
    """A function's result, computed once, under the autograd and autocast modes of the place where it was made.

    `meters` do not count its time, where they measure what it is computed in.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        self.meters: Sequence[ExchangeMeter] = ()
        self._result: Tensor | None = None
        self._grad, dtype = torch.is_grad_enabled(), autocast_dtype(device)
        self._autocast = without_autocast(device) if dtype is None else torch.autocast(device.type, dtype)

    def compute(self) -> None:
        """Make the result now, if it is not there yet."""
        if self._result is None:
            with torch.set_grad_enabled(self._grad), self._autocast, ExitStack() as excluded:
                for meter in self.meters:
                    excluded.enter_context(meter.excluding(self._device))
                self._result = self._function()

    def result(self) -> Tensor:
        self.meters = ()  # not inside an exchange
        self.compute()
        assert self._result is not None
        return self._result
