"""Quantised projections as the compiled loops over codes read them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_triton.backends.torch.fused import DTYPES, WORTH_A_THREAD, array, loops_problem
from moe_triton.backends.torch.threads import share
from moe_triton.quantization import QuantizedWeight, formats
from moe_triton.torch_internals import SERIAL


class StoredCodes:
    """A projection [E, rows, columns] as the loops read it.

    planes    codes in a word of 16 bits
    stored    codes uint16 [E, rows, columns / planes], scales, table, factors [E] fp32, zeros
    step      words that share a scale
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        from moe_triton.backends.torch.loops import code_loops

        kind = weight.kind
        self.planes, self.step = 16 // kind.bits, weight.group * kind.bits // 16
        self.loops = code_loops(kind.name, weight.scales.dtype, weight.zeros is not None)
        codes = array(weight.codes.view(torch.uint8)).view(np.uint16)
        factors = _ones(len(weight)) if weight.global_scale is None else array(weight.global_scale)
        zeros = NO_ZEROS if weight.zeros is None else array(weight.zeros)
        self.stored = (codes, array(weight.scales), _numbers_of_bytes(weight.scales.dtype), factors, zeros)

    def few_rows(self, x_mI: Tensor, experts: Sequence[int], bounds: Sequence[int]) -> Tensor:
        """Return x[r] @ projection(experts[p]).T for bounds[p] <= r < bounds[p+1], [m, rows] fp32."""
        codes = self.stored[0]
        num_rows, size = x_mI.shape
        x, y = torch.empty(num_rows, self.planes, size // self.planes), torch.empty(num_rows, codes.shape[1])
        for rows, found in zip(serial_parts(x_mI), serial_parts(x), strict=True):
            found.copy_(rows.unflatten(1, (-1, self.planes)).mT)
        arguments = (self.stored, self.step, np.array(experts), np.array(bounds), x.numpy(), y.numpy())
        numbers = codes.shape[2] * self.planes * len(experts)
        share(
            lambda first, last: self.loops.few_rows(*arguments, first, last),
            codes.shape[1],
            WORTH_A_THREAD // max(numbers, 1),
        )
        return y

    def decode(self, expert: int, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Write a part of a projection to the first rows of `out`, fp32 or bf16, in planes; return these rows."""
        num_rows, words = rows.stop - rows.start, (columns.start // self.planes, columns.stop // self.planes)
        decode = self.loops.decode if out.dtype == torch.float32 else self.loops.decode_to_bf16
        found = out[:num_rows, : columns.stop - columns.start]
        arguments = (self.stored, self.step, expert, rows.start, words, array(found))
        share(lambda first, last: decode(*arguments, first, last), num_rows, WORTH_A_THREAD // max(found.shape[1], 1))
        return found


def stored_codes(weight: QuantizedWeight, dtype: torch.dtype) -> StoredCodes | None:
    """Return a projection for the loops; None where they do not run, or cannot read it or write `dtype`."""
    is_readable = all(part.is_contiguous() for part in weight.parts().values()) and weight.codes.numel() > 0
    has_words = weight.codes.shape[2] * weight.codes.element_size() % 2 == 0
    can_run = is_readable and has_words and dtype in DTYPES and loops_problem() is None
    return StoredCodes(weight) if can_run else None


def serial_parts(x: Tensor) -> tuple[Tensor, ...]:
    """Return parts of the rows so small that torch's operations on them start no threads.

    Those wait busily for milliseconds when an operation has ended, on the processors that our loops need.
    """
    return x.split(max(SERIAL * len(x) // max(x.numel(), 1), 1))


def in_planes(x: Tensor, planes: int) -> Tensor:
    """Return [m, I] as [m, planes, I / planes], plane k with the columns that are k modulo planes."""
    return x.unflatten(1, (-1, planes)).mT.contiguous()


NO_ZEROS = np.zeros((1, 1, 1), dtype=np.uint8)


@cache
def _ones(size: int) -> np.ndarray:
    return np.ones(size, dtype=np.float32)


@cache
def _numbers_of_bytes(dtype: torch.dtype) -> Any:
    """The numbers of all bytes of a scale's dtype, [256] fp32."""
    if dtype == torch.float8_e4m3fn:
        return torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    return formats.powers(torch.device("cpu")).numpy()
