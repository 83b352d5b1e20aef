"""Quantised projections as the compiled loops over codes read them."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_int64
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_triton.backends.torch.fused import (
    DTYPES,
    WORTH_A_THREAD,
    array,
    loops_problem,
    multiplies_pairs,
    runs_on_threads,
)
from moe_triton.backends.torch.processor import this_processor
from moe_triton.backends.torch.threads import on_all_threads, share
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

        kind, self.weight = weight.kind, weight
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

    def multiplies_pairs(self, x_mI: Tensor) -> bool:
        """Return whether `few_rows_in_bf16` runs for these rows."""
        return (
            x_mI.dtype == torch.bfloat16
            and self.weight.shape[2] % 32 == 0
            and multiplies_pairs(this_processor())
            and runs_on_threads(x_mI.dtype)
        )

    def few_rows_in_bf16(self, x_mI: Tensor, experts: Sequence[int], bounds: Sequence[int]) -> Tensor:
        """`few_rows` of bf16 rows, by products of pairs."""
        from moe_triton.backends.torch.code_vectors import FewCodes, few_codes_loop

        weight, (_, _, table, factors, _) = self.weight, self.stored
        (_, size_out, size_in), x_mI = weight.shape, x_mI.contiguous()
        parts = (c_int64 * (3 * len(experts)))(
            *(
                number
                for e, start, stop in zip(experts, bounds, bounds[1:], strict=False)
                for number in (e, start, stop)
            )
        )
        numbers, y = (
            _numbers_of_codes(weight.format, weight.zeros is not None),
            x_mI.new_empty(len(x_mI), size_out).float(),
        )
        job = FewCodes(
            x=x_mI.data_ptr(), x_row=2 * size_in, y=y.data_ptr(), y_row=4 * size_out, numbers=numbers.data_ptr(),
            codes=weight.codes.data_ptr(), codes_row=weight.codes.shape[2], scales=weight.scales.data_ptr(),
            kind=SCALE_KINDS[weight.scales.dtype], table=table.ctypes.data,
            zeros=0 if weight.zeros is None else weight.zeros.data_ptr(), factors=factors.ctypes.data,
            block=weight.kind.rows, group=weight.group, size_in=size_in, size_out=size_out, parts=addressof(parts),
            num_parts=len(experts),
        )  # fmt: skip
        loop = few_codes_loop(weight.format, weight.group, weight.zeros is not None)
        on_all_threads(loop.address, addressof(job))
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


SCALE_KINDS = {torch.uint8: 0, torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
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


@cache
def _numbers_of_codes(name: str, has_zeros: bool) -> Tensor:
    """The table that `code_vectors` looks up the codes of a format in, bf16; empty for int8."""
    if name == "int8":
        return torch.empty(0, dtype=torch.bfloat16)
    if name == "fp8":
        return torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).bfloat16()
    kind = formats.FORMATS[name]
    if not kind.is_integer:
        return torch.tensor([*formats.E2M1, *(-number for number in formats.E2M1)] * 2).bfloat16()
    first = -15 if has_zeros else -kind.zero_point
    return torch.arange(first, first + 32).bfloat16()
