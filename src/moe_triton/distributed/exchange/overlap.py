"""A computation that an exchange may make while rows travel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Deferred:
    """A function's result, computed once, under the autograd and autocast modes of the place where it was made."""

    def __init__(self, function: Callable[[], Tensor], device: torch.device) -> None:
        self._function, self._result = function, None
        self._grad, kind = torch.is_grad_enabled(), device.type
        self._autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def compute(self) -> None:
        """Make the result now, if it is not there yet."""
        if self._result is None:
            with torch.set_grad_enabled(self._grad), self._autocast:
                self._result = self._function()

    def result(self) -> Tensor:
        self.compute()
        assert self._result is not None
        return self._result
