"""Quantised projections on a CPU: decoded in parts that stay in cache until they are multiplied."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_triton.backends.torch.cpu import CpuPolicy
from moe_triton.quantization import QuantizedWeight

PART_BYTES = 1 << 20  # of decoded numbers; about the size of an L2 cache


class Decoded:
    """Expert -> its projection [out, in] from `weight` [E, out, in], a part of the outputs at a time."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        _, self.size_out, self.size_in = weight.shape

    @property
    def mT(self) -> Decoded:
        """The transpose."""
        return Decoded(self.weight.mT, self.dtype)

    def parts(self) -> Iterator[slice]:
        """Ranges of the outputs whose numbers have at most PART_BYTES, 128 outputs at least."""
        most = PART_BYTES // (self.dtype.itemsize * max(self.size_in, 1))
        step = max(most // 128 * 128, 128)  # a multiple of every block size
        for start in range(0, self.size_out, step):
            yield slice(start, min(start + step, self.size_out))

    def product(
        self, policy: CpuPolicy, x_mI: Tensor, expert: int, bias_O: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Compute x @ projection(expert).T + bias, [m, out]."""
        y_mO = x_mI.new_empty(x_mI.shape[0], self.size_out) if out is None else out
        for part in self.parts():
            matrix = self.weight.dequantize(self.dtype, expert=expert, rows=part)
            policy.product(x_mI, matrix, None if bias_O is None else bias_O[part], y_mO[:, part])
        return y_mO
