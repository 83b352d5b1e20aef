"""Quantised projections as a part of a module: what `moe_triton.quantize` puts in the place of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.quantization import QuantizedWeight
from moe_triton.quantization.weight import PARTS
from moe_triton.records import Projection


class QuantizedProjection(nn.Module):
    """Hold a `QuantizedWeight` in buffers: codes, scales, and zeros and global_scale where its format has them.

    They are saved and loaded with the module, into one of the same format. The module moves between devices; a change
    of dtype leaves it as it is.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    global_scale: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.format, self.is_transposed = weight.format, weight.is_transposed
        for name in PARTS:
            self.register_buffer(name, getattr(weight, name))

    @property
    def weight(self) -> QuantizedWeight:
        """The weight, over the buffers as they are."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in PARTS}
        return QuantizedWeight(format=self.format, is_transposed=self.is_transposed, **parts)

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __len__(self) -> int:
        return len(self.codes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedProjection:
        for name, buffer in self.named_buffers(recurse=False):
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        transposed = ", transposed" if self.is_transposed else ""
        return f"{self.format}, {list(self.shape)}{transposed}"


def projection_of(module: nn.Module, name: str) -> Projection:
    """Return an experts module's projection: its parameter, or the quantised weight in its place."""
    found = getattr(module, name)
    return found.weight if isinstance(found, QuantizedProjection) else found


def quantize_projection(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Put a quantised weight in the place of a module's parameter `name`."""
    delattr(module, name)
    setattr(module, name, QuantizedProjection(weight))
